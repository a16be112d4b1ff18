"""Every tensor that the library makes from nothing names its dtype: `torch.set_default_dtype` must not change a sum."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("lota", "recipes")
# Whose dtype is the default one, unless they are given integers.
MAKERS = {
    *("arange", "as_tensor", "asarray", "complex", "empty", "empty_strided", "eye", "full", "hann_window", "linspace"),
    *("logspace", "normal", "ones", "rand", "randn", "range", "scalar_tensor", "tensor", "zeros"),
}


def without_dtype(source: str) -> list[int]:
    """Lines of calls `torch.<maker>(...)` that leave the dtype to the default; `arange` of anything but float literals
    counts integers."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        is_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        if not is_torch or node.func.attr not in MAKERS or any(k.arg in ("dtype", "out") for k in node.keywords):
            continue
        is_float = any(isinstance(leaf, ast.Constant) and isinstance(leaf.value, float) for leaf in ast.walk(node))
        if node.func.attr != "arange" or is_float:
            found.append(node.lineno)
    return found


def test_every_buffer_names_its_dtype():
    files = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    assert len(files) > 50
    found = [f"{path.relative_to(ROOT)}:{line}" for path in files for line in without_dtype(path.read_text())]
    assert not found, "give dtype= to: " + ", ".join(found)


def test_what_is_found():
    assert without_dtype("torch.zeros(3)\ntorch.full((2,),\n 1.0)") == [1, 2]
    assert without_dtype("torch.arange(0, 1, 0.1)\ntorch.arange(n)\ntorch.tensor([1])") == [1, 3]
    assert not without_dtype("torch.zeros(3, dtype=torch.int32)\ntorch.zeros_like(x)\nx.new_zeros(3)\nnp.zeros(3)")
