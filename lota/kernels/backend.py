"""Which implementation runs an operation: Triton on a GPU, C on a CPU, plain torch anywhere.

`auto` takes Triton for CUDA and ROCm devices where it is installed, compiled C for CPUs that have a compiler, and plain
torch otherwise. All of them give the same bits for the same input, so the choice is one of speed and holds for the
whole process: autograd runs hooks on threads of its own, where nothing that belongs to a thread would be seen.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lota.choices import KERNELS, check_choice
from lota.kernels import cpu_ops, reference

_logger = logging.getLogger("lota.kernels")
_choice = "auto"
_logged: set[str] = set()


@contextmanager
def using(choice: str, device: torch.device | str | None = None) -> Iterator[None]:
    """Run operations on `choice` (auto, torch, triton) until the end of the block, in all threads.

    device: where the operations will run; a forced choice that cannot run there raises ValueError at once instead of at
    the first operation.
    """
    global _choice
    check_choice("kernels", choice, KERNELS)
    if choice == "triton" and device is not None:
        _check_triton(torch.device(device))
    before, _choice = _choice, choice
    try:
        yield
    finally:
        _choice = before


def backend(device: torch.device) -> Any:
    """The module that runs operations on tensors of `device`; its functions are those of `reference`."""
    if _choice == "torch":
        return _log("torch", reference)
    if _choice == "triton":
        _check_triton(device)
    elif device.type == "cpu":
        return _log("c", cpu_ops) if cpu_ops.library() is not None else _log("torch", reference)
    elif device.type != "cuda" or not has_triton():
        return _log("torch", reference)
    from lota.kernels import triton_ops

    return _log("triton", triton_ops)


def backend_name(device: torch.device) -> str:
    """What `backend` gives for `device`: triton, c or torch."""
    module = str(backend(device).__name__).rsplit(".", 1)[-1]
    return {"triton_ops": "triton", "cpu_ops": "c", "reference": "torch"}[module]


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _check_triton(device: torch.device) -> None:
    if not has_triton():
        raise ValueError("kernels='triton' needs the package triton, which is not installed; use 'auto' or 'torch'")
    # The interpreter (read when triton is imported) is for tests: `auto` never takes it.
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"kernels='triton' needs tensors on a CUDA or ROCm device, got {device.type}; use 'auto' or 'torch'"
        )


def _log(name: str, module: Any) -> Any:
    if name not in _logged:
        _logged.add(name)
        _logger.info("operations run on %s (kernels=%s)", name, _choice)
    return module
