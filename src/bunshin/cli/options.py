"""Declared options: parsed, suggested and explained from one table.

A verb lists its `Option`s; `parse` turns words into values by key, and
`explain` prints the same table as help. Spellings may be `--long`,
`--long=value`, one-letter `-m value` or `-m512M`, and QEMU's single-dash words
such as `-kernel`. A later option overrules an earlier one, unless it may be given
several times.

Not argparse: importing that costs more than everything else the command line
does before the guest starts.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

WIDTH = 80
COLUMN = 27


class UsageError(Exception):
    """The words on the command line make no sense; the text says which and why."""


def text(value: str) -> str:
    """Take any value as it is."""
    return value


class Option(NamedTuple):
    """One option: its spellings, its value and a line for people.

    `metavar` is None for a switch, which yields True. `parse` gets the value as
    typed and raises ValueError with the end of a sentence when it does not fit.
    """

    names: tuple[str, ...]
    metavar: str | None
    help: str
    parse: Callable[[str], Any] = text
    hidden: tuple[str, ...] = ()
    """Spellings that are accepted but not listed in the help."""
    bare: Any = None
    """Value of an option that stands alone; then a value follows only after `=`."""
    many: bool = False
    """May be given several times; the value is the list of them."""

    @property
    def key(self) -> str:
        """Name of the value: the first spelling without dashes."""
        return self.names[0].lstrip("-").replace("-", "_")


class Verb(NamedTuple):
    """What `bunshin NAME` takes; `parse` and `explain` work from it."""

    name: str
    summary: str
    operands: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()
    notes: str = ""
    """Shown below the options, as it stands."""


HELP = Option(("--help", "-h"), None, "Show this text.")


class Values:
    """The result of `parse`: an attribute for every option, None where not given."""

    def __init__(self) -> None:
        self.operands: list[str] = []
        self.options: dict[str, Any] = {}

    def __getattr__(self, key: str) -> Any:
        return self.options.get(key)


def seconds(value: str) -> float:
    """A length of time: `90`, `1.5`, `90s`, `2m`, `1h`."""
    number, unit = value, 1
    if value[-1:] in {"s", "m", "h"}:
        number, unit = value[:-1], {"s": 1, "m": 60, "h": 3600}[value[-1]]
    try:
        result = float(number) * unit
    except ValueError:
        raise ValueError("is not a time; write seconds, or 90s, 2m, 1h") from None
    if not 0 < result < 1e9:  # also catches nan
        raise ValueError("is not a time that can pass; it must be above zero")
    return result


def count(value: str) -> int:
    """A whole number from 1 up."""
    if not (value.isascii() and value.isdigit() and int(value) > 0):
        raise ValueError("is not a whole number from 1 up")
    return int(value)


def one_of(*choices: str) -> Callable[[str], str]:
    """One of several words."""

    def parse(value: str) -> str:
        if value not in choices:
            raise ValueError(f"is not {' or '.join(map(repr, choices))}{closest(value, choices)}")
        return value

    return parse


def closest(word: str, choices: Sequence[str]) -> str:
    """`; did you mean X?` or nothing."""
    from difflib import get_close_matches  # only needed on the way out

    found = get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


def parse(verb: Verb, words: Sequence[str]) -> Values:
    """Turn words into values.

    Raises:
        UsageError: an unknown option or one without its value, a value that
            does not fit, or an operand too many.
    """
    table = {name: option for option in (*verb.options, HELP) for name in (*option.names, *option.hidden)}
    values = Values()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            values.operands.extend(rest)
            break
        if not word.startswith("-") or word == "-":
            values.operands.append(word)
            continue
        name, equals, attached = word.partition("=")
        option = table.get(name)
        value: str | None = attached if equals else None
        if option is None and word[1:2] != "-" and word[2:3].isdigit():
            option, name, value = table.get(word[:2]), word[:2], word[2:]  # -m512M
        if option is None:
            _unknown(word, name, list(table))
        if option.metavar is None:
            if value is not None:
                raise UsageError(f"{name} takes no value, but {value!r} was given")
            values.options[option.key] = True
            continue
        if value is None and option.bare is not None:
            values.options[option.key] = option.bare
            continue
        if value is None:
            if not rest:
                raise UsageError(f"{name} needs a value: {name} {option.metavar}")
            value = rest.pop(0)
        try:
            parsed = option.parse(value)
        except ValueError as error:
            raise UsageError(f"{name}: {value!r} {error}") from None
        if option.many:
            values.options.setdefault(option.key, []).append(parsed)
        else:
            values.options[option.key] = parsed
    if len(values.operands) > len(verb.operands) and not values.help:
        extra = values.operands[len(verb.operands)]
        raise UsageError(f"{extra!r} is one word too many for 'bunshin {verb.name}'")
    return values


def _unknown(word: str, name: str, known: list[str]) -> NoReturn:
    # `-memory` for `--memory` is one dash away, whatever difflib thinks of it.
    for guess in ("-" + name, name[1:]):
        if guess in known:
            raise UsageError(f"unknown option {word!r}; did you mean {guess!r}?")
    raise UsageError(f"unknown option {word!r}{closest(name, known)}")


def explain(verb: Verb) -> str:
    """The help text of one verb."""
    words = "".join(f" [{operand}]" for operand in verb.operands)
    lines = [f"usage: bunshin {verb.name}{words}" + (" [options]" if verb.options else ""), ""]
    lines += [*wrap(verb.summary, 0), ""]
    lines.append("options:")
    for option in (*verb.options, HELP):
        value = f" {option.metavar}" if option.metavar else ""
        if option.bare is not None:
            value = f"[={option.metavar}]"
        head = "  " + ", ".join(option.names) + value
        lines += entry(head, option.help)
    if verb.notes:
        lines += ["", verb.notes.strip("\n")]
    return "\n".join(lines)


def entry(head: str, body: str) -> list[str]:
    """A term on the left, its wrapped explanation on the right."""
    lines = wrap(body, COLUMN)
    if len(head) < COLUMN - 1:
        lines[0] = head.ljust(COLUMN) + lines[0].lstrip()
        return lines
    return [head, *lines]


def wrap(body: str, indent: int) -> list[str]:
    """Break a paragraph into lines of at most `WIDTH` columns."""
    lines, line = [], ""
    for word in body.split():
        if line and indent + len(line) + 1 + len(word) > WIDTH:
            lines.append(" " * indent + line)
            line = word
        else:
            line = f"{line} {word}" if line else word
    return [*lines, " " * indent + line]
