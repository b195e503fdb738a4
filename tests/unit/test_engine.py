from __future__ import annotations

from typing import Any

import pytest

from bunshin import engine
from bunshin.errors import ConfigError, EngineError


def test_choice() -> None:
    assert engine.choose("auto")[0] == "translator"
    assert engine.choose("translator")[0] == "translator"
    with pytest.raises(ConfigError, match="this version has no KVM engine"):
        engine.choose("kvm")
    with pytest.raises(ConfigError, match="'tcg' is unknown; there are: auto, translator"):
        engine.choose("tcg")


def test_native_errors_are_translated(native: Any) -> None:
    native.refuse = True
    with pytest.raises(EngineError) as caught:
        engine.create("translator", 1)
    assert caught.value.slug == "no-bmi2"
    assert str(caught.value) == "the host's processor lacks BMI2"
