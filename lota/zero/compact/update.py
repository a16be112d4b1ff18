"""Which update the caller's torch optimizer means on compact state.

The caller's optimizer keeps its parameter groups, so schedulers and everything else that edits them work; it is read at
every step. AdamW (also DeepSpeed's FusedAdam and DeepSpeedCPUAdam) and RMSprop run through `lota.kernels`; any other
optimizer that works element by element runs as it is on the compact masters. Which ones do is found out by running
them (`trial.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lota.kernels import TILE, adamw_, adamw_scalars, pull_, rmsprop_, rmsprop_scalars, rounding_key, scatter_
from lota.zero.checkpoint import state_codec
from lota.zero.compact.flat_optimizer import FlatOptimizer, Part
from lota.zero.compact.pulling import Pulling
from lota.zero.compact.state import CompactState
from lota.zero.compact.trial import check_admitted

Settings = Sequence[dict[str, Any]]
"""The optimizer's parameter groups; `CompactState.group` says which of them a state belongs to."""


class Update(Protocol):
    """One step of all states."""

    name: str
    moment_names: tuple[str, ...]
    rounding_seed: int | None
    pulling: Pulling | None

    def step(self, states: Sequence[CompactState], settings: Settings, scale: Tensor, skip: Tensor) -> None:
        """scale, skip: fp32 and bool scalars on the device of the states. The gradients may be overwritten."""
        ...

    def write_weights(self, states: Sequence[CompactState]) -> None:
        """Make the weights what the last step made of the masters."""
        ...

    def nbytes(self) -> int:
        """Bytes of state beside the moments that `CompactState` holds."""
        ...

    def moments(self, state: CompactState) -> dict[str, Tensor]:
        """What the update remembers of every entry, as long as the masters."""
        ...

    def numbers(self, states: Sequence[CompactState]) -> dict[str, Any]:
        """What it remembers besides, by parameter group, as JSON: the same on every rank."""
        ...

    def prepare_restore(self, states: Sequence[CompactState], numbers: Mapping[str, Any]) -> None:
        """Take the numbers, and make `moments` of every state what was kept, to be filled."""
        ...


class _KernelUpdate:
    """Moments that `CompactState` holds. What changes with every step is computed once for a parameter group.

    rounding_seed: None rounds masters to nearest even; a seed rounds them stochastically (see `lota.kernels.adamw_`).
    """

    pulling: Pulling | None = None

    def __init__(self, rounding_seed: int | None = None) -> None:
        self.rounding_seed = rounding_seed
        self._steps: dict[int, Tensor] = {}

    def step(self, states: Sequence[CompactState], settings: Settings, scale: Tensor, skip: Tensor) -> None:
        prepared: dict[int, tuple[Tensor, Tensor | None]] = {}
        rates = _rates(self.pulling, states, settings, skip)
        for state in states:
            group = settings[state.group]
            if state.group not in prepared:
                number = self._count(state.group, skip)
                prepared[state.group] = self._scalars(group, scale, skip, number), self._key(number)
            # scalars: fp32, what changes with the step (learning rate, bias corrections, scale, skip), on the device
            scalars, key = prepared[state.group]
            options = _rounding(state, key)
            if self.pulling is not None:
                options["pull"] = self.pulling.of(state, rates[state.group])
            self._update(state, group, scalars, options)

    def _count(self, group: int, skip: Tensor) -> Tensor:
        """The number of this step, a float64 device scalar that a skipped step leaves alone."""
        if group not in self._steps:
            self._steps[group] = torch.zeros((), dtype=torch.float64, device=skip.device)
        return self._steps[group].add_(1 - skip.double())

    def _key(self, number: Tensor) -> Tensor | None:
        return None if self.rounding_seed is None else rounding_key(self.rounding_seed, number)

    def _scalars(self, group: dict[str, Any], scale: Tensor, skip: Tensor, number: Tensor) -> Tensor:
        raise NotImplementedError

    def _update(self, state: CompactState, group: dict[str, Any], scalars: Tensor, options: dict[str, Any]) -> None:
        """options: of the kernel, for rounding and for the pull."""
        raise NotImplementedError

    def write_weights(self, states: Sequence[CompactState]) -> None:
        for state in states:
            number = self._steps.get(state.group)
            key = None if number is None or int(number) == 0 else self._key(number)
            scatter_(state.weights, state.local_index, state.master, **_rounding(state, key))

    def nbytes(self) -> int:
        return sum(number.nbytes for number in self._steps.values())

    def moments(self, state: CompactState) -> dict[str, Tensor]:
        return state.moments

    def numbers(self, states: Sequence[CompactState]) -> dict[str, Any]:
        return {str(group): {"step": float(number)} for group, number in self._steps.items()}

    def prepare_restore(self, states: Sequence[CompactState], numbers: Mapping[str, Any]) -> None:
        device = states[0].master.device
        self._steps = {
            int(group): torch.tensor(kept["step"], dtype=torch.float64, device=device)
            for group, kept in numbers.items()
        }


def _rates(
    pulling: Pulling | None, states: Sequence[CompactState], settings: Settings, skip: Tensor
) -> dict[int, Tensor]:
    """The rates of this step's pull, by parameter group. Called once a step."""
    if pulling is None:
        return {}
    return {group: pulling.rate(group, settings[group]["lr"], skip) for group in {state.group for state in states}}


def _rounding(state: CompactState, key: Tensor | None) -> dict[str, Any]:
    """Arguments of the kernels."""
    return {} if key is None else {"rounding": key, "origin": state.origin}


class AdamW(_KernelUpdate):
    """`lota.kernels.adamw_`."""

    name = "adamw"
    moment_names: tuple[str, ...] = ("exp_avg", "exp_avg_sq")

    def _scalars(self, group: dict[str, Any], scale: Tensor, skip: Tensor, number: Tensor) -> Tensor:
        beta1, beta2 = map(float, group["betas"])
        return adamw_scalars(
            scale, skip, number, lr=group["lr"], weight_decay=group["weight_decay"], beta1=beta1, beta2=beta2
        )

    def _update(self, state: CompactState, group: dict[str, Any], scalars: Tensor, options: dict[str, Any]) -> None:
        beta1, beta2 = map(float, group["betas"])
        adamw_(
            state.weights,  # this rank's partition, 16 bit, dense: only active positions are written
            state.gradient,  # fp32 [local active, padded to tiles], as are masters and moments
            state.local_index,
            state.master,
            state.moments["exp_avg"],
            state.moments["exp_avg_sq"],
            scalars,
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            **options,
        )


class RMSprop(_KernelUpdate):
    """`lota.kernels.rmsprop_`."""

    name = "rmsprop"
    moment_names: tuple[str, ...] = ("square_avg",)

    def _scalars(self, group: dict[str, Any], scale: Tensor, skip: Tensor, number: Tensor) -> Tensor:
        return rmsprop_scalars(scale, skip, lr=group["lr"], weight_decay=group["weight_decay"])

    def _update(self, state: CompactState, group: dict[str, Any], scalars: Tensor, options: dict[str, Any]) -> None:
        rmsprop_(
            state.weights,
            state.gradient,
            state.local_index,
            state.master,
            state.moments["square_avg"],
            scalars,
            alpha=group["alpha"],
            eps=group["eps"],
            **options,
        )


class TorchOptimizer:
    """The caller's optimizer itself on the compact masters. Asks the host whether to skip."""

    moment_names: tuple[str, ...] = ()
    rounding_seed: int | None = None
    pulling: Pulling | None = None

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.name = type(optimizer).__name__
        self._optimizer = FlatOptimizer(optimizer)
        optimizer.state.clear()  # of the dense tensors, where it was made at construction
        self._empty: dict[int, Part] = {}

    def step(self, states: Sequence[CompactState], settings: Settings, scale: Tensor, skip: Tensor) -> None:
        rates = _rates(self.pulling, states, settings, skip)
        if bool(skip):
            return
        for state in states:
            state.gradient.mul_(scale)  # the kernels take the scale as an argument; a torch optimizer cannot
        self._optimizer.step([self._part(state) for state in states])
        for state in states:
            if self.pulling is not None and state.master.numel():
                pull_(state.master, self.pulling.of(state, rates[state.group]))
        self.write_weights(states)

    def _part(self, state: CompactState) -> Part:
        """What is stepped for a state. A rank without entries steps a tile of zeros, so that it counts steps like the
        others."""
        if state.master.numel():
            return Part(state.master, state.gradient, state.group)
        if id(state) not in self._empty:
            zeros = state.master.new_zeros(TILE)
            self._empty[id(state)] = Part(zeros, zeros.clone(), state.group)
        return self._empty[id(state)]

    def write_weights(self, states: Sequence[CompactState]) -> None:
        for state in states:
            scatter_(state.weights, state.local_index, state.master)

    def nbytes(self) -> int:
        states = self._optimizer.optimizer.state.values()
        return sum(value.nbytes for state in states for value in state.values() if torch.is_tensor(value))

    def moments(self, state: CompactState) -> dict[str, Tensor]:
        return self._optimizer.keep(self._part(state).flat)[1]

    def numbers(self, states: Sequence[CompactState]) -> dict[str, Any]:
        """Tensors of one parameter group are always stepped together, so one of them speaks for all."""
        return {str(state.group): self._optimizer.keep(self._part(state).flat)[0] for state in states}

    def prepare_restore(self, states: Sequence[CompactState], numbers: Mapping[str, Any]) -> None:
        for state in states:
            self._optimizer.give_back(self._part(state).flat, state.group, numbers[str(state.group)])


def choose_update(
    optimizer: torch.optim.Optimizer, device: torch.device, rounding_seed: int | None = None
) -> AdamW | RMSprop | TorchOptimizer:
    """The update that `optimizer` means; ValueError for one that cannot run on compact state, with the reason.

    rounding_seed: for stochastic rounding, which the kernels of AdamW and RMSprop have.
    """
    groups = optimizer.param_groups
    for group in groups:
        state_codec.encode_group(group)  # refused now, not at the first checkpoint
    if _is_adamw(optimizer) and not any(group.get("amsgrad") or group.get("maximize") for group in groups):
        return AdamW(rounding_seed)
    if type(optimizer) is torch.optim.RMSprop and not any(
        group["centered"] or group["momentum"] or group["maximize"] for group in groups
    ):
        return RMSprop(rounding_seed)
    if rounding_seed is not None:
        raise ValueError(
            f"rounding_seed={rounding_seed} rounds stochastically in the kernels of AdamW and RMSprop; optimizer "
            f"{type(optimizer).__name__} with these settings runs as it is: use one of those, or leave rounding_seed "
            "out"
        )
    check_admitted(optimizer, device)
    return TorchOptimizer(optimizer)


def _is_adamw(optimizer: torch.optim.Optimizer) -> bool:
    """Decoupled weight decay, whatever the class is called. Plain Adam without weight decay is the same."""
    kind = type(optimizer)
    if kind is torch.optim.AdamW:
        return True
    if kind is torch.optim.Adam:
        return all(
            group["weight_decay"] == 0 or group.get("decoupled_weight_decay") for group in optimizer.param_groups
        )
    if kind.__name__ == "FusedAdam":
        return bool(getattr(optimizer, "adam_w_mode", 0)) and all(
            group["bias_correction"] for group in optimizer.param_groups
        )
    if kind.__name__ == "DeepSpeedCPUAdam":
        decoupled = bool(getattr(optimizer, "adam_w_mode", getattr(optimizer, "adamw_mode", False)))
        return decoupled and all(group.get("bias_correction", True) for group in optimizer.param_groups)
    return False
