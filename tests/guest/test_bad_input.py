"""Bad input, from the user, the host and the guest: one sentence, a documented status.

The hostile guests are ELF files of a few bytes with a PVH entry (Xen note 18), which
starts in 32-bit protected mode with paging off. Machine code is written out by hand.
"""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from struct import pack

import pytest

Command = Callable[..., subprocess.CompletedProcess[bytes]]

USAGE, IMAGE, TRIPLE_FAULT, TIMEOUT = 2, 6, 5, 124
DOCUMENTED = {0, 2, 3, 4, 5, 6, 7, 124}
LOAD = 0x10_0000


def one_sentence(done: subprocess.CompletedProcess[bytes], *parts: str) -> None:
    """The last line is bunshin's only word (progress of an image may stand before it)."""
    text = done.stderr.decode()
    assert text.endswith("\n")
    said = [line for line in text.splitlines() if line.startswith("bunshin: ")]
    assert said == text.splitlines()[-1:], text
    for part in parts:
        assert part in said[0], text


# The user's ----------------------------------------------------------------------


def test_missing_kernel(command: Command, tmp_path: Path) -> None:
    done = command("run", "--kernel", str(tmp_path / "vmlinuz"))
    assert done.returncode == IMAGE
    one_sentence(done, str(tmp_path / "vmlinuz"), "No such file")


def test_directory_as_kernel(command: Command, tmp_path: Path) -> None:
    done = command("run", "--kernel", str(tmp_path))
    assert done.returncode == IMAGE
    one_sentence(done, str(tmp_path))


def test_text_file_as_kernel(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("This is no kernel.\n" * 100)
    done = command("run", "--kernel", str(path))
    assert done.returncode == IMAGE
    one_sentence(done, str(path), "expected")


@pytest.mark.parametrize("keep", [0, 1, 512, 0x210, 0x4000, 1 << 20, -1])
def test_truncated_kernel(command: Command, tmp_path: Path, tiny: dict[str, str], keep: int) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(Path(tiny["kernel"]).read_bytes()[:keep] if keep >= 0 else b"MZ" * 100_000)
    done = command("run", "--kernel", str(path))
    assert done.returncode == IMAGE
    one_sentence(done, str(path))


def test_damaged_kernel(command: Command, tmp_path: Path, tiny: dict[str, str]) -> None:
    data = bytearray(Path(tiny["kernel"]).read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4096] = random.Random(1).randbytes(4096)
    path = tmp_path / "vmlinuz"
    path.write_bytes(data)
    done = command("run", "--kernel", str(path), "--timeout", "5")
    # A flaw that the compression does not notice may reach the guest.
    assert done.returncode in {IMAGE, 3, 4, 5, TIMEOUT}


def test_missing_initrd(command: Command, tmp_path: Path, tiny: dict[str, str]) -> None:
    done = command("run", "--kernel", tiny["kernel"], "--initrd", str(tmp_path / "absent"))
    assert done.returncode == IMAGE
    one_sentence(done, str(tmp_path / "absent"), "No such file")


def test_initrd_larger_than_memory(command: Command, tmp_path: Path, tiny: dict[str, str]) -> None:
    path = tmp_path / "initrd"
    with path.open("wb") as file:
        file.truncate(200 << 20)  # a hole: it takes no room on the disk
    done = command("run", "--kernel", tiny["kernel"], "--initrd", str(path), "-m", "128M")
    assert done.returncode == USAGE
    one_sentence(done, str(path), "128 MiB")


def test_kernel_larger_than_memory(command: Command, tiny: dict[str, str]) -> None:
    done = command("run", "--kernel", tiny["kernel"], "-m", "16M")
    assert done.returncode == USAGE
    one_sentence(done, tiny["kernel"], "16")


@pytest.mark.parametrize("size", ["12Q", "1M", "0", "-1", "", "1e9", "9999999T", "half"])
def test_memory_that_cannot_be(command: Command, size: str) -> None:
    done = command("run", "--memory", size)
    assert done.returncode == USAGE
    one_sentence(done, "memory", size)


def test_more_memory_than_the_host_has(command: Command, tiny: dict[str, str]) -> None:
    done = command("run", "--memory", "32T", "--timeout", "20")
    assert done.returncode in {USAGE, 7, TIMEOUT}
    one_sentence(done)


def test_unknown_engine(command: Command) -> None:
    done = command("run", "--engine", "warp")
    assert done.returncode == USAGE
    one_sentence(done, "'warp'", "translator")


def test_unknown_image(command: Command) -> None:
    done = command("run", "huge")
    assert done.returncode == USAGE
    one_sentence(done, "'huge'", "tiny")


@pytest.mark.parametrize("words", [["run", "--cpus", "0"], ["run", "--frob"], ["walk"], []])
def test_usage(command: Command, words: list[str]) -> None:
    done = command(*words)
    assert done.returncode == USAGE
    assert done.stdout == b""
    assert done.stderr


# The host's ----------------------------------------------------------------------


def test_no_network(command: Command, tmp_path: Path) -> None:
    if not Path("/usr/bin/apt-get").exists():
        pytest.skip("there is no apt on this host whose network could be taken away")
    settings = tmp_path / "apt.conf"
    dead = "http://127.0.0.1:9"
    settings.write_text(
        f'Acquire::http::Proxy "{dead}";\nAcquire::https::Proxy "{dead}";\nAcquire::Retries "0";\n'
    )
    cache = tmp_path / "cache"
    env = {"BUNSHIN_CACHE": str(cache), "APT_CONFIG": str(settings), "http_proxy": dead}
    done = command("run", env={**env, "https_proxy": dead})
    assert done.returncode == IMAGE
    one_sentence(done, "--kernel")
    assert whole_or_absent(cache)


def test_no_apt(command: Command, tmp_path: Path) -> None:
    done = command("run", env={"BUNSHIN_CACHE": str(tmp_path / "cache"), "PATH": str(tmp_path)})
    assert done.returncode == IMAGE
    one_sentence(done, "apt", "--kernel", "--initrd")
    assert whole_or_absent(tmp_path / "cache")


@pytest.mark.parametrize("room", [0, 100_000, 1 << 20, 8 << 20])
def test_full_disk(command: Command, tmp_path: Path, room: int) -> None:
    """No file may grow beyond `room` bytes, which fails as a full disk does."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    cache = tmp_path / "cache"
    done = command("run", env={"BUNSHIN_CACHE": str(cache)}, preexec=limit)
    assert done.returncode == IMAGE
    one_sentence(done)
    assert whole_or_absent(cache)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_really_full_disk(command: Command, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this host does not allow to mount a small disk")
    try:
        done = command("run", env={"BUNSHIN_CACHE": str(disk / "cache")})
        assert done.returncode == IMAGE
        one_sentence(done)
        assert whole_or_absent(disk / "cache")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_cache_that_cannot_be_a_directory(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    done = command("run", env={"BUNSHIN_CACHE": str(tmp_path / "file" / "cache")})
    assert done.returncode == IMAGE
    one_sentence(done, str(tmp_path / "file"))


def whole_or_absent(cache: Path) -> bool:
    """No half-built image: nothing but lock files below the cache."""
    return [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"] == []


# The guest's ---------------------------------------------------------------------


def pvh(code: bytes) -> bytes:
    """A kernel whose 32-bit PVH entry is `code`, at gpa 1 MiB."""
    note = pack("<III4sI", 4, 4, 18, b"Xen\0", LOAD)
    headers = 64 + 2 * 56
    note_at, code_at = headers, 0x1000
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    elf = ident + pack("<HHIQQQIHHHHHH", 2, 62, 1, LOAD, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = pack("<IIQQQQQQ", 1, 7, code_at, LOAD, LOAD, len(code), len(code), 0x1000)
    notes = pack("<IIQQQQQQ", 4, 4, note_at, 0, 0, len(note), len(note), 4)
    return (elf + load + notes + note).ljust(code_at, b"\0") + code


class Run:
    """How a hostile guest's run went."""

    def __init__(self, path: Path, code: bytes, *words: str) -> None:
        path.write_bytes(pvh(code))
        command = [sys.executable, "-m", "bunshin.cli", "run", "--kernel", str(path), "-m", "64M"]
        log = path.with_suffix(".log")
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*command, *words], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE
            )
        assert process.stderr is not None
        self.stderr = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.stderr.close()
        process.returncode = self.returncode = os.waitstatus_to_exitcode(status)
        self.stdout = log.read_bytes()[:10_000]
        self.peak_mib = usage.ru_maxrss / 1024
        assert b"Traceback" not in self.stderr, self.stderr.decode()
        assert self.returncode in DOCUMENTED, self.stderr.decode()
        assert self.peak_mib < 300


@pytest.fixture
def hostile(tmp_path: Path) -> Callable[..., Run]:
    """Run machine code as a guest."""
    return lambda code, *words: Run(tmp_path / "guest", code, *words)


def out_string(text: bytes) -> bytes:
    """Code that prints: mov dx,0x3f8; then mov al,c; out dx,al for each."""
    return b"\x66\xba\xf8\x03" + b"".join(b"\xb0" + bytes([c]) + b"\xee" for c in text)


STOP = b"\xfa\xf4\xeb\xfc"  # cli; hlt; jmp back
NO_IDT = b"\x31\xc0\x50\x50\x0f\x01\x1c\x24"  # xor eax,eax; push eax; push eax; lidt [esp]
STACK = b"\xbc\x00\x00\x30\x00"  # mov esp,0x300000


def test_a_guest_that_prints(hostile: Callable[..., Run]) -> None:
    run = hostile(out_string(b"hello\n") + STOP, "--timeout", "2")
    assert run.stdout == b"hello\n"
    assert run.returncode == TIMEOUT


def test_triple_fault(hostile: Callable[..., Run]) -> None:
    run = hostile(STACK + NO_IDT + b"\x0f\x0b", "--timeout", "60")  # ud2
    assert run.returncode == TRIPLE_FAULT
    assert re.fullmatch(rb"bunshin: triple-fault: .+\n", run.stderr)


@pytest.mark.parametrize("target", [0xF000_0000, 0xFFFF_FFF0, 0x000A_0000, 0xFEE0_0000, 0x0400_0000])
def test_jump_into_nowhere(hostile: Callable[..., Run], target: int) -> None:
    run = hostile(STACK + NO_IDT + b"\xb8" + pack("<I", target) + b"\xff\xe0", "--timeout", "10")
    assert run.returncode in {TRIPLE_FAULT, 7, TIMEOUT}


def test_jump_to_zeroes_runs_off_the_end_of_memory(hostile: Callable[..., Run]) -> None:
    run = hostile(STACK + NO_IDT + b"\xb8\x00\x00\xf0\x03\xff\xe0", "--timeout", "30")
    assert run.returncode in {TRIPLE_FAULT, 7, TIMEOUT}


@pytest.mark.parametrize("seed", range(12))
def test_garbage(hostile: Callable[..., Run], seed: int) -> None:
    hostile(STACK + random.Random(seed).randbytes(1 << 16), "--timeout", "3")


def test_every_port_written_and_read(hostile: Callable[..., Run]) -> None:
    """For all ports: out 2, in, of each width; then an end that shows it came through.

    Bit 1 keeps the A20 gate open, below which the guest lies.
    """
    twos = b"\xb8\x02\x02\x02\x02"  # mov eax,0x02020202
    loop = (
        b"\x31\xc9"  # xor ecx,ecx
        b"\x89\xca"  # again: mov edx,ecx
        + (twos + b"\xee\xec")  # out dx,al; in al,dx
        + (twos + b"\x66\xef\x66\xed")  # out dx,ax; in ax,dx
        + (twos + b"\xef\xed")  # out dx,eax; in eax,dx
        + b"\x41\x81\xf9\x00\x00\x01\x00"  # inc ecx; cmp ecx,0x10000
        b"\x72\xde"  # jb again
    )
    run = hostile(STACK + loop + out_string(b"through\n") + NO_IDT + b"\x0f\x0b", "--timeout", "60")
    assert run.stdout.endswith(b"through\n")
    assert run.returncode == TRIPLE_FAULT


@pytest.mark.parametrize("value", [0x01, 0x55, 0xAA, 0xFE, 0xFF])
def test_every_port_written_with(hostile: Callable[..., Run], value: int) -> None:
    """Some port will turn the machine off or reset it; nothing else may happen."""
    loop = (
        b"\x31\xc9"  # xor ecx,ecx
        b"\x89\xca\xb8"  # again: mov edx,ecx; mov eax,value
        + pack("<I", value * 0x0101_0101)
        + b"\xee\xec\xef\xed"  # out dx,al; in al,dx; out dx,eax; in eax,dx
        b"\x41\x81\xf9\x00\x00\x01\x00"  # inc ecx; cmp ecx,0x10000
        b"\x72\xec"  # jb again
    )
    run = hostile(STACK + loop + NO_IDT + b"\x0f\x0b", "--timeout", "60")
    assert run.returncode in {0, 3, 4, 5}


def test_string_output_to_every_port(hostile: Callable[..., Run]) -> None:
    loop = (
        # A string of bytes that leave the A20 gate open:
        b"\xbf\x00\x00\x20\x00\xb8\x02\x02\x02\x02"  # mov edi,0x200000; mov eax,0x02020202
        b"\xb9\x08\x00\x00\x00\xf3\xab"  # mov ecx,8; rep stosd
        b"\x31\xdb"  # xor ebx,ebx
        b"\x89\xda"  # again: mov edx,ebx
        b"\xbe\x00\x00\x20\x00\xbf\x00\x00\x28\x00"  # mov esi,0x200000; mov edi,0x280000
        b"\xb9\x08\x00\x00\x00\xf3\x6f"  # mov ecx,8; rep outsd
        b"\xb9\x08\x00\x00\x00\xf3\x6d"  # mov ecx,8; rep insd
        b"\x43\x81\xfb\x00\x00\x01\x00"  # inc ebx; cmp ebx,0x10000
        b"\x72\xdd"  # jb again
    )
    run = hostile(STACK + loop + out_string(b"through\n") + NO_IDT + b"\x0f\x0b", "--timeout", "90")
    assert run.stdout.endswith(b"through\n")
    assert run.returncode == TRIPLE_FAULT


def test_everywhere_outside_memory(hostile: Callable[..., Run]) -> None:
    """Loads and stores through the whole address space above RAM, 1 MiB + 4 apart."""
    loop = (
        b"\xbb\x00\x00\x00\x04"  # mov ebx,0x4000000
        b"\x8b\x03\x89\x03"  # again: mov eax,[ebx]; mov [ebx],eax
        b"\x81\xc3\x04\x00\x10\x00"  # add ebx,0x100004
        b"\x73\xf4"  # jnc again
    )
    run = hostile(STACK + loop + out_string(b"through\n") + NO_IDT + b"\x0f\x0b", "--timeout", "60")
    assert run.stdout == b"through\n"
    assert run.returncode == TRIPLE_FAULT


def test_endless_output_is_a_timeout(hostile: Callable[..., Run]) -> None:
    run = hostile(b"\x66\xba\xf8\x03\xb0\x2e\xee\xeb\xfd", "--timeout", "2")  # out dx,al; jmp
    assert run.stdout[:100] == b"." * 100
    assert run.returncode == TIMEOUT


@pytest.mark.parametrize("code", [b"\xeb\xfe", STOP, b"\xf3\x90\xeb\xfc"])
def test_a_guest_that_hangs_is_ended_by_a_signal(tmp_path: Path, code: bytes) -> None:
    path = tmp_path / "guest"
    path.write_bytes(pvh(out_string(b"up\n") + code))
    process = subprocess.Popen(
        [sys.executable, "-m", "bunshin.cli", "run", "--kernel", str(path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert time.monotonic() - began < 20
    process.stdout.close()
