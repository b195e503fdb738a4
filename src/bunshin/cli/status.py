"""Exit statuses: a promise to scripts, so every way out has one line here."""

OK = 0
INTERNAL = 1
USAGE = 2
PANIC = 3
RESET = 4
TRIPLE_FAULT = 5
IMAGE = 6
HOST = 7
STATE = 8
TIMEOUT = 124
HANGUP = 129
READER_GONE = 141
SIGNAL = 128
"""128 + the number of the signal that ended bunshin, as shells have it."""

TABLE = (
    ("0", "the guest powered off, or you quit with Ctrl-A x"),
    ("1", "an error inside bunshin; please report it"),
    ("2", "the command line or a value on it cannot be used"),
    ("3", "the guest's kernel panicked"),
    ("4", "the guest asked for a reset"),
    ("5", "the guest's processor shut down (triple fault)"),
    ("6", "a kernel, initrd or image is missing, damaged or could not be made"),
    ("7", "the host or the engine refused, or failed while the guest ran"),
    ("8", "a saved state does not fit"),
    ("124", "the time given by --timeout was over"),
    ("129", "the terminal was closed (SIGHUP)"),
    ("130", "interrupted (SIGINT, Ctrl-C while the guest does not have the terminal)"),
    ("141", "the reader of the output went away (as for SIGPIPE)"),
    ("143", "ended by SIGTERM"),
)


def explain() -> str:
    """The table as help text."""
    from .options import entry

    lines = ["exit status:"]
    for number, meaning in TABLE:
        lines += entry(f"  {number}", meaning)
    return "\n".join(lines)
