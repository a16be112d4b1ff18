"""A torch optimizer run as it is on flat tensors that are not the ones it was made for."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lota.zero.checkpoint import state_codec


@dataclass(frozen=True)
class Part:
    """A flat tensor, its gradient of the same shape, and the position of its parameter group. The optimizer may write
    into both."""

    flat: Tensor
    gradient: Tensor
    group: int


class FlatOptimizer:
    """Steps the optimizer's groups on parts that are put into them for the length of a step.

    All parts of a step go through one `optimizer.step()`, so that whatever the optimizer counts, in a group or in
    itself, advances by one however many parts there are.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        # State that was made at construction is that of the tensors then: large, and of no use here.
        self._makes_state_early = bool(optimizer.state)

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def fresh(self) -> FlatOptimizer:
        """The same optimizer with the same settings, before its first step and without tensors, hooks and schedulers.

        A copy, because a class cannot always be called again with what its groups hold; but an instance that frees
        something when it ends must not be copied.
        """
        kind = type(self.optimizer)
        if hasattr(kind, "__del__"):
            made = self._construct([torch.zeros(1, dtype=torch.float32)])
        else:
            made = object.__new__(kind)
            shared = {id(p): p for group in self.groups for p in group["params"]}
            left_out = ("state", "param_groups", "step")  # a scheduler puts a `step` of the first optimizer there
            attributes = {key: value for key, value in vars(self.optimizer).items() if key not in left_out}
            for key, value in attributes.items():
                if key.startswith("_optimizer_") and isinstance(value, OrderedDict):
                    made.__dict__[key] = OrderedDict()  # hooks
                else:
                    made.__dict__[key] = value if callable(value) else copy.deepcopy(value, shared)
        made.param_groups = [
            {key: copy.deepcopy(value) for key, value in group.items() if key != "params"} | {"params": []}
            for group in self.groups
        ]
        made.state = defaultdict(dict)
        copied = FlatOptimizer(made)
        copied._makes_state_early = self._makes_state_early
        return copied

    def step(self, parts: Sequence[Part], *, with_hooks: bool = True) -> None:
        """One step. with_hooks: run the hooks of this optimizer and of the process, as every real step does."""
        before = [group["params"] for group in self.groups]
        for group in self.groups:
            group["params"] = []
        try:
            for part in parts:
                if self._makes_state_early and part.flat not in self.optimizer.state:
                    self._make_state(part)
                part.flat.grad = part.gradient
                self.groups[part.group]["params"].append(part.flat)
            step = self.optimizer.step
            if not with_hooks:
                bare = type(self.optimizer).step
                if getattr(bare, "hooked", False):  # torch wraps every class's step once
                    bare = bare.__wrapped__  # type: ignore[attr-defined]
                step = bare.__get__(self.optimizer)
            step()
        finally:
            for part in parts:
                part.flat.grad = None
            for group, params in zip(self.groups, before, strict=True):
                group["params"] = params

    def keep(self, flat: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The state of a part as JSON, and by path its tensors with an element for each of the part's."""
        return state_codec.split(self.optimizer.state.get(flat, {}), flat)

    def give_back(self, flat: Tensor, group: int, kept: Mapping[str, Any]) -> None:
        """Make the state that `keep` gave as JSON; the tensors, zeros now, are there to be filled."""
        on_own = state_codec.wants_own_device(self.groups[group])
        self.optimizer.state.pop(flat, None)
        if kept:  # else it was kept before the first step
            self.optimizer.state[flat] = state_codec.join(kept, flat, all_on_own=on_own)

    def _make_state(self, part: Part) -> None:
        group = {key: value for key, value in self.groups[part.group].items() if key != "params"}
        made = self._construct([{**group, "params": [part.flat]}])
        self.optimizer.state[part.flat] = made.state[part.flat]

    def _construct(self, params: list[Any]) -> torch.optim.Optimizer:
        """An instance by the class's own constructor, with what it accepts of the defaults."""
        kind = type(self.optimizer)
        accepted = inspect.signature(kind.__init__).parameters
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
        defaults = self.optimizer.defaults.items()
        return kind(params, **{k: copy.deepcopy(v) for k, v in defaults if takes_all or k in accepted})
