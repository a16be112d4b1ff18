"""Compile Triton kernels for GPUs that are not here, and read registers, spills and access widths from the machine
code.

Pointers are marked as divisible by 16, as a launch marks those of whole tensors.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lota.kernels import TILE
from lota.kernels.triton_ops import OPTIONS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Machine:
    """What a kernel became: registers a thread, spilled ones, 16-byte loads and stores in its code."""

    registers: int
    spills: int
    wide_loads: int
    wide_stores: int


def compile_for(kernel: Any, types: dict[str, str], constants: dict[str, Any], target: str) -> Machine:
    """types: Triton's names of the arguments' types; constants: the constexpr arguments but TILE."""
    constants = ({"TILE": TILE} if "TILE" in kernel.arg_names else {}) | constants
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    pointers = {
        (number,): [["tt.divisibility", 16]]
        for number, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=pointers)
    compiled = triton.compile(source, target=TARGETS[target], options=dict(OPTIONS))
    return _read_hip(compiled.asm["amdgcn"]) if target.startswith("gfx") else _read_cuda(compiled.asm["cubin"])


def _read_cuda(cubin: bytes) -> Machine:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        command = [str(CUOBJDUMP), "--dump-sass", "--dump-resource-usage", path]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage, text[:500]
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", text)
    counts = Counter(name.replace(".E", "") for name in names)
    spills = sum(count for name, count in counts.items() if name.startswith(("LDL", "STL")))
    return Machine(int(usage[1]), spills, *_wide(counts))


def _read_hip(assembly: str) -> Machine:
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    spills = re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    assert registers and spills, assembly[:500]
    counts = Counter(re.findall(r"^\s+((?:global|buffer)_\w+)", assembly, re.MULTILINE))
    return Machine(int(registers[1]), int(spills[1]), *_wide(counts))


def _wide(counts: Counter[str]) -> tuple[int, int]:
    """Loads and stores of 16 bytes, whatever cache hints their names carry."""
    loads = [n for name, n in counts.items() if re.match(r"LDG\b.*\.128|(global|buffer)_load_dwordx4", name)]
    stores = [n for name, n in counts.items() if re.match(r"STG\b.*\.128|(global|buffer)_store_dwordx4", name)]
    return sum(loads), sum(stores)
