from __future__ import annotations

from typing import Any

import pytest

from bunshin import engine
from bunshin.errors import ConfigError, EngineError

Figures = dict[str, Any]


def test_choice(native: Any, figures: dict[str, Figures], monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.choose() == ("translator", "this host has no /dev/kvm", None)
    assert engine.choose("translator") == ("translator", "it was asked for", None)
    assert engine.choose("kvm") == ("kvm", "it was asked for", "this host has no /dev/kvm")
    monkeypatch.setattr(engine, "figures", lambda: figures["healthy"])
    assert engine.choose().name == "kvm"
    assert engine.choose("kvm").warning is None
    assert engine.choose("translator").name == "translator"
    with pytest.raises(ConfigError, match="'tcg' is unknown; there are: auto, kvm, translator"):
        engine.choose("tcg")


@pytest.mark.parametrize(
    ("host", "name", "reason"),
    [
        ("no node", "translator", "this host has no /dev/kvm"),
        ("no permission", "translator", "you may not open /dev/kvm"),
        ("another node", "translator", "/dev/kvm does not answer as KVM does"),
        ("healthy", "kvm", "KVM runs supervisor code at the speed of hardware here, 0.3 ns an instruction"),
        (
            "emulated",
            "translator",
            (
                "KVM on this host emulates supervisor code: an instruction takes 553 ns where "
                "hardware takes about 1 and fails at CMPXCHG16B, which kernels need"
            ),
        ),
    ],
)
def test_recorded_hosts(figures: dict[str, Figures], host: str, name: str, reason: str) -> None:
    assert engine.decide(figures[host]) == (name, reason, None)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"machine": False, "trouble": "KVM: creating a processor: no"}, "makes no machine: KVM: creating"),
        ({"long_mode": False, "trouble": None}, "runs no 64-bit code: it stood still"),
        ({"instruction_ns": 80.0}, "an instruction takes 80 ns where hardware takes about 1"),
        (
            {"cmpxchg16b": False, "trouble": "it stopped"},
            "fails at CMPXCHG16B, which kernels need: it stopped",
        ),
        ({"xsave": False, "trouble": None}, "fails at XRSTOR, which kernels need: it gave a wrong result"),
        ({"trouble": "its guest was not done after 15 ms"}, "not done after 15 ms"),
        ({"slots": 3}, "only 3 pieces of memory"),
    ],
)
def test_kvm_that_lies_is_not_taken(figures: dict[str, Figures], change: Figures, part: str) -> None:
    choice = engine.decide(figures["healthy"] | change)
    assert choice.name == "translator"
    assert part in choice.reason


def test_a_host_without_xsave_can_still_be_fast(figures: dict[str, Figures]) -> None:
    assert engine.decide(figures["healthy"] | {"xsave": None}).name == "kvm"


def test_native_errors_are_translated(native: Any) -> None:
    native.refuse = True
    with pytest.raises(EngineError) as caught:
        engine.create("translator", 1)
    assert caught.value.slug == "no-bmi2"
    assert str(caught.value) == "the host's processor lacks BMI2"
