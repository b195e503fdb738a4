"""Options: every spelling, every refusal, and help that fits a terminal."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bunshin.cli.options import (
    Option,
    UsageError,
    Values,
    Verb,
    count,
    explain,
    one_of,
    parse,
    seconds,
)

VERB = Verb(
    "demo",
    "A verb to test with.",
    operands=("THING",),
    options=(
        Option(("--kernel",), "FILE", "A file.", hidden=("-kernel",)),
        Option(("--memory", "-m"), "SIZE", "A size."),
        Option(("--cpus",), "N", "A number. " + "words " * 40, count, hidden=("-smp",)),
        Option(("--stats",), None, "A switch."),
        Option(("--shape",), "FORM", "A choice.", one_of("round", "square"), bare="round"),
    ),
    notes="notes:\n  as they stand",
)


def words(text: str) -> Values:
    return parse(VERB, text.split())


@pytest.mark.parametrize(
    "line",
    ["--memory 512M", "--memory=512M", "-m 512M", "-m=512M", "-m512M", "-m 1G --memory 512M"],
)
def test_spellings_of_a_value(line: str) -> None:
    assert words(line).memory == "512M"


@pytest.mark.parametrize("line", ["--kernel K", "-kernel K", "--kernel=K", "-kernel=K"])
def test_qemu_spellings(line: str) -> None:
    values = words(line)
    assert values.kernel == "K"
    assert values.operands == []


def test_values_keep_equals_signs_and_spaces() -> None:
    assert parse(VERB, ["--kernel=a=b c"]).kernel == "a=b c"
    assert parse(VERB, ["--kernel", "--odd"]).kernel == "--odd"


def test_what_was_not_given_is_none() -> None:
    assert words("").kernel is None
    assert words("").stats is None
    assert words("--stats").stats is True


def test_operands() -> None:
    assert (words("--shape").shape, words("--shape=square").shape) == ("round", "square")
    assert words("--shape square").operands == ["square"]
    assert words("tiny --stats").operands == ["tiny"]
    assert words("-- --stats").operands == ["--stats"]
    assert words("-").operands == ["-"]


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("--memroy 1G", "did you mean '--memory'"),
        ("-memory 1G", "did you mean '--memory'"),
        ("--smp 2", "did you mean '-smp'"),
        ("--xyzzy", "unknown option '--xyzzy'"),
        ("--kernel", "needs a value: --kernel FILE"),
        ("--stats=yes", "takes no value"),
        ("--shape=squar", "is not 'round' or 'square'; did you mean 'square'"),
        ("--shape=", "is not 'round' or 'square'"),
        ("--cpus two", "'two' is not a whole number"),
        ("--cpus 0", "whole number"),
        ("--cpus -1", "whole number"),
        ("one two", "'two' is one word too many"),
    ],
)
def test_refusals_name_the_word(line: str, part: str) -> None:
    with pytest.raises(UsageError) as caught:
        words(line)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("value", "expected"), [("90", 90), ("1.5", 1.5), ("90s", 90), ("2m", 120), ("1h", 3600)]
)
def test_seconds(value: str, expected: float) -> None:
    assert seconds(value) == expected


@pytest.mark.parametrize("value", ["", "s", "soon", "0", "-1", "nan", "inf", "1e99", "1d"])
def test_seconds_that_cannot_be(value: str) -> None:
    with pytest.raises(ValueError):
        seconds(value)


def test_help_wins_over_operands_too_many() -> None:
    assert words("a b c --help").help


def test_help_lists_every_option_and_fits() -> None:
    text = explain(VERB)
    assert text.startswith("usage: bunshin demo [THING] [options]\n")
    for spelling in (
        "--kernel FILE",
        "--memory, -m SIZE",
        "--cpus N",
        "--stats",
        "--shape[=FORM]",
        "--help, -h",
    ):
        assert spelling in text
    assert "-smp" not in text
    assert text.endswith("notes:\n  as they stand")
    assert max(map(len, text.splitlines())) <= 80


@given(st.lists(st.text(max_size=12), max_size=6))
def test_any_words_are_parsed_or_refused(line: list[str]) -> None:
    with suppress(UsageError):
        parse(VERB, line)
