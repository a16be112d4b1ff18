"""AdamW and RMSprop on the active entries of a mask, for plain torch: one GPU, DDP, or a Trainer's `optimizers=`.

    optimizer = lota.optim.MaskedAdamW(model, mask, lr=1e-4, max_norm=1.0)

The same kernels as the ZeRO-3 path: masters, moments and clipped gradients exist for active entries only, and the
update is scattered into the weights in place; all other weights keep their bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, overload

import torch
from torch import Tensor, nn

from lota.kernels import (
    TileIndex,
    adamw_,
    adamw_scalars,
    gather,
    padded_zeros,
    rmsprop_,
    rmsprop_scalars,
    rounding_key,
    squared_norm,
)
from lota.messages import did_you_mean
from lota.ticket import Mask


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
    ) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be positive, or None for no clipping, got {max_norm}")
        parameters = _trained(model, mask)
        if rounding_seed is not None:
            _check_rounding(rounding_seed, parameters)
        self.mask, self.max_norm, self.rounding_seed = mask, max_norm, rounding_seed
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
        """One update of the active entries; nothing is read back from the device.

        A tensor without a gradient counts as one whose gradient is zero, as in the ZeRO-3 path. With `max_norm` the
        gradients are clipped by their norm over the active entries of all tensors, and a norm that is not finite skips
        the step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [(group, group["params"]) for group in self.param_groups]
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
            scalars: dict[torch.device, Tensor] = {}
            for parameter in parameters:
                gradient, is_compact = compact.pop(parameter, None), True
                if gradient is None and parameter.grad is not None:
                    gradient, is_compact = parameter.grad.detach().reshape(-1), False
                elif gradient is None:
                    gradient = padded_zeros(self._index(parameter))
                here = scalars.setdefault(parameter.device, first.to(parameter.device))
                self._state(parameter)
                options: dict[str, Any] = {"compact": is_compact}
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
        self._check_state(state_dict)
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        for number, parameter in enumerate(self._parameters()):
            if number in state_dict["state"]:
                self.state[parameter] = {
                    key: value.to(device=parameter.device, copy=True)
                    for key, value in state_dict["state"][number].items()
                }

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        kinds = {"master", *self.moment_names}
        for number, state in state_dict["state"].items():
            if set(state) != kinds:
                raise ValueError(
                    f"optimizer state {number} holds {', '.join(sorted(state))}; {type(self).__name__} needs "
                    f"{', '.join(sorted(kinds))}"
                )
            if any(value.dtype != torch.float32 for value in state.values()):
                raise ValueError(f"optimizer state {number} is not fp32")

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
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(model, mask, defaults, max_norm, rounding_seed)

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
    ) -> None:
        defaults = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        super().__init__(model, mask, defaults, max_norm, rounding_seed)

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


def _flat(tensor: Tensor) -> Tensor:
    if not tensor.is_contiguous():
        raise ValueError(f"expected contiguous tensors, got shape {tuple(tensor.shape)} and strides {tensor.stride()}")
    return tensor.detach().view(-1)
