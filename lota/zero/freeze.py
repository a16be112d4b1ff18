"""What a block changes on the caller's model while it lasts, and puts back at its end."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from deepspeed.utils import get_z3_leaf_modules
from torch import Tensor

from lota.zero.deepspeed.reentrant import AskingCheckpoints, is_known
from lota.zero.deepspeed.saving import GuardedSave


class Freeze:
    """Freezes every parameter outside `trainable`, and sees to it that trained weights above frozen ones get their
    gradients under every kind of activation checkpointing, and that `save_pretrained` writes no empty tensors;
    `restore` undoes all three."""

    def __init__(self, model: Any, trainable: Container[str]) -> None:
        self._model = model
        self._hooks: list[Any] = []
        self._save: GuardedSave | None = None
        self._checkpoints: AskingCheckpoints | None = None
        # What transformers' own hooks ask for always, `_ask` asks for where it is needed.
        self._had_hooks = _are_handles(getattr(model, "_require_grads_hooks", None))
        self._frozen = [
            param for name, param in model.named_parameters() if param.requires_grad and name not in trainable
        ]
        for param in self._frozen:
            param.requires_grad_(False)
        try:
            if self._had_hooks:
                model.disable_input_require_grads()
            self._save = GuardedSave(model)
            self._checkpoints = AskingCheckpoints()
            for module in _input_embeddings(model):
                self._hooks.append(module.register_forward_hook(self._ask))
        except BaseException:
            self.restore()
            raise

    def _ask(self, module: Any, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and torch.is_grad_enabled() and _needs_input_gradients(self._model):
            output.requires_grad_(True)

    def restore(self) -> None:
        for param in self._frozen:
            param.requires_grad_(True)
        for hook in self._hooks:
            hook.remove()
        if self._checkpoints is not None:
            self._checkpoints.restore()
        if self._had_hooks and not _are_handles(getattr(self._model, "_require_grads_hooks", None)):
            self._model.enable_input_require_grads()
        if self._save is not None:
            self._save.restore()
        self._checkpoints = self._save = None
        self._frozen, self._hooks, self._had_hooks, self._model = [], [], False, None


def _needs_input_gradients(model: Any) -> bool:
    """Whether frozen embeddings must pass gradients on: leaf modules of ZeRO-3 skip their own weights without, and so
    may a checkpointing function that nobody knows. Asked in every forward: both may be set at any time."""
    if get_z3_leaf_modules(model):
        return True
    return any(
        getattr(module, "gradient_checkpointing", False) is True
        and not is_known(getattr(module, "_gradient_checkpointing_func", None))
        for module in model.modules()
    )


def _input_embeddings(model: Any) -> list[torch.nn.Module]:
    """The input embeddings of a transformers model and of the models inside it, as its own method finds them."""
    found: list[torch.nn.Module] = []
    if not hasattr(model, "enable_input_require_grads"):
        return found
    for module in model.modules():
        try:
            embeddings = module.get_input_embeddings() if hasattr(module, "get_input_embeddings") else None
        except NotImplementedError:
            continue
        if isinstance(embeddings, torch.nn.Module) and not any(embeddings is one for one in found):
            found.append(embeddings)
    return found


def _are_handles(hooks: Any) -> bool:
    return bool(hooks) and all(hasattr(hook, "remove") for hook in hooks)
