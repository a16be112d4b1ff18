"""AdamW and RMSprop on the active entries of a mask, for plain torch: one GPU, DDP, or a Trainer's `optimizers=`.

    optimizer = lota.optim.MaskedAdamW(model, mask, lr=1e-4, max_norm=1.0)

The same kernels as the ZeRO-3 path: masters, moments and clipped gradients exist for active entries only, and the
update is scattered into the weights in place; all other weights keep their bits.

    optimizer = lota.optim.MaskedAdamW(model, mask, lr=3e-4, pull=10, importance=importance)

also pulls every entry, after each of its steps, to the weight that the run began with: the more, the more important
that weight was for what the model could do before.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, overload

import torch
from torch import Tensor, nn

from lota.kernels import (
    Pull,
    TileIndex,
    adamw_,
    adamw_scalars,
    gather,
    padded_zeros,
    pull_rate,
    rmsprop_,
    rmsprop_scalars,
    rounding_key,
    squared_norm,
)
from lota.messages import did_you_mean
from lota.schedule import check_num_steps, total_learning_rate
from lota.ticket import Mask


class AtActive(Protocol):
    """Importance that makes the values of a mask's tensor when they are asked for."""

    def at_active(self, mask: Mask, name: str) -> Tensor:
        """`[mask.active(name)]`, float, in the order of the mask's positions."""
        ...


class _Masked(torch.optim.Optimizer):
    """What both optimizers share: which weights, compact state made at the first step, clipping, loading."""

    moment_names: tuple[str, ...]

    def __init__(
        self,
        model: nn.Module,
        mask: Mask,
        defaults: dict[str, Any],
        max_norm: float | None,
        rounding_seed: int | None,
        pull: float | None,
        importance: Mapping[str, Tensor] | AtActive | None,
        num_steps: int | None,
    ) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be positive, or None for no clipping, got {max_norm}")
        parameters = _trained(model, mask)
        if rounding_seed is not None:
            _check_rounding(rounding_seed, parameters)
        self.mask, self.max_norm, self.rounding_seed = mask, max_norm, rounding_seed
        self._num_steps = num_steps
        # What becomes state at the first step, where the weights are then.
        self._importance = _checked_importance(mask, list(parameters), pull, importance, num_steps)
        if pull is not None:
            # planned_lr: the sum of the run's learning rates; used_lr: of its steps so far, a device value as `step`.
            defaults = {**defaults, "pull": float(pull), "planned_lr": None, "used_lr": None}
        self._indices: dict[nn.Parameter, TileIndex] = {}
        # Where each tensor begins in the concatenation of all that train, which is where rounding counts places.
        starts = itertools.accumulate((parameter.numel() for parameter in parameters.values()), initial=0)
        self._origins = dict(zip(parameters.values(), starts, strict=False))
        # step: a device value, because a skipped step does not count, and nobody on the host knows whether it was.
        defaults = {**defaults, "step": None}
        super().__init__([{"params": list(parameters.values()), "names": list(parameters)}], defaults)
        kept = set(parameters.values())
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in kept)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of the active entries; nothing is read back from the device (but at the first step with a pull).

        A tensor without a gradient counts as one whose gradient is zero, as in the ZeRO-3 path. With `max_norm` the
        gradients are clipped by their norm over the active entries of all tensors, and a norm that is not finite skips
        the step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [(group, group["params"]) for group in self.param_groups]
        self._plan()
        if all(parameter.grad is None for _, parameters in groups for parameter in parameters):
            return loss
        device = groups[0][1][0].device
        scale = torch.ones((), dtype=torch.float32, device=device)
        skip = torch.zeros((), dtype=torch.bool, device=device)
        compact: dict[nn.Parameter, Tensor] = {}
        if self.max_norm is not None:
            compact = {parameter: self._compact_gradient(parameter) for _, ps in groups for parameter in ps}
            norm = torch.stack([squared_norm(g).to(device) for g in compact.values()]).sum().sqrt()
            skip = ~torch.isfinite(norm)
            scale = (self.max_norm / (norm + 1e-6)).clamp(max=1.0).float()
        for group, parameters in groups:
            number = self._count_step(group, skip)
            first = self._scalars(group, scale, skip, number)
            key = None if self.rounding_seed is None else rounding_key(self.rounding_seed, number)
            rate = self._pull_rate(group, skip)
            scalars: dict[torch.device, Tensor] = {}
            for parameter in parameters:
                gradient, is_compact = compact.pop(parameter, None), True
                if gradient is None and parameter.grad is not None:
                    gradient, is_compact = parameter.grad.detach().reshape(-1), False
                elif gradient is None:
                    gradient = padded_zeros(self._index(parameter))
                here = scalars.setdefault(parameter.device, first.to(parameter.device))
                state = self._state(parameter)
                options: dict[str, Any] = {"compact": is_compact}
                if rate is not None:
                    options["pull"] = Pull(state["old"], state["importance"], rate.to(parameter.device))
                if key is not None:
                    options |= {"rounding": key.to(parameter.device), "origin": self._origins[parameter]}
                self._update(group, parameter, gradient, here, options)
        return loss

    def _count_step(self, group: dict[str, Any], skip: Tensor) -> Tensor:
        """The number of this step, a float64 device scalar; the last one's where this one is skipped."""
        step = group["step"]
        step = torch.zeros((), dtype=torch.float64, device=skip.device) if step is None else step.to(skip.device)
        group["step"] = step.add_(1 - skip.double())
        return step

    def _plan(self) -> None:
        """At the first step, where the scheduler is there and at its beginning: the sum of the run's learning rates."""
        if all(group.get("planned_lr", 0) is not None for group in self.param_groups):
            return
        for group, planned in zip(self.param_groups, total_learning_rate(self, None, self._num_steps), strict=True):
            if not 0 < planned < math.inf:
                raise ValueError(
                    f"the learning rates of the run sum to {planned}, and the pull is spread over them: they must be "
                    "positive; leave pull out for a run that changes nothing"
                )
            group["planned_lr"] = planned

    def _pull_rate(self, group: dict[str, Any], skip: Tensor) -> Tensor | None:
        """The rate of this step's pull; counts its learning rate as used, unless the step is skipped."""
        if "pull" not in group:
            return None
        used = group["used_lr"]
        used = torch.zeros((), dtype=torch.float64, device=skip.device) if used is None else used.to(skip.device)
        group["used_lr"] = used.add_((1 - skip.double()) * group["lr"])
        return pull_rate(skip.device, lr=group["lr"], mu=group["pull"] / group["planned_lr"])

    @property
    def pull_reached(self) -> list[float]:
        """How much of the pull each parameter group has had: `pull`, times the sum of the learning rates of its steps
        over the planned sum. At the end of a run that went as planned this is `pull`; 0 before it, and without a pull.
        """
        reached = []
        for group in self.param_groups:
            used = group.get("used_lr")
            reached.append(0.0 if used is None else group["pull"] * float(used) / group["planned_lr"])
        return reached

    def _scalars(self, group: dict[str, Any], scale: Tensor, skip: Tensor, step: Tensor) -> Tensor:
        raise NotImplementedError

    def _update(
        self,
        group: dict[str, Any],
        parameter: nn.Parameter,
        gradient: Tensor,
        scalars: Tensor,
        options: dict[str, Any],
    ) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Compact state and settings, as torch's; also the mask's digest, which loading compares."""
        return super().state_dict() | {"mask": self.mask.digest}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take state over in its own dtype (torch's would round masters to the weights' dtype); the weights stay."""
        if state_dict.get("mask") != self.mask.digest:
            raise ValueError(
                "the optimizer state belongs to another mask: load the mask that it was trained with, or start anew"
            )
        self._check_pull(state_dict)
        self._check_state(state_dict)
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        for number, parameter in enumerate(self._parameters()):
            if number in state_dict["state"]:
                self.state[parameter] = {
                    key: value.to(device=parameter.device, copy=True)
                    for key, value in state_dict["state"][number].items()
                }
                self._importance.pop(self._name(parameter), None)

    def _check_pull(self, state_dict: dict[str, Any]) -> None:
        is_saved, is_asked = ("pull" in groups[0] for groups in (state_dict["param_groups"], self.param_groups))
        if is_saved != is_asked:
            had, has = ("a pull" if is_pulled else "no pull" for is_pulled in (is_saved, is_asked))
            raise ValueError(
                f"the optimizer state is of a run with {had}, this optimizer has {has}: give pull and importance as "
                "that run did, or start anew"
            )

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        dtypes: dict[str, tuple[torch.dtype, ...]] = {"master": (torch.float32,)}
        dtypes |= dict.fromkeys(self.moment_names, (torch.float32,))
        if "pull" in self.param_groups[0]:
            dtypes["old"], dtypes["importance"] = (torch.bfloat16, torch.float16, torch.float32), (torch.bfloat16,)
        kinds = set(dtypes)
        for number, state in state_dict["state"].items():
            if set(state) != kinds:
                raise ValueError(
                    f"optimizer state {number} holds {', '.join(sorted(state))}; {type(self).__name__} needs "
                    f"{', '.join(sorted(kinds))}"
                )
            for kind, value in state.items():
                if value.dtype not in dtypes[kind]:
                    raise ValueError(f"{kind} of optimizer state {number} must not be {value.dtype}")

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for group in self.param_groups for parameter in group["params"])

    def _name(self, parameter: nn.Parameter) -> str:
        for group in self.param_groups:
            for name, candidate in zip(group["names"], group["params"], strict=True):
                if candidate is parameter:
                    return str(name)
        raise KeyError(parameter)

    def _index(self, parameter: nn.Parameter) -> TileIndex:
        """The tensor's index on the device where the weights are now: a Trainer moves them after this was made."""
        index = self._indices.get(parameter)
        if index is None or index.base.device != parameter.device:
            name = self._name(parameter)
            index = self._indices[parameter] = TileIndex.from_pieces(
                self.mask.chunks(name), self.mask.active(name), parameter.numel(), parameter.device
            )
        return index

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state, index = self.state[parameter], self._index(parameter)
        if not state:
            state["master"] = padded_zeros(index)
            gather(_flat(parameter), index, out=state["master"][: index.num_active])
            state.update((name, padded_zeros(index)) for name in self.moment_names)
            importance = self._importance.pop(self._name(parameter), None)
            if importance is not None:
                state["old"] = padded_zeros(index, parameter.dtype)
                gather(_flat(parameter), index, out=state["old"][: index.num_active])
                state["importance"] = padded_zeros(index, torch.bfloat16)
                state["importance"][: index.num_active] = importance
        return state

    def _compact_gradient(self, parameter: nn.Parameter) -> Tensor:
        gradient = padded_zeros(self._index(parameter))
        if parameter.grad is not None:
            index = self._index(parameter)
            gather(parameter.grad.detach().reshape(-1), index, out=gradient[: index.num_active])
        return gradient


class MaskedAdamW(_Masked):
    """AdamW (arXiv 1711.05101) that trains the active entries of `mask` in `model` and nothing else.

    model: whole tensors on each rank, in bf16, fp16 or fp32 (masters are fp32); tensors without an active entry get
    `requires_grad=False`. Weight decay is decoupled and touches active entries only. max_norm: clips by the norm over
    active entries, in the same pass; leave the Trainer's own clipping off then. ValueError where the mask and the model
    do not fit.

    rounding_seed: None rounds the fp32 masters into bf16 weights to nearest even; a seed rounds them stochastically, by
    bits that depend on the seed, the step and the weight's place alone (so all ranks agree that were given one seed). A
    seed for weights that are not bf16 is a ValueError.

    pull: None, or how strongly every entry is pulled to the weight that the run began with (the formula stands at
    `lota.kernels.Pull`), dimensionless: the rate of a step is `pull * lr / sum of the run's learning rates`, so that an
    entry of importance 1 that the gradients leave alone keeps about `exp(-pull)` of its distance over a whole run.
    importance: by name, `[mask.active(name)]` in the order of the mask's positions, float, finite and at least 0, of a
    mean of about 1 over all entries; or an object whose `at_active(mask, name)` gives that. Kept in bf16. num_steps:
    the optimizer steps of the whole run, needed where its scheduler does not state them. The sum of the learning rates
    is made at the first step (`lota.schedule.total_learning_rate`, with its ValueErrors), and belongs to the state, as
    the old weights and the importance do. `pull_reached` tells how much of the pull there has been.
    """

    moment_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        model: nn.Module,
        mask: Mask,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        max_norm: float | None = None,
        rounding_seed: int | None = None,
        pull: float | None = None,
        importance: Mapping[str, Tensor] | AtActive | None = None,
        num_steps: int | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(model, mask, defaults, max_norm, rounding_seed, pull, importance, num_steps)

    def _scalars(self, group: dict[str, Any], scale: Tensor, skip: Tensor, step: Tensor) -> Tensor:
        beta1, beta2 = group["betas"]
        return adamw_scalars(
            scale, skip, step, lr=group["lr"], weight_decay=group["weight_decay"], beta1=beta1, beta2=beta2
        )

    def _update(
        self,
        group: dict[str, Any],
        parameter: nn.Parameter,
        gradient: Tensor,
        scalars: Tensor,
        options: dict[str, Any],
    ) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        adamw_(
            _flat(parameter),
            gradient,
            self._index(parameter),
            state["master"],
            state["exp_avg"],
            state["exp_avg_sq"],
            scalars,
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            **options,
        )


class MaskedRMSprop(_Masked):
    """RMSprop, not centered and without momentum, as the paper's code uses it; otherwise as `MaskedAdamW`."""

    moment_names = ("square_avg",)

    def __init__(
        self,
        model: nn.Module,
        mask: Mask,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        max_norm: float | None = None,
        rounding_seed: int | None = None,
        pull: float | None = None,
        importance: Mapping[str, Tensor] | AtActive | None = None,
        num_steps: int | None = None,
    ) -> None:
        defaults = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        super().__init__(model, mask, defaults, max_norm, rounding_seed, pull, importance, num_steps)

    def _scalars(self, group: dict[str, Any], scale: Tensor, skip: Tensor, step: Tensor) -> Tensor:
        return rmsprop_scalars(scale, skip, lr=group["lr"], weight_decay=group["weight_decay"])

    def _update(
        self,
        group: dict[str, Any],
        parameter: nn.Parameter,
        gradient: Tensor,
        scalars: Tensor,
        options: dict[str, Any],
    ) -> None:
        state = self.state[parameter]
        rmsprop_(
            _flat(parameter),
            gradient,
            self._index(parameter),
            state["master"],
            state["square_avg"],
            scalars,
            alpha=group["alpha"],
            eps=group["eps"],
            **options,
        )


def _trained(model: nn.Module, mask: Mask) -> dict[str, nn.Parameter]:
    """The model's parameters with active entries, by the mask's names; ValueError where they do not fit."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trained: dict[str, nn.Parameter] = {}
    for name in mask.names:
        if name not in parameters:
            raise ValueError(f"the mask names {name}, which the model does not have" + did_you_mean(name, parameters))
        parameter = parameters[name]
        if type(parameter.data) is not Tensor or hasattr(parameter, "ds_id"):
            raise ValueError(
                f"{name} is sharded ({type(parameter.data).__name__}): lota.optim needs whole tensors on every rank; "
                "use lota.sparse_zero3 for sharded weights"
            )
        mask.check_base(name, tuple(parameter.shape), str(parameter.dtype), None)
        _flat(parameter)
        if not mask.active(name):
            continue
        if any(parameter is other for other in trained.values()):
            raise ValueError(f"the mask names one tensor twice, the second time as {name}: leave one of them out")
        trained[name] = parameter
    if not trained:
        raise ValueError("the mask has no active entry, so there is nothing to train")
    return trained


def _check_rounding(seed: int, parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        if parameter.dtype != torch.bfloat16:
            raise ValueError(
                f"rounding_seed={seed} rounds bf16 weights stochastically, but {name} is {parameter.dtype}; load the "
                "model in bf16, or leave rounding_seed out"
            )
    rounding_key(seed, torch.zeros((), dtype=torch.float64))


def _checked_importance(
    mask: Mask,
    names: list[str],
    pull: float | None,
    importance: Mapping[str, Tensor] | AtActive | None,
    num_steps: int | None,
) -> dict[str, Tensor]:
    """bf16 `[mask.active(name)]` for each name, or nothing without a pull; ValueError for what does not fit."""
    if pull is None:
        if importance is not None or num_steps is not None:
            raise ValueError("importance and num_steps only count for the pull: give pull, or leave them out")
        return {}
    if not 0 < pull < math.inf:
        raise ValueError(f"pull must be positive and finite, got {pull}; leave it out for no pull")
    check_num_steps(num_steps)
    if importance is None:
        raise ValueError(
            "pull needs importance: give the importance of the weights that are pulled to, or ones for a pull that is "
            "the same everywhere"
        )
    if isinstance(importance, Mapping):
        for name in importance:
            if name not in mask.names:
                raise ValueError(f"the mask has no {name}, which importance names" + did_you_mean(name, mask.names))
    kept = {}
    for name in names:
        if not isinstance(importance, Mapping):
            values = importance.at_active(mask, name)
        elif name in importance:
            values = importance[name]
        else:
            raise ValueError(f"importance lacks {name}, which has active entries: it needs every tensor that trains")
        if values.shape != (mask.active(name),) or not values.is_floating_point():
            raise ValueError(
                f"importance of {name} must be float of shape ({mask.active(name)},), a value for each active entry, "
                f"got {values.dtype} of shape {tuple(values.shape)}"
            )
        kept[name] = values.detach().to(torch.bfloat16, copy=True)
        if not bool((torch.isfinite(kept[name]) & (kept[name] >= 0)).all()):
            raise ValueError(f"importance of {name} must be finite and at least 0")
    return kept


def _flat(tensor: Tensor) -> Tensor:
    if not tensor.is_contiguous():
        raise ValueError(f"expected contiguous tensors, got shape {tuple(tensor.shape)} and strides {tensor.stride()}")
    return tensor.detach().view(-1)
