"""What the guests of the benchmark are made of: an image, the yardstick, an /init.

An initramfs is a sequence of cpio archives and the kernel unpacks them one over
the other, so these guests are the image `tiny` with an archive behind it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from bunshin.images.cpio import Archive

HERE = Path(__file__).resolve().parent
OUT = HERE / "out"

BEGIN = "bench: begin"
END = "bench: end"

INIT = f"""#!/bin/busybox sh
export PATH=/usr/bin:/bin HOME=/tmp LC_ALL=C
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mount -t tmpfs tmp /tmp
dmesg -n 1
cd /tmp
echo {BEGIN}
. /script
echo {END}
poweroff -f
"""

APPEND = "console=ttyS0 quiet panic=-1 tsc=reliable"

REAL_PROGRAMS = ("gzip", "xz", "openssl", "dash", "/usr/bin/python3")
"""python3 by path: the one in PATH may be a virtual environment's."""
MERSENNE_PRIME = "7" + "F" * 550
"""2**2203 - 1: testing it does the same work every time, as making a key does not."""

REAL_SCRIPT = r"""
bench gen $MB > text
same() {
    if [ "$(sha256sum < text)" = "$(sha256sum < "$2")" ]; then echo "$1 ok sum"; else echo "$1 BAD sum"; fi
}
sum() { echo "$1 $(sha256sum | cut -c1-16) sum"; }
bench time gzip gzip -k text; gunzip -c text.gz > text.1; same gzip_roundtrip text.1; rm text.1
bench time gunzip gzip -dc text.gz
bench time xz xz -1 -k text; xz -dc text.xz > text.2; same xz_roundtrip text.2; rm text.2
bench time unxz xz -dc text.xz
cat text text text > big; rm text.gz text.xz
bench time openssl_sha openssl dgst -sha256 big
openssl dgst -sha256 -r big | cut -d' ' -f1 | sum openssl_sha
KEY=000102030405060708090a0b0c0d0e0f
bench time openssl_aes openssl enc -aes-128-cbc -K $KEY -iv $KEY -in big -out big.aes
sum openssl_aes < big.aes; rm big big.aes
bench time openssl_prime openssl prime -hex $PRIME
cat > loop.sh <<'END'
i=0; s=0
while [ $i -lt 200000 ]; do
    case $((i % 7)) in 0) s=$((s + i)) ;; 3) s=$((s ^ i)) ;; *) s=$((s + 1)) ;; esac
    i=$((i + 1))
done
echo $s
END
bench time sh_loop dash loop.sh
dash loop.sh | sum sh_loop
cat > work.py <<'END'
import hashlib, json, re, struct, zlib
data = open("text", "rb").read()[:1 << 20]
words = re.findall(rb"[a-z]+", data)
counts = {}
for word in words:
    counts[word.decode()] = counts.get(word.decode(), 0) + 1
state = 1
for i in range(300000):
    state = (state * 6364136223846793005 + i) % 2**64
packed = struct.pack("<Qd", state, sum(x**0.5 for x in range(100000)))
assert zlib.decompress(zlib.compress(data)) == data
print(hashlib.sha256(json.dumps(counts, sort_keys=True).encode() + packed).hexdigest())
END
bench time python3_start $PYTHON -S -c pass
bench time python3 $PYTHON -S work.py; $PYTHON -S work.py | sum python3
"""


class Unavailable(Exception):
    """Something that the benchmark needs is not on this host; the text says what to do."""


def build_bench() -> Path:
    """Compile the yardstick as one static program."""
    target = OUT / "bench"
    sources = [HERE / "bench.c", HERE / "io.c"]
    if target.exists() and all(target.stat().st_mtime > s.stat().st_mtime for s in sources):
        return target
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise Unavailable("no C compiler; apt-get install gcc libc6-dev")
    OUT.mkdir(exist_ok=True)
    command = [compiler, "-O2", "-static", "-o", str(target), *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"the yardstick does not compile:\n{done.stderr.strip()}")
    return target


class Overlay(Archive):
    """An archive that makes the directories its files need."""

    def __init__(self) -> None:
        super().__init__()
        self._known: set[str] = set()

    def put(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a file at an absolute path, once."""
        path = path.strip("/")
        if path in self._known:
            return
        parts = path.split("/")
        for depth in range(1, len(parts)):
            parent = "/".join(parts[:depth])
            if parent not in self._known:
                self._known.add(parent)
                self.directory(parent)
        self._known.add(path)
        self.file(path, data, mode)

    def copy(self, source: Path, path: str | None = None) -> None:
        """Copy a host file, by default to the same place."""
        executable = source.stat().st_mode & 0o111
        self.put(path or str(source), source.read_bytes(), 0o755 if executable else 0o644)


def initramfs(name: str, script: str, base: Path, real: bool = False) -> Path:
    """Write the initramfs of one section into `out` and return its path.

    Args:
        script: shell lines that the guest runs between BEGIN and END.
        base: an initramfs with /bin/busybox.
        real: put gzip, xz, openssl and python3 of the host into it.
    """
    overlay = Overlay()
    overlay.put("bin/bench", build_bench().read_bytes(), 0o755)
    overlay.put("init", INIT.encode(), 0o755)
    overlay.put("script", script.encode())
    if real:
        for program in REAL_PROGRAMS:
            _add_program(overlay, program)
    path = OUT / f"{name}.cpio"
    path.write_bytes(base.read_bytes() + overlay.finish())
    return path


def _add_program(overlay: Overlay, program: str) -> None:
    found = shutil.which(program)
    if found is None:
        raise Unavailable(f"{program} is not installed, so the guest cannot have it")
    real = Path(found).resolve()
    overlay.copy(real, f"/usr/bin/{Path(found).name}")
    _add_libraries(overlay, real)
    if "python" in program:
        where = [str(real), "-S", "-c", "import os, sys; print(os.path.dirname(os.__file__))"]
        library = Path(subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip())
        for package in ("", "collections", "encodings", "json", "re", "importlib", "lib-dynload"):
            for file in (library / package).iterdir():
                if file.suffix in {".py", ".so"} and file.is_file():
                    overlay.copy(file)
                    if file.suffix == ".so":
                        _add_libraries(overlay, file)


def _add_libraries(overlay: Overlay, program: Path) -> None:
    listing = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False)
    for path in re.findall(r"(?:=> |^\s*)(/\S+)", listing.stdout, re.MULTILINE):
        overlay.copy(Path(path))
