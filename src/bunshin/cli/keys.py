"""What a person types: keys for the guest, and commands that start with Ctrl-A."""

ESCAPE = 0x01  # Ctrl-A

QUIT = "quit"
HELP = "help"

HELP_TEXT = """
  Ctrl-A x        end the machine, as if its plug were pulled
  Ctrl-A h        show this
  Ctrl-A Ctrl-A   send Ctrl-A to the guest
Everything else, Ctrl-C too, goes to the guest.
"""


class Keys:
    """Splits typed bytes into text for the guest and commands for bunshin."""

    def __init__(self) -> None:
        self._escaped = False

    def feed(self, data: bytes) -> tuple[bytes, list[str]]:
        """Take bytes as typed; an escape may be split between calls.

        Returns:
            The bytes for the guest and the commands (QUIT, HELP) in order. What
            follows a QUIT is dropped, as is a key that means nothing after Ctrl-A.
        """
        out = bytearray()
        commands: list[str] = []
        for byte in data:
            if not self._escaped:
                if byte == ESCAPE:
                    self._escaped = True
                else:
                    out.append(byte)
                continue
            self._escaped = False
            if byte == ESCAPE:
                out.append(byte)
            elif byte in b"xX":
                commands.append(QUIT)
                break
            elif byte in b"hH?":
                commands.append(HELP)
        return bytes(out), commands
