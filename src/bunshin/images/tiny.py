"""`tiny`: the distribution's kernel and an initramfs with a static busybox.

The kernel is kept unpacked, ready for its PVH entry, so that no start has to unpack
it. It boots to a root shell on the console and powers off when that shell ends. The
kernel's pvpanic driver is in it, so a panic ends the run as a panic.

The initramfs is not compressed: the guest would have to unpack it, and two megabytes
are nothing to the host.
"""

from __future__ import annotations

import os
import re

from ..boot import kernel_image
from ..errors import ImageError
from . import apt, deb
from .cache import HINT
from .cpio import Archive
from .progress import Progress

RECIPE = 2
"""Raise it when what is built here changes."""
KERNELS = (
    "linux-image-cloud-amd64",
    "linux-image-amd64",
    "linux-image-virtual",
    "linux-image-generic",
)
"""Packages that depend on the newest kernel of its kind: Debian's, then Ubuntu's."""
APPEND = "console=ttyS0 quiet panic=-1 tsc=reliable"
"""A quiet boot; after a panic no wait; the host's time-stamp counter needs no watchdog."""
MODULES = ("pvpanic", "pvpanic-mmio")

INIT = """\
#!/bin/sh
# The first process: mounts what a shell expects, gives one, powers off after it.
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts
mount -t devpts devpts /dev/pts
mount -t tmpfs tmp /tmp
hostname tiny
ip link set lo up
# Input that comes faster than it is read waits outside instead of being lost.
stty crtscts
for module in %(modules)s; do
    [ -f /lib/$module.ko ] && insmod /lib/$module.ko
done
export HOME=/root USER=root PS1='\\h:\\w\\$ '
cd /root
echo "Linux $(uname -r) on tiny, made by bunshin. Leaving the shell powers off."
setsid cttyhack sh
poweroff -f
"""


def build(directory: str, progress: Progress) -> dict[str, str]:
    """Make `kernel` and `initrd` in `directory`.

    Raises:
        ImageError: no apt, no network, or a package that is not as expected.
    """
    progress.step("asking apt for a kernel and busybox")
    kernel_package = _kernel_package(progress)
    busybox_package = _package("busybox-static", progress)
    work = os.path.join(directory, "packages")
    os.mkdir(work)
    kernel_deb = apt.download(kernel_package, work, progress)
    busybox_deb = apt.download(busybox_package, work, progress)

    progress.step(f"unpacking {kernel_package.name}")
    kernel, modules = _kernel_files(kernel_deb, kernel_package.length, progress)
    busybox = _only(busybox_deb, r"(usr/)?bin/busybox", "busybox")
    os.remove(kernel_deb)
    os.remove(busybox_deb)
    os.rmdir(work)

    progress.step("making the initramfs")
    _write(os.path.join(directory, "kernel"), _unpacked(kernel))
    _write(os.path.join(directory, "initrd"), initramfs(busybox, modules))
    packages = f"{_title(kernel_package)}, {_title(busybox_package)}"
    progress.line(f"ready, made from {packages}")
    return {"append": APPEND, "source": packages}


def initramfs(busybox: bytes, modules: dict[str, bytes]) -> bytes:
    """The archive: busybox under all its names, kernel modules, `/init`.

    Raises:
        ImageError: the busybox binary has no list of its applets.
    """
    archive = Archive()
    for name in ("bin", "dev", "etc", "lib", "proc", "root", "run", "sys", "tmp", "var"):
        archive.directory(name)
    for name in ("sbin", "usr"):
        archive.link(name, "bin" if name == "sbin" else ".")
    archive.character_device("dev/console", 5, 1)
    archive.character_device("dev/null", 1, 3, 0o666)
    archive.file("bin/busybox", busybox, 0o755)
    for applet in applets(busybox):
        if applet != "busybox":
            archive.link(f"bin/{applet}", "busybox")
    archive.file("etc/passwd", b"root::0:0:root:/root:/bin/sh\n")
    archive.file("etc/group", b"root:x:0:\n")
    for name, data in modules.items():
        archive.file(f"lib/{name}.ko", data)
    archive.file("init", (INIT % {"modules": " ".join(modules)}).encode(), 0o755)
    return archive.finish()


def applets(busybox: bytes) -> list[str]:
    """The names a busybox binary answers to: NUL-separated and sorted inside it."""
    start = busybox.find(b"\0[\0[[\0")
    end = busybox.find(b"\0\0", start + 1)
    names = busybox[start + 1 : end].decode("ascii", "replace").split("\0")
    if start < 0 or "sh" not in names or not all(re.fullmatch(r"[\w\[.-]+", n) for n in names):
        raise ImageError("image-busybox", f"image tiny: busybox has no list of applets; {HINT}")
    return names


def _kernel_package(progress: Progress) -> apt.Package:
    for meta in KERNELS:
        found = apt.show(meta)
        match = found and re.search(r"\b(linux-image-\d[\w.+-]*)", found.depends)
        package = apt.show(match[1]) if match else None
        if package is not None:
            return package
    if apt.refresh(progress):
        return _kernel_package(progress)
    raise ImageError(
        "image-no-package",
        f"image tiny: apt knows none of {', '.join(KERNELS)} (apt-get update may help); {HINT}",
    )


def _package(name: str, progress: Progress) -> apt.Package:
    found = apt.show(name)
    if found is None and apt.refresh(progress):
        found = apt.show(name)
    if found is None:
        raise ImageError(
            "image-no-package",
            f"image tiny: apt knows no {name} (apt-get update may help); {HINT}",
        )
    return found


def _kernel_files(path: str, length: int, progress: Progress) -> tuple[bytes, dict[str, bytes]]:
    """The kernel and the wanted modules; stops reading when it has them all."""
    read = 0

    def seen(count: int) -> None:
        nonlocal read
        read += count
        progress.part(read / length)

    kernel = b""
    modules: dict[str, bytes] = {}
    pattern = re.compile(rf"(?:usr/)?lib/modules/.*/({'|'.join(MODULES)})\.ko(\.xz|\.zst|\.gz)?")
    for name, data in deb.files(
        path, lambda name: bool(name.startswith("boot/vmlinuz") or pattern.fullmatch(name)), seen
    ):
        match = pattern.fullmatch(name)
        if match:
            modules[match[1]] = _unpack(data, match[2])
        else:
            kernel = data
        if kernel and len(modules) == len(MODULES):
            break
    if not kernel:
        raise ImageError("image-kernel", f"image tiny: {path} has no boot/vmlinuz; {HINT}")
    return kernel, {name: modules[name] for name in MODULES if name in modules}


def _unpacked(kernel: bytes) -> bytes:
    """The vmlinux in a bzImage; the bzImage itself where there is none that boots."""
    try:
        image = kernel_image.parse(kernel, "vmlinuz")
        if isinstance(image, kernel_image.BzImage):
            vmlinux = kernel_image.decompress(image.payload, "vmlinuz")
            if kernel_image.parse_elf(vmlinux, "vmlinuz").pvh_entry is not None:
                return vmlinux
    except ImageError:
        pass  # `start` will say what is wrong with it
    return kernel


def _unpack(data: bytes, suffix: str | None) -> bytes:
    if suffix == ".xz":
        import lzma

        return lzma.decompress(data)
    if suffix == ".zst":
        import zstandard

        return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    if suffix == ".gz":
        import gzip

        return gzip.decompress(data)
    return data


def _only(path: str, pattern: str, what: str) -> bytes:
    for _, data in deb.files(path, lambda name: re.fullmatch(pattern, name) is not None):
        return data
    raise ImageError("package", f"package {path}: has no {what}; {HINT}")


def _title(package: apt.Package) -> str:
    return f"{package.name} {package.version}"


def _write(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
