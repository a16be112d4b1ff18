"""Which update the caller's torch optimizer means on compact state.

The caller's optimizer keeps its parameter groups, so schedulers and everything else that edits them work; it is read at
every step. AdamW (also DeepSpeed's FusedAdam and DeepSpeedCPUAdam) and RMSprop run through `lota.kernels`; any other
optimizer that works element by element runs as it is on the compact masters. Which ones do is found out by running
them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from lota.kernels import adamw_, adamw_scalars, rmsprop_, rmsprop_scalars, scatter_
from lota.zero.state import CompactState

# Long enough for optimizers that treat long tensors otherwise, as those with quantized states do.
_TRIAL_NUMEL = 1 << 16


class Update(Protocol):
    """One step of one group. scale, skip: fp32 and bool device scalars; settings: the optimizer's parameter group."""

    name: str
    moment_names: tuple[str, ...]

    def __call__(self, state: CompactState, settings: dict[str, Any], scale: Tensor, skip: Tensor) -> None: ...

    def nbytes(self) -> int:
        """Bytes of state beside the moments that `CompactState` holds."""
        ...

    def moments(self, state: CompactState) -> dict[str, Tensor]:
        """What the update remembers of every entry, as long as the masters."""
        ...

    def numbers(self, state: CompactState) -> dict[str, Any]:
        """What it remembers besides, as JSON."""
        ...

    def prepare_restore(self, state: CompactState, names: Iterable[str], numbers: Mapping[str, Any]) -> None:
        """Take the numbers, and make `moments(state)` the named ones, to be filled."""
        ...


class _KernelUpdate:
    """Moments that `CompactState` holds."""

    def moments(self, state: CompactState) -> dict[str, Tensor]:
        return state.moments

    def numbers(self, state: CompactState) -> dict[str, Any]:
        return {}

    def prepare_restore(self, state: CompactState, names: Iterable[str], numbers: Mapping[str, Any]) -> None:
        pass


class AdamW(_KernelUpdate):
    """`lota.kernels.adamw_`; the step count is a device value that a skipped step leaves alone."""

    name = "adamw"
    moment_names: tuple[str, ...] = ("exp_avg", "exp_avg_sq")

    def __init__(self) -> None:
        self.steps: dict[int, Tensor] = {}

    def __call__(self, state: CompactState, settings: dict[str, Any], scale: Tensor, skip: Tensor) -> None:
        if id(state) not in self.steps:
            self.steps[id(state)] = torch.zeros((), dtype=torch.float64, device=state.master.device)
        step = self.steps[id(state)]
        step.add_(1 - skip.double())
        beta1, beta2 = settings["betas"]
        scalars = adamw_scalars(
            scale, skip, step, lr=settings["lr"], weight_decay=settings["weight_decay"], beta1=beta1, beta2=beta2
        )
        adamw_(
            state.weights,
            state.gradient,
            state.local_index,
            state.master,
            state.moments["exp_avg"],
            state.moments["exp_avg_sq"],
            scalars,
            beta1=beta1,
            beta2=beta2,
            eps=settings["eps"],
        )

    def nbytes(self) -> int:
        return sum(step.nbytes for step in self.steps.values())

    def numbers(self, state: CompactState) -> dict[str, Any]:
        return {"step": float(self.steps[id(state)]) if id(state) in self.steps else 0.0}

    def prepare_restore(self, state: CompactState, names: Iterable[str], numbers: Mapping[str, Any]) -> None:
        self.steps[id(state)] = torch.tensor(numbers["step"], dtype=torch.float64, device=state.master.device)


class RMSprop(_KernelUpdate):
    """`lota.kernels.rmsprop_`."""

    name = "rmsprop"
    moment_names: tuple[str, ...] = ("square_avg",)

    def __call__(self, state: CompactState, settings: dict[str, Any], scale: Tensor, skip: Tensor) -> None:
        scalars = rmsprop_scalars(scale, skip, lr=settings["lr"], weight_decay=settings["weight_decay"])
        rmsprop_(
            state.weights,
            state.gradient,
            state.local_index,
            state.master,
            state.moments["square_avg"],
            scalars,
            alpha=settings["alpha"],
            eps=settings["eps"],
        )

    def nbytes(self) -> int:
        return 0


class TorchOptimizer:
    """The caller's optimizer itself, one group at a time, on the compact masters. Asks the host whether to skip."""

    moment_names: tuple[str, ...] = ()

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.name = type(optimizer).__name__

    def __call__(self, state: CompactState, settings: dict[str, Any], scale: Tensor, skip: Tensor) -> None:
        if bool(skip):
            return
        count = state.layout.local_active
        if count == 0:
            return
        state.master.grad = state.gradient * scale
        settings["params"] = [state.master]
        try:
            self.optimizer.step()
        finally:
            settings["params"], state.master.grad = [], None
        scatter_(state.weights, state.local_index, state.master)

    def nbytes(self) -> int:
        states = self.optimizer.state.values()
        return sum(value.nbytes for state in states for value in state.values() if torch.is_tensor(value))

    def moments(self, state: CompactState) -> dict[str, Tensor]:
        own = self.optimizer.state.get(state.master, {})
        return {key: value for key, value in own.items() if _is_moment(value, state)}

    def numbers(self, state: CompactState) -> dict[str, Any]:
        own = self.optimizer.state.get(state.master, {})
        rest = {key: value for key, value in own.items() if not _is_moment(value, state)}
        return {key: {"tensor": value.item()} if torch.is_tensor(value) else value for key, value in rest.items()}

    def prepare_restore(self, state: CompactState, names: Iterable[str], numbers: Mapping[str, Any]) -> None:
        if state.layout.local_active == 0:
            return
        own: dict[str, Any] = {name: torch.zeros_like(state.master) for name in names}
        for key, value in numbers.items():
            own[key] = torch.tensor(value["tensor"]) if isinstance(value, dict) else value
        self.optimizer.state[state.master] = own


def _is_moment(value: Any, state: CompactState) -> bool:
    return torch.is_tensor(value) and value.shape == state.master.shape


def choose_update(optimizer: torch.optim.Optimizer, device: torch.device) -> Update:
    """The update that `optimizer` means; ValueError for one that cannot run on compact state, with the reason."""
    groups = optimizer.param_groups
    if _is_adamw(optimizer) and not any(group.get("amsgrad") or group.get("maximize") for group in groups):
        return AdamW()
    if type(optimizer) is torch.optim.RMSprop and not any(
        group["centered"] or group["momentum"] or group["maximize"] for group in groups
    ):
        return RMSprop()
    _check_element_wise(optimizer, device)
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


def _check_element_wise(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Three steps on a vector must equal three steps on its two halves: each weight's update depends on it alone."""
    kind = type(optimizer)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(_TRIAL_NUMEL, generator=generator).to(device)
    gradients = [torch.randn(_TRIAL_NUMEL, generator=generator).to(device) * scale for scale in (1.0, 10.0, 0.1)]
    try:
        whole = _run_steps(kind, optimizer.defaults, [start], [[g] for g in gradients])
        halves = _run_steps(kind, optimizer.defaults, list(start.chunk(2)), [list(g.chunk(2)) for g in gradients])
    except (TypeError, ValueError, RuntimeError, NotImplementedError, AssertionError, KeyError) as error:
        raise ValueError(
            f"optimizer {kind.__name__} cannot run on compact state: a trial on a flat vector failed ({error}). "
            "Use AdamW, RMSprop or another optimizer that updates every weight from its own gradient."
        ) from error
    if not torch.equal(whole, halves):
        raise ValueError(
            f"optimizer {kind.__name__} is not element-wise: its update of a weight depends on other weights of the "
            "tensor, which compact state does not keep. Use AdamW, RMSprop or another element-wise optimizer."
        )


def _run_steps(
    kind: type[torch.optim.Optimizer], defaults: dict[str, Any], values: list[Tensor], gradients: list[list[Tensor]]
) -> Tensor:
    parameters = [torch.nn.Parameter(value.clone()) for value in values]
    accepted = inspect.signature(kind.__init__).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    settings = {key: copy.deepcopy(value) for key, value in defaults.items() if takes_all or key in accepted}
    optimizer = kind(parameters, **settings)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return torch.cat([parameter.detach() for parameter in parameters])
