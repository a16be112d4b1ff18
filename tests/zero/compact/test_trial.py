"""An optimizer runs on compact state only if it is element-wise and resumes exactly; the trial leaves no trace, and
refusals name the optimizer and the reason."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lota.zero.compact.flat_optimizer import FlatOptimizer, Part
from lota.zero.compact.trial import check_admitted
from lota.zero.compact.update import TorchOptimizer, choose_update

CPU = torch.device("cpu")


class Rule(optim.Optimizer):
    """One line of arithmetic for a weight; what is counted and remembered is the subject of each test."""

    def __init__(self, params: Any, lr: float = 0.1, **settings: Any) -> None:
        super().__init__(params, {"lr": lr, **settings})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            self.begin(group)
            for p in group["params"]:
                p.sub_(group["lr"] * self.direction(p, self.state[p], group))

    def begin(self, group: dict[str, Any]) -> None:
        pass

    def direction(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return p.grad


class CountsInGroup(Rule):
    def begin(self, group):
        group["step"] = group.get("step", 0) + 1  # as apex's FusedAdam does

    def direction(self, p, state, group):
        return p.grad / group["step"]


class CountsInItself(Rule):
    count = 0

    def begin(self, group):
        self.count += 1

    def direction(self, p, state, group):
        return p.grad / self.count


class ManyDtypes(Rule):
    """State of several dtypes, in lists, and settings that are no numbers."""

    def direction(self, p, state, group):
        if not state:
            state["low"] = torch.zeros_like(p, dtype=group["dtype"])
            state["wide"] = torch.zeros_like(p, dtype=torch.float64)
            state["seen"] = torch.zeros_like(p, dtype=torch.bool)
            state["history"] = [torch.zeros_like(p), (torch.zeros_like(p, dtype=torch.int16), None)]
            state["table"] = torch.arange(16.0)
            state["step"] = 0
        state["step"] += 1
        state["low"].add_(p.grad)
        state["wide"].add_(p.grad, alpha=1 / 3)
        state["history"] = [p.grad.clone(), state["history"][1]]
        state["history"][1][0].add_(p.grad.sign().short())
        positive = state["seen"] | (p.grad > 0)
        state["seen"].copy_(positive)
        signs = state["history"][1][0] * state["table"][state["step"] % 9]
        return state["low"] + state["wide"].float() + positive + signs


class StateAtConstruction(Rule):
    def __init__(self, params, lr=0.1, **settings):
        super().__init__(params, lr, **settings)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["sum"] = torch.full_like(p, 2.0)

    def direction(self, p, state, group):
        return p.grad / state["sum"].add_(p.grad.abs())


class NeedsMore(Rule):
    """Cannot be constructed from its defaults."""

    def __init__(self, params, model, lr):
        self.rate_of = lambda group: group["lr"]
        self.scale = {"of": [model]}
        super().__init__(params, lr)

    def direction(self, p, state, group):
        return p.grad * self.scale["of"][0] * self.rate_of(group)


class OneMoment(Rule):
    def direction(self, p, state, group):
        state["m"] = p.grad.clone() if "m" not in state else 0.9 * state["m"] + p.grad
        return state["m"]


def _model() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(7))]


def _two_groups(kind: Any, *args: Any, **settings: Any) -> optim.Optimizer:
    first, second = _model()
    return kind([{"params": [first]}, {"params": [second], "lr": 0.5}], *args, **settings)


@pytest.mark.parametrize(
    "make",
    [
        lambda: _two_groups(Rule),
        lambda: _two_groups(CountsInGroup),
        lambda: _two_groups(ManyDtypes, dtype=torch.bfloat16),
        lambda: _two_groups(StateAtConstruction),
        lambda: _two_groups(NeedsMore, 3.0, 0.1),
        lambda: _two_groups(OneMoment),
        lambda: Rule(_model(), lr=0.0),
    ],
)
def test_admitted(make):
    assert isinstance(choose_update(make(), CPU), TorchOptimizer)


class BlockWise(Rule):
    """8-bit state with one scale for every 256 entries, as in bitsandbytes."""

    def direction(self, p, state, group):
        blocks = nn.functional.pad(p.grad.reshape(-1), (0, -p.numel() % 256)).view(-1, 256)
        state["absmax"] = blocks.abs().amax(1).clamp(min=1e-30)
        state["codes"] = (blocks / state["absmax"][:, None] * 127).round().to(torch.int8).view(-1)[: p.numel()]
        scale = state["absmax"].repeat_interleave(256)[: p.numel()]
        return state["codes"].float() * scale / 127


class Norm(Rule):
    def direction(self, p, state, group):
        return p.grad / p.grad.norm()


class NormOfMoment(Rule):
    """The same weights at first, and another state already."""

    def direction(self, p, state, group):
        state["m"] = p.grad / p.grad.norm()
        return torch.zeros_like(p)


class TinyDifferently(Rule):
    def direction(self, p, state, group):
        return p.grad * (2 if p.numel() <= 1024 else 1)


class SumOverAll(Rule):
    def begin(self, group):
        self.total = sum(p.grad.sum() for other in self.param_groups for p in other["params"])

    def direction(self, p, state, group):
        return p.grad * self.total


class Chance(Rule):
    def direction(self, p, state, group):
        return p.grad + torch.randn_like(p)


class LateBreak(Rule):
    """Element-wise for two steps."""

    def direction(self, p, state, group):
        state["step"] = state.get("step", 0) + 1
        return p.grad if state["step"] < 3 else p.grad / p.grad.abs().max()


class OneGroupOnly(Rule):
    def direction(self, p, state, group):
        return p.grad / p.grad.norm() if group.get("whole") else p.grad


class KeepsObject(Rule):
    def direction(self, p, state, group):
        state["cache"] = object()
        return p.grad


class KeepsForeignKey(Rule):
    def begin(self, group):
        self.state["global"]["step"] = self.state["global"].get("step", 0) + 1

    def direction(self, p, state, group):
        return p.grad / self.state["global"]["step"]


class ListOfItsOwn(Rule):
    """Remembers the tensors that it was made for."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.mine = [p for group in self.param_groups for p in group["params"]]

    def step(self, closure=None):
        for p in self.mine:
            p.data.sub_(p.grad)


class Swaps(Rule):
    def train(self):
        pass

    def eval(self):
        pass


class NamedMaster(Rule):
    def direction(self, p, state, group):
        state["master"] = p.clone()
        return p.grad


class Raises(Rule):
    def begin(self, group):
        raise Exception("not in train mode")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _two_groups(BlockWise), r"BlockWise is not element-wise: .*8-bit states.*absmax of its state"),
        (lambda: _two_groups(Norm), r"Norm is not element-wise"),
        (lambda: Norm(_model(), lr=0.0), r"Norm is not element-wise"),
        (lambda: Norm(_model(), lr=1e-12), r"Norm is not element-wise"),
        (lambda: _two_groups(NormOfMoment), r"NormOfMoment is not element-wise"),
        (lambda: _two_groups(TinyDifferently), r"TinyDifferently is not element-wise"),
        (lambda: _two_groups(SumOverAll), r"SumOverAll is not element-wise"),
        (lambda: _two_groups(Chance), r"Chance is not element-wise.* chance"),
        (lambda: _two_groups(LateBreak), r"LateBreak is not element-wise"),
        (
            lambda: OneGroupOnly([{"params": _model()[:1]}, {"params": _model()[:1], "whole": True}]),
            r"OneGroupOnly is not element-wise",
        ),
        (lambda: _two_groups(CountsInItself), r"CountsInItself cannot be resumed.*beside its state and its parameter"),
        (lambda: _two_groups(KeepsForeignKey), r"KeepsForeignKey cannot be resumed"),
        (lambda: _two_groups(KeepsObject), r"KeepsObject cannot run .*got object .* in cache"),
        (lambda: _two_groups(ListOfItsOwn), r"ListOfItsOwn (is not element-wise|cannot run)"),
        (lambda: _two_groups(Swaps), r"Swaps exchanges the weights for others between train\(\) and eval\(\)"),
        (lambda: _two_groups(NamedMaster), r"NamedMaster cannot run .*has the name master"),
        (lambda: _two_groups(Raises), r"Raises cannot run .*Exception: not in train mode"),
        (lambda: Rule(_model(), callback=print), r"got builtin_function_or_method .* in callback of a parameter group"),
        (lambda: optim.AdamW([{"params": _model(), "tag": object()}]), r"got object .* in tag of a parameter group"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError) as caught:
        choose_update(make(), CPU)
    assert re.search(message, str(caught.value), re.S), caught.value


def test_the_trial_leaves_no_trace():
    optimizer = _two_groups(optim.SGD, lr=torch.tensor(0.0), momentum=0.9)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("own"))
    everywhere = register_optimizer_step_pre_hook(lambda *_: calls.append("process"))
    schedule = optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step))
    before = [{key: repr(value) for key, value in group.items()} for group in optimizer.param_groups]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    check_admitted(optimizer, CPU)
    everywhere.remove()
    assert torch.equal(torch.rand(3), expected)
    assert calls == []
    assert [{key: repr(value) for key, value in group.items()} for group in optimizer.param_groups] == before
    assert not optimizer.state
    assert not getattr(optimizer, "_opt_called", False), "a scheduler counts real steps"
    assert schedule.last_epoch == 0


def test_a_real_step_counts_once_and_runs_hooks_once():
    optimizer = _two_groups(CountsInGroup)
    calls: list[str] = []
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    own = [group["params"] for group in optimizer.param_groups]
    flat = FlatOptimizer(optimizer)
    parts = [Part(torch.ones(size), torch.ones(size), group) for size, group in ((3, 0), (4, 1), (5, 1))]
    flat.step(parts)
    assert calls == ["post"] and [group["step"] for group in optimizer.param_groups] == [1, 1]
    assert [group["params"] for group in optimizer.param_groups] == own
    assert torch.equal(parts[0].flat, torch.full((3,), 0.9)) and torch.equal(parts[2].flat, torch.full((5,), 0.5))
    assert all(part.flat.grad is None for part in parts)


def test_dense_state_made_at_construction_is_let_go():
    optimizer = optim.Adagrad(_model())
    assert optimizer.state
    choose_update(optimizer, CPU)
    assert not optimizer.state
