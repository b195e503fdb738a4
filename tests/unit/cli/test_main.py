"""`bunshin` itself: verbs, help, and every error as one sentence with its status."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import bunshin
from bunshin import cli, errors
from bunshin.cli import doctor, image, main, signals


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """`main` catches signals; give pytest's own back."""
    before = {signum: signal.getsignal(signum) for signum in signals.ENDING}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bunshin {bunshin.__version__}\n"


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in cli.VERBS)
    assert main(["help"]) == 0
    assert capsys.readouterr().out == text
    assert max(map(len, text.splitlines())) <= 85


@pytest.mark.parametrize("verb", ["run", "image", "doctor"])
def test_help_of_a_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", verb]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: bunshin {verb}")
    assert main([verb, "--help"]) == 0
    assert capsys.readouterr().out == text
    assert max(map(len, text.splitlines())) <= 85


def test_nothing_said_shows_help_as_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("usage: bunshin")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["rnu"], "unknown verb 'rnu'; did you mean 'run'?"),
        (["help", "rnu"], "unknown verb 'rnu'; did you mean 'run'?"),
        (["--versoin"], "unknown option '--versoin'; did you mean '--version'?"),
        (["doctor", "now"], "'now' is one word too many for 'bunshin doctor' (see 'bunshin help doctor')"),
        (
            ["image", "biuld"],
            "'biuld' is not one of list, build, remove; did you mean 'build'? (see 'bunshin help image')",
        ),
        (["image", "build"], "which image? 'bunshin image build tiny' (see 'bunshin help image')"),
        (["image", "build", "vast"], "image: 'vast' is unknown; there are: tiny"),
    ],
)
def test_usage(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err == f"bunshin: {sentence}\n"


class Panic(BaseException):
    """As the native module raises it: no Exception."""


FAILURES = [
    (errors.ConfigError("s", "the user's"), 2, "the user's"),
    (errors.ImageError("s", "a file's"), 6, "a file's"),
    (errors.StateError("s", "a state's"), 8, "a state's"),
    (errors.EngineError("s", "the host's"), 7, "the host's"),
    (errors.Timeout("s", "nothing came"), 124, "nothing came"),
    (ModuleNotFoundError("no", name="bunshin._native"), 7, "the engine is not built yet"),
    (MemoryError(), 7, "not enough memory"),
    (PermissionError(13, "Permission denied", "/dev/x"), 7, "/dev/x: Permission denied"),
    (ZeroDivisionError("by\nzero"), 1, "internal error, please report it: ZeroDivisionError: by zero"),
    (Panic("assertion failed"), 1, "internal error, please report it: Panic: assertion failed"),
    (BrokenPipeError(), 141, ""),
]


@pytest.mark.parametrize(("error", "code", "sentence"), FAILURES)
def test_failures(
    error: BaseException,
    code: int,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(doctor, "main", raising(error))
    monkeypatch.setattr(cli, "_forget_stdout", lambda: None)
    monkeypatch.delenv("BUNSHIN_DEBUG", raising=False)
    assert main(["doctor"]) == code
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == bool(sentence)
    monkeypatch.setenv("BUNSHIN_DEBUG", "1")
    assert main(["doctor"]) == code
    assert ("Traceback" in capsys.readouterr().err) == bool(sentence)


@pytest.mark.parametrize("signum", signals.ENDING)
def test_signals(signum: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "main", lambda values: signal.raise_signal(signum))
    assert main(["doctor"]) == 128 + signum


def raising(error: BaseException) -> Callable[[Any], int]:
    def main(values: Any) -> int:
        raise error

    return main


def test_image_verbs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    there = SimpleNamespace(name="tiny", length=5 << 20, source="linux 6, busybox 1")
    monkeypatch.setattr("bunshin.images.get", lambda name: there)
    monkeypatch.setattr("bunshin.images.find", lambda name: None)
    monkeypatch.setattr("bunshin.images.remove", lambda name: name == "tiny")
    assert main(["image", "build", "tiny"]) == 0
    assert capsys.readouterr().out == "tiny is ready: 5 MiB, from linux 6, busybox 1\n"
    assert main(["image"]) == 0
    assert "not built yet" in capsys.readouterr().out
    monkeypatch.setattr("bunshin.images.find", lambda name: there)
    assert main(["image", "list"]) == 0
    assert "built, 5 MiB, from linux 6" in capsys.readouterr().out
    assert main(["image", "remove", "tiny"]) == 0
    assert capsys.readouterr().out == "tiny is removed\n"
    assert image.ACTIONS == ("list", "build", "remove")


class Native:
    """What doctor asks of the native module."""

    @staticmethod
    def host_features() -> dict[str, bool]:
        return {"bmi2": True, "avx2": True, "avx512f": False}

    @staticmethod
    def tsc_hz() -> int:
        return 2_450_000_000

    @staticmethod
    def probe_kvm() -> dict[str, Any]:
        return {"refusal": "kvm-absent", "trouble": None}

    class EngineError(Exception):
        """What the native module raises."""

    breakpoints: bool | None = True
    """None: direct execution is not possible."""

    @classmethod
    def direct_execution(cls) -> bool:
        if cls.breakpoints is None:
            raise cls.EngineError("sandbox", "the host refuses seccomp")
        return cls.breakpoints


def test_doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("bunshin.engine.native", lambda: Native)
    monkeypatch.setattr("bunshin.engine.figures", Native.probe_kvm)
    monkeypatch.setattr("bunshin.engine.create", lambda name, cpus: None)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for part in (
        "bmi2 avx2\n",
        "absent        avx512f\n",
        "2450 MHz",
        "/dev/kvm      absent\n",
        "engine        translator: this host has no",
    ):
        assert part in text
    assert text.endswith("verdict       machines can run here\n")


@pytest.mark.parametrize(
    ("breakpoints", "says"),
    [
        (True, "direct --engine direct (experimental) is possible verdict"),
        (False, "is possible, but the host gives no breakpoints"),
        (None, "direct no --engine direct: the host refuses seccomp verdict"),
    ],
)
def test_doctor_on_direct_execution(
    breakpoints: bool | None, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bunshin.engine.native", lambda: Native)
    monkeypatch.setattr("bunshin.engine.figures", Native.probe_kvm)
    monkeypatch.setattr("bunshin.engine.create", lambda name, cpus: None)
    monkeypatch.setattr(Native, "breakpoints", breakpoints)
    assert main(["doctor"]) == 0
    assert says in " ".join(capsys.readouterr().out.split())


def test_doctor_finds_trouble(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("bunshin.engine.native", lambda: Native)
    monkeypatch.setattr("bunshin.engine.figures", Native.probe_kvm)
    monkeypatch.setattr(
        "bunshin.engine.create", refusing(errors.EngineError("s", "the processor lacks bmi2"))
    )
    assert main(["doctor"]) == 7
    text = capsys.readouterr().out
    assert "trouble       the processor lacks bmi2\n" in text
    assert text.endswith("verdict       machines cannot run here\n")


def refusing(error: BaseException) -> Callable[[str, int], None]:
    def create(name: str, cpus: int) -> None:
        raise error

    return create
