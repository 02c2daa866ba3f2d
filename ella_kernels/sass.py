"""Instructions in the loops of a compiled kernel: what a step costs where no GPU can time it.

A multiprocessor of an NVIDIA GPU issues one instruction a clock for each of its four schedulers, so a step of a program
with four warps takes at least as many clocks as its loop has instructions, or as its matrix instructions need.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import NamedTuple

__all__ = ["Loop", "cuobjdump", "inner_loops"]

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*([^;]*);")
_MATRIX = ("HGMMA", "HMMA", "DMMA", "QGMMA")
# Shorter loops wait for something or clear something.
_LEAST = 40


class Loop(NamedTuple):
    """One innermost loop: how many instructions, and how many of them are matrix products."""

    instructions: int
    matrix: int


def cuobjdump(cubin: bytes, option: str) -> str:
    """What the disassembler that Triton ships says of a cubin: "-sass" its code, "--dump-resource-usage" its needs."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def inner_loops(sass: str) -> list[Loop]:
    """Loops of ``sass`` that hold no other loop, in the order of the code; shorter than 40 instructions are left out.

    >>> body = "".join(f"/*{16 * i:04x}*/ FFMA R0, R0, R0, R0 ;" for i in range(50))
    >>> inner_loops(body + "/*0320*/ @P0 BRA 0x0 ;")
    [Loop(instructions=51, matrix=0)]
    """
    code = [(int(address, 16), operation, rest) for address, operation, rest in _LINE.findall(sass)]
    index = {address: i for i, (address, _, _) in enumerate(code)}
    spans = []
    for i, (address, operation, rest) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", rest)
        if operation.split(".")[0] == "BRA" and target and int(target[1], 16) < address:
            spans.append((index[int(target[1], 16)], i))
    spans = [(first, last) for first, last in spans if last - first + 1 >= _LEAST]
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [
        Loop(last - first + 1, sum(op.split(".")[0] in _MATRIX for _, op, _ in code[first : last + 1]))
        for first, last in inner
    ]
