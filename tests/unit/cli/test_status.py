"""Exit statuses: the code, the help and the README say the same."""

import re
import signal
from pathlib import Path

from bunshin.cli import status

README = Path(__file__).parents[3] / "README.md"


def test_readme_has_the_table() -> None:
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", README.read_text(), re.MULTILINE)
    assert tuple(rows) == status.TABLE


def test_every_status_is_documented_once() -> None:
    numbers = [int(number) for number, _ in status.TABLE]
    assert numbers == sorted(set(numbers))
    values = {v for k, v in vars(status).items() if k.isupper() and isinstance(v, int)}
    values.remove(status.SIGNAL)
    values |= {128 + signal.SIGINT, 128 + signal.SIGTERM}
    assert values == set(numbers)


def test_conventions() -> None:
    assert status.OK == 0
    assert status.USAGE == 2
    assert status.TIMEOUT == 124  # as timeout(1)
    assert status.HANGUP == 128 + 1
    assert status.READER_GONE == 128 + 13


def test_help_has_the_table() -> None:
    text = status.explain()
    assert all(f"  {number} " in text for number, _ in status.TABLE)
    assert max(map(len, text.splitlines())) <= 80
