"""Reentrant activation checkpointing whose inputs need no gradient: it would give its own weights none either.

With frozen embeddings nothing before the first trained weight needs a gradient. A reentrant checkpoint (torch's with
`use_reentrant=True`, DeepSpeed's) computes its gradients only where one of its inputs needs one. Asking the embeddings
for it, as is usual, makes backward run through every frozen layer below the first trained one, whatever kind of
checkpointing there is. So the checkpoints themselves ask, when they are called.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.checkpoint
from deepspeed.runtime.activation_checkpointing import checkpointing as deepspeed_checkpointing

_HOMES: tuple[Any, ...] = (torch.utils.checkpoint, deepspeed_checkpointing)
"""Modules whose `checkpoint` looks `CheckpointFunction` up when it is called."""


class AskingCheckpoints:
    """From now until `restore`, every reentrant checkpoint asks for the gradient of its first input."""

    def __init__(self) -> None:
        self._saved = [(home, home.CheckpointFunction) for home in _HOMES]
        for home, function in self._saved:
            home.CheckpointFunction = _asking(function)

    def restore(self) -> None:
        for home, function in self._saved:
            home.CheckpointFunction = function
        self._saved = []


def _asking(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    class Asking(function):  # type: ignore[misc,valid-type]
        @classmethod
        def apply(cls, *args: Any) -> Any:
            return function.apply(*_with_a_gradient(args))

    return Asking


def _with_a_gradient(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """args: some that need a gradient. Where none does, the first floating-point tensor, which is the hidden state by
    convention, comes in its place as a leaf that needs one; attention kernels refuse masks that need a gradient."""
    tensors = [(place, arg) for place, arg in enumerate(args) if isinstance(arg, torch.Tensor)]
    floating = [place for place, arg in tensors if arg.is_floating_point()]
    if not torch.is_grad_enabled() or not floating or any(arg.requires_grad for _, arg in tensors):
        return args
    first = floating[0]
    return (*args[:first], args[first].detach().requires_grad_(), *args[first + 1 :])


def is_known(function: Any) -> bool:
    """Whether a model's checkpointing function is torch's or DeepSpeed's, which are taken care of here."""
    while hasattr(function, "func"):  # functools.partial
        function = function.func
    return any(function is getattr(home, "checkpoint") for home in _HOMES)  # noqa: B009
