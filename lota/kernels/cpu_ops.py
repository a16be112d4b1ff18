"""Compiled C versions of the operations with an index, in the order of `reference.py`; fp16 sums run on plain torch.

`cpu_kernels.c` is compiled when it is first used, which takes a fraction of a second, and kept in the user's cache
directory under a name that depends on the source, the flags, the compiler and the processor. torch.compile gives the
same bits from the reference, but took 18 s for its first kernel, seconds for every further combination of dtypes, and
twice as long to run.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lota.kernels import reference
from lota.kernels.index import TileIndex
from lota.kernels.pull import Pull
from lota.kernels.reference import mask_op, popcount, squared_norm

__all__ = [
    "adamw_",
    "exchange_",
    "gather",
    "gather_add_",
    "library",
    "mask_op",
    "popcount",
    "pull_",
    "rmsprop_",
    "scatter_",
    "scatter_add_",
    "squared_norm",
]

SOURCE = Path(__file__).with_name("cpu_kernels.c")
# Contracting a multiplication and an addition would change bits; errno keeps sqrtf from being one instruction.
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-std=gnu11", "-shared", "-fPIC")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def gather(
    out: Tensor, source: Tensor, index: TileIndex, scale: Tensor | None, start: int, stop: int, origin: int
) -> None:
    if out.dtype != torch.float32 or source.dtype not in _DTYPES:
        reference.gather(out, source, index, scale, start, stop, origin)
    else:
        _gather(out, source, index, scale, None, start, stop, origin, is_sum=False)


def gather_add_(
    out: Tensor,
    source: Tensor,
    index: TileIndex,
    scale: Tensor | None,
    squares: Tensor | None,
    start: int,
    stop: int,
    origin: int,
) -> None:
    if out.dtype != torch.float32 or source.dtype not in _DTYPES:
        reference.gather_add_(out, source, index, scale, squares, start, stop, origin)
    else:
        _gather(out, source, index, scale, squares, start, stop, origin, is_sum=True)


def scatter_(target: Tensor, index: TileIndex, values: Tensor) -> None:
    if values.dtype == target.dtype:
        _move(target, index, values, is_swap=False)
    elif target.dtype not in _DTYPES or values.dtype not in _DTYPES:
        reference.scatter_(target, index, values)
    else:
        _scatter(target, index, values, None, None)


def exchange_(target: Tensor, index: TileIndex, values: Tensor) -> None:
    _move(target, index, values, is_swap=True)


def scatter_add_(target: Tensor, index: TileIndex, delta: Tensor, alpha: Tensor, saved: Tensor | None) -> None:
    if target.dtype not in _DTYPES or delta.dtype not in _DTYPES:
        reference.scatter_add_(target, index, delta, alpha, saved)
    else:
        _scatter(target, index, delta, alpha, saved)


def adamw_(
    weights: Tensor,
    gradient: Tensor,
    index: TileIndex,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    compact: bool,
    rounding: Tensor | None,
    origin: int,
    pull: Pull | None,
) -> None:
    if weights.dtype not in _DTYPES or gradient.dtype not in _DTYPES or not _has_kernel(pull):
        arguments = (master, exp_avg, exp_avg_sq, scalars, beta1, beta2, eps, compact, rounding, origin, pull)
        reference.adamw_(weights, gradient, index, *arguments)
        return
    library().lota_adamw(
        weights.data_ptr(),
        _DTYPES[weights.dtype],
        gradient.data_ptr(),
        _DTYPES[gradient.dtype],
        compact,
        _index(index),
        index.num_active,
        master.data_ptr(),
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        scalars.data_ptr(),
        1 - beta1,
        beta2,
        1 - beta2,
        eps,
        None if rounding is None else rounding.data_ptr(),
        origin,
        _pull(pull),
        torch.get_num_threads(),
    )


def rmsprop_(
    weights: Tensor,
    gradient: Tensor,
    index: TileIndex,
    master: Tensor,
    square_avg: Tensor,
    scalars: Tensor,
    alpha: float,
    eps: float,
    compact: bool,
    rounding: Tensor | None,
    origin: int,
    pull: Pull | None,
) -> None:
    if weights.dtype not in _DTYPES or gradient.dtype not in _DTYPES or not _has_kernel(pull):
        arguments = (master, square_avg, scalars, alpha, eps, compact, rounding, origin, pull)
        reference.rmsprop_(weights, gradient, index, *arguments)
        return
    library().lota_rmsprop(
        weights.data_ptr(),
        _DTYPES[weights.dtype],
        gradient.data_ptr(),
        _DTYPES[gradient.dtype],
        compact,
        _index(index),
        index.num_active,
        master.data_ptr(),
        square_avg.data_ptr(),
        scalars.data_ptr(),
        alpha,
        1 - alpha,
        eps,
        None if rounding is None else rounding.data_ptr(),
        origin,
        _pull(pull),
        torch.get_num_threads(),
    )


def pull_(master: Tensor, pull: Pull, skip: Tensor | None) -> None:
    if not _has_kernel(pull):
        reference.pull_(master, pull, skip)
        return
    library().lota_pull(
        master.data_ptr(),
        master.numel(),
        _pull(pull),
        None if skip is None else skip.data_ptr(),
        torch.get_num_threads(),
    )


def _gather(
    out: Tensor,
    source: Tensor,
    index: TileIndex,
    scale: Tensor | None,
    squares: Tensor | None,
    start: int,
    stop: int,
    origin: int,
    is_sum: bool,
) -> None:
    library().lota_gather(
        out.data_ptr(),
        source.data_ptr(),
        _DTYPES[source.dtype],
        _index(index),
        None if scale is None else scale.data_ptr(),
        None if squares is None else squares.data_ptr(),
        is_sum,
        start,
        stop,
        origin,
        torch.get_num_threads(),
    )


def _move(target: Tensor, index: TileIndex, values: Tensor, is_swap: bool) -> None:
    library().lota_move(
        target.data_ptr(),
        target.element_size(),
        _index(index),
        index.num_active,
        values.data_ptr(),
        is_swap,
        torch.get_num_threads(),
    )


def _scatter(target: Tensor, index: TileIndex, values: Tensor, alpha: Tensor | None, saved: Tensor | None) -> None:
    library().lota_scatter(
        target.data_ptr(),
        _DTYPES[target.dtype],
        _index(index),
        index.num_active,
        values.data_ptr(),
        _DTYPES[values.dtype],
        None if alpha is None else alpha.data_ptr(),
        None if saved is None else saved.data_ptr(),
        torch.get_num_threads(),
    )


class _Index(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("offset", ctypes.c_void_p), ("is_narrow", ctypes.c_int64))


def _index(index: TileIndex) -> _Index:
    return _Index(index.base.data_ptr(), index.offset.data_ptr(), index.offset.dtype == torch.int16)


class _Pull(ctypes.Structure):
    _fields_ = (
        ("old", ctypes.c_void_p),
        ("importance", ctypes.c_void_p),
        ("rate", ctypes.c_void_p),
        ("old_dtype", ctypes.c_int),
        ("importance_dtype", ctypes.c_int),
    )


def _has_kernel(pull: Pull | None) -> bool:
    return pull is None or pull.old.dtype in _DTYPES


def _pull(pull: Pull | None) -> Any:
    """A pointer to the pull as C has it, or a null one."""
    if pull is None:
        return None
    pointers = (tensor.data_ptr() for tensor in pull)
    return ctypes.byref(_Pull(*pointers, _DTYPES[pull.old.dtype], _DTYPES[pull.importance.dtype]))


@functools.cache
def library() -> Any:
    """The compiled kernels, or None where they cannot be compiled or loaded. Ranks may call this at the same time."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang"))), None)
    if compiler is None or sys.platform == "win32":
        return None
    for flags in ((*FLAGS, "-fopenmp"), FLAGS):
        try:
            path = _compiled(compiler, flags)
            loaded = ctypes.CDLL(str(path))
        except (OSError, RuntimeError, subprocess.CalledProcessError):
            continue  # no OpenMP (Apple's clang), no home (RuntimeError) or cache that can be written and loaded from
        _declare(loaded)
        return loaded
    return None


def _declare(loaded: Any) -> None:
    """The functions' arguments, in the order of the C source."""
    pointer, integer, number, count = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    pull = ctypes.POINTER(_Pull)
    step: list[Any] = [pointer, count, pointer, count, count, _Index, integer]
    arguments: dict[str, list[Any]] = {
        "lota_adamw": [*step, *[pointer] * 4, *[number] * 4, pointer, integer, pull, count],
        "lota_rmsprop": [*step, *[pointer] * 3, *[number] * 3, pointer, integer, pull, count],
        "lota_pull": [pointer, integer, pull, pointer, count],
        "lota_gather": [pointer, pointer, count, _Index, pointer, pointer, count, *[integer] * 3, count],
        "lota_move": [pointer, count, _Index, integer, pointer, count, count],
        "lota_scatter": [pointer, count, _Index, integer, pointer, count, pointer, pointer, count],
    }
    for name, types in arguments.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = types, None


def _compiled(compiler: str, flags: tuple[str, ...]) -> Path:
    """Path of the shared library, compiled if it is not in the cache; appears there by one rename."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(SOURCE.read_bytes() + version + repr((compiler, flags, _processor())).encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lota"
    path = folder / f"cpu_kernels-{key[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary) / path.name
            subprocess.run([compiler, str(SOURCE), *flags, "-o", str(made), "-lm"], capture_output=True, check=True)
            os.replace(made, path)
    return path


def _processor() -> str:
    """What `-march=native` depends on: nodes that share a home directory may differ."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            kept = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
        return "".join(sorted(set(kept)))
    except OSError:
        return platform.processor() + platform.machine()
