"""What machine code says of a kernel: registers, bytes spilled, and which instructions it has.

Instructions of one kind share the lowest 12 bits of their 128-bit words. So a kernel is not disassembled (up to a
second each): one instruction of every kind is kept (`samples`), and those of all kernels together go through nvdisasm
once per architecture (`mnemonics`).

Rejected: a table of the bit patterns of tensor-core instructions; it would have to be believed, and grows with every
architecture.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

TENSOR_CORE = re.compile(r"(HGMMA|HMMA|IMMA|QGMMA)\b")
_KIND = 0xFFF
_INSTRUCTION = 16
"""Bytes of an instruction."""


def tool(name: str, *arguments: str) -> str:
    """What a tool of the CUDA toolkit, or of Triton's package, prints. Raises `RuntimeError` where it fails."""
    import triton

    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    command = str(own) if own.is_file() else shutil.which(name)
    if command is None:
        raise RuntimeError(f"{name} is neither in Triton's package nor on the path")
    result = subprocess.run([command, *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{name}: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout


def registers(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack, which are bytes spilled) of a cubin with one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError("cuobjdump says nothing of registers")
    return int(found[1]), int(found[2])


def kernel_code(cubin: bytes) -> Iterator[tuple[str, bytes]]:
    """(mangled name, instructions) of every kernel of a cubin, which is a 64-bit ELF file."""
    if cubin[:4] != b"\x7fELF":
        return
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    heads = [struct.unpack_from("<IIQQQQ", cubin, table + k * size) for k in range(count)]
    for name, _, _, _, offset, length in heads:
        start = heads[names][4] + name
        text = cubin[start : cubin.index(b"\0", start)].decode()
        if text.startswith(".text."):
            yield text.removeprefix(".text."), cubin[offset : offset + length]


def samples(code: bytes) -> dict[int, str]:
    """The first instruction of every kind, as hexadecimal digits."""
    first: dict[int, int] = {}
    for k, (low,) in enumerate(struct.iter_unpack("<Q8x", code)):
        first.setdefault(low & _KIND, k)
    return {kind: code[_INSTRUCTION * k : _INSTRUCTION * (k + 1)].hex() for kind, k in first.items()}


def mnemonics(found: Mapping[int, str], arch: int) -> dict[int, str]:
    """What the instructions of `samples` are called on sm_`arch`."""
    if not found:
        return {}
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(bytes.fromhex(word) for word in found.values()))
        file.flush()
        text = tool("nvdisasm", "-b", f"SM{architecture(arch)}", "-ndf", file.name)
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text)
    if len(lines) != len(found):
        raise RuntimeError(f"nvdisasm gave {len(lines)} of {len(found)} instructions")
    return dict(zip(found, lines, strict=True))


def architecture(arch: int) -> str:
    """The name of machine code for sm_`arch` with everything that it alone has: 80, 90a."""
    return f"{arch}a" if arch >= 90 else str(arch)


def tensor_core(kinds: Iterable[int], names: Mapping[int, str]) -> str:
    """The tensor-core instruction among `kinds`, or "-"."""
    found = (TENSOR_CORE.match(names.get(kind, "")) for kind in kinds)
    return next((match[1] for match in found if match), "-")
