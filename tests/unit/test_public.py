from __future__ import annotations

import subprocess
import sys

import pytest

import bunshin

PUBLIC = {
    "BunshinError", "ConfigError", "Console", "Device", "EngineError", "GuestError",
    "ImageError", "IrqLine", "Machine", "Outcome", "StateError", "Timeout", "__version__",
    "images", "parse_size",
}  # fmt: skip


def test_public_names_are_pinned() -> None:
    assert set(bunshin.__all__) == PUBLIC
    assert set(dir(bunshin)) == PUBLIC
    for name in PUBLIC:
        assert getattr(bunshin, name) is not None


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="Hypervisor"):
        _ = bunshin.Hypervisor


def test_import_is_light() -> None:
    heavy = {"asyncio", "argparse", "subprocess", "dataclasses", "bunshin.machine", "bunshin._native"}
    code = f"import sys, bunshin; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
