"""`bunshin symbols`: what a debugger needs to know of a stock kernel."""

import os
import sys

from . import status
from .options import Option, Values, Verb

DEFAULT = "vmlinux.sym"

VERB = Verb(
    "symbols",
    "Write a file for GDB with the symbols that a stock kernel carries for its own "
    "backtraces, and how to unwind its stacks. KERNEL is a bzImage, an uncompressed ELF "
    "vmlinux, or the name of an image; the default is 'tiny'.",
    operands=("KERNEL",),
    options=(Option(("--output", "-o"), "FILE", f"Write this file; the default is {DEFAULT}, here."),),
    notes="""\
Then, with a guest that was started by 'bunshin run -s' or '-s -S':
  gdb -ex 'target remote :1234' vmlinux.sym""",
)


def main(values: Values) -> int:
    """Write the file."""
    from bunshin import images
    from bunshin.boot import symbol_file

    name = values.operands[0] if values.operands else "tiny"
    path = name if os.path.exists(name) or os.sep in name else images.get(name).kernel
    data = symbol_file.write(path)
    target = values.output or DEFAULT
    with open(target, "wb") as file:
        file.write(data)
    print(f"{target}: {len(data) >> 20} MiB; gdb -ex 'target remote :1234' {target}", file=sys.stderr)
    return status.OK
