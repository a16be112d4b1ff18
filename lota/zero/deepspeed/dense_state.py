"""The fp32 state of a dense ZeRO-3 run, by tensor name, as calibration by task vectors reads and checkpoints it.

With `engine.py`, `optimizer.py` and `weights.py` the only file with DeepSpeed's private names; its `safe_*` functions
are used where they do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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

from lota.zero.checkpoint import state_codec


class DenseState:
    """Masters and moments of a stock ZeRO-3 engine: this rank's flat padded pieces. kind: "master" or a moment."""

    def __init__(self, engine: Any) -> None:
        self._optimizer = engine.optimizer
        self._parameters: dict[str, Any] = dict(engine.module.named_parameters())

    def moment_dtypes(self) -> dict[str, torch.dtype]:
        """State of the optimizer that has an element for every weight, by name."""
        _, flat, state = next(self._states())
        return {key: values.dtype for key, values in state_codec.split(state, flat)[1].items()}

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
        """What the optimizer remembers besides (its step count), by parameter group: the same for all pieces of one."""
        return {str(group): state_codec.split(state, flat)[0] for group, flat, state in self._states()}

    def make_state(self, numbers: Mapping[str, Any]) -> None:
        """State as `numbers` describes it, with moments to be filled by `put`; a fresh optimizer has none."""
        for group, flat, state in self._states():
            on_own = state_codec.wants_own_device(self._optimizer.optimizer.param_groups[group])
            state.clear()
            state.update(state_codec.join(numbers[str(group)], flat, all_on_own=on_own))

    def _states(self) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
        """Parameter group and flat masters of every sub-group, and the torch optimizer's state of them."""
        state = self._optimizer.optimizer.state
        for number, flat in enumerate(self._optimizer.fp32_partitioned_groups_flat):
            yield self._optimizer.sub_group_to_group_id[number], flat, state[flat]
