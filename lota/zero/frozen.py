"""What a block changes on the caller's model while it lasts, and puts back at its end."""

from __future__ import annotations

from collections.abc import Container
from typing import Any


class Freeze:
    """Freezes every parameter outside `trainable` and makes frozen embeddings pass gradients on; `restore` undoes
    both."""

    def __init__(self, model: Any, trainable: Container[str]) -> None:
        self._model = model
        self._frozen = [
            param for name, param in model.named_parameters() if param.requires_grad and name not in trainable
        ]
        for param in self._frozen:
            param.requires_grad_(False)
        # Without this, checkpointed blocks and leaf modules see inputs without gradients and skip their own weights.
        self._has_hook = hasattr(model, "enable_input_require_grads") and not getattr(
            model, "_require_grads_hooks", None
        )
        if self._has_hook:
            try:
                self._model.enable_input_require_grads()
            except BaseException:
                self._has_hook = False
                self.restore()
                raise

    def restore(self) -> None:
        for param in self._frozen:
            param.requires_grad_(True)
        if self._has_hook:
            self._model.disable_input_require_grads()
        self._frozen, self._has_hook, self._model = [], False, None
