"""The fp32 state of a dense ZeRO-3 run, by tensor name, as calibration by task vectors reads and checkpoints it.

With `engine.py` and `weights.py` the only file with DeepSpeed's private names; its `safe_*` functions are used where
they do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor


class DenseState:
    """Masters and moments of a stock ZeRO-3 engine: this rank's flat padded pieces. kind: "master" or a moment."""

    def __init__(self, engine: Any) -> None:
        self._optimizer = engine.optimizer
        self._parameters: dict[str, Any] = dict(engine.module.named_parameters())

    def moment_names(self) -> tuple[str, ...]:
        """State of the optimizer that has an element for every weight."""
        flat, state = self._states()[0]
        return tuple(key for key, value in state.items() if _is_like(value, flat))

    def get(self, name: str, kind: str) -> Tensor:
        param = self._parameters[name]
        if kind == "master":
            return safe_get_local_fp32_param(param).detach()
        return safe_get_local_optimizer_state(param, kind).detach()

    def gradient(self, name: str) -> Tensor | None:
        """The gradient that the next step will use, scaled as it is; None where there is none."""
        return safe_get_local_grad(self._parameters[name])

    def put(self, name: str, kind: str, values: Tensor) -> None:
        """values: the real part of the piece; its padding stays as it is."""
        piece = self.get(name, kind).clone()
        piece[: values.numel()] = values.to(piece.device)
        if kind == "master":
            safe_set_local_fp32_param(self._parameters[name], piece)
        else:
            safe_set_local_optimizer_state(self._parameters[name], piece, kind)

    def numbers(self) -> dict[str, Any]:
        """What the optimizer remembers besides (its step count), the same for all pieces."""
        flat, state = self._states()[0]
        rest = {key: value for key, value in state.items() if not _is_like(value, flat)}
        return {key: {"tensor": value.item()} if torch.is_tensor(value) else value for key, value in rest.items()}

    def make_state(self, moment_names: Iterable[str], numbers: Mapping[str, Any]) -> None:
        """State with these moments, to be filled by `put`, and these numbers; a fresh optimizer has none."""
        for flat, state in self._states():
            for key in moment_names:
                state[key] = torch.zeros_like(flat)
            for key, value in numbers.items():
                state[key] = torch.tensor(value["tensor"]) if isinstance(value, dict) else value

    def _states(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """Flat masters of every sub-group, and the torch optimizer's state of them."""
        state = self._optimizer.optimizer.state
        return [(flat, state[flat]) for flat in self._optimizer.fp32_partitioned_groups_flat]


def _is_like(value: Any, flat: Tensor) -> bool:
    return torch.is_tensor(value) and value.numel() == flat.numel()
