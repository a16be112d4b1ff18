"""A step uses the sum of all gradients since the last step, in every phase, however a script cuts its global batches.

Two losses of one forward or of two, with or without a retained graph, through `engine.backward` or `loss.backward`,
under every accumulation setting, give what one backward of the summed loss gives; or, where gradients were scored
already, an error on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lota
from tests.zero import cases

STEPS = 3
HALVES = (slice(0, cases.ROWS), slice(cases.ROWS, None))


class TwoHeads(nn.Module):
    """The loss of each head uses weights of its own and a shared trunk; the trunk is used twice."""

    def __init__(self, is_reentrant: bool = False) -> None:
        super().__init__()
        self.is_reentrant = is_reentrant
        self.embed = nn.Linear(5, cases.WIDTH)
        self.trunk = nn.Sequential(nn.Linear(cases.WIDTH, 31, bias=False), nn.Tanh(), nn.Linear(31, cases.WIDTH))
        self.heads = nn.ModuleList([nn.Linear(cases.WIDTH, 3, bias=False) for _ in range(2)])

    def forward(self, x: torch.Tensor, heads: tuple[int, ...] = (0, 1)) -> tuple[torch.Tensor, ...]:
        h = self.embed(x).requires_grad_()
        for _ in range(2):
            h = h + (checkpoint(self.trunk, h, use_reentrant=True) if self.is_reentrant else self.trunk(h))
        return tuple(self.heads[head](h) for head in heads)


def _model(is_reentrant: bool = False) -> TwoHeads:
    torch.manual_seed(1)
    return TwoHeads(is_reentrant)


def _batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sixteen rows, of which every rank takes an equal share of each half."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(2 * cases.ROWS, 5, generator=generator)
    return x, torch.randint(0, 3, (2 * cases.ROWS,), generator=generator)


def _mine(tensor: torch.Tensor, half: slice) -> torch.Tensor:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return tensor[half][rank * cases.ROWS // world : (rank + 1) * cases.ROWS // world]


def _loss(logits: tuple[torch.Tensor, ...], target: torch.Tensor) -> torch.Tensor:
    return sum((F.cross_entropy(logit, target) for logit in logits), start=torch.zeros(()))


# Every script does one global batch of `_batch(step)` and steps. Its loss: both heads' sum, the mean over the halves.
def _one_backward(engine: Any, x: torch.Tensor, target: torch.Tensor) -> None:
    losses = [_loss(engine(_mine(x, half)), _mine(target, half)) / 2 for half in HALVES]
    engine.backward(losses[0] + losses[1])
    engine.step()


def _two_backwards(engine: Any, x: torch.Tensor, target: torch.Tensor) -> None:
    for half in HALVES:
        engine.backward(_loss(engine(_mine(x, half)), _mine(target, half)) / 2)
    engine.step()


def _forwards_first(engine: Any, x: torch.Tensor, target: torch.Tensor) -> None:
    losses = [_loss(engine(_mine(x, half)), _mine(target, half)) / 2 for half in HALVES]
    for loss in losses:
        engine.backward(loss)
    engine.step()


def _retained(engine: Any, x: torch.Tensor, target: torch.Tensor) -> None:
    """ZeRO-3 gathers weights for one backward of a forward only: this works where they stay gathered."""
    for half in HALVES:
        first, second = engine(_mine(x, half))
        engine.backward(F.cross_entropy(first, _mine(target, half)) / 2, retain_graph=True)
        engine.backward(F.cross_entropy(second, _mine(target, half)) / 2)
    engine.step()


def _a_head_each(engine: Any, x: torch.Tensor, target: torch.Tensor) -> None:
    """Each backward leaves the other head without a gradient; a look at the model in between changes nothing."""
    for half in HALVES:
        for head in (0, 1):
            engine.backward(_loss(engine(_mine(x, half), (head,)), _mine(target, half)) / 2)
            with torch.no_grad():
                engine(_mine(x, half))
    engine.step()


def _plain_backward(engine: Any, x: torch.Tensor, target: torch.Tensor) -> None:
    for half in HALVES:
        (_loss(engine(_mine(x, half)), _mine(target, half)) / 2).backward()
    engine.step()


def _thrown_away(engine: Any, x: torch.Tensor, target: torch.Tensor) -> None:
    engine.backward(1000 * _loss(engine(_mine(x, HALVES[0])), _mine(target, HALVES[0])))
    engine.optimizer.zero_grad()
    _two_backwards(engine, x, target)


def _two_steps(engine: Any, x: torch.Tensor, target: torch.Tensor) -> None:
    """What gradient_accumulation_steps: 2 expects, which divides by it."""
    for half in HALVES:
        engine.backward(_loss(engine(_mine(x, half)), _mine(target, half)))
        engine.step()


def _three_backwards_two_steps(engine: Any, x: torch.Tensor, target: torch.Tensor) -> None:
    """Three backwards a step under gradient_accumulation_steps: 2, two of them without a call of `step` between."""
    for _ in range(2):
        engine.backward(_loss(engine(_mine(x, HALVES[0])), _mine(target, HALVES[0])) / 2)
    engine.step()
    engine.backward(_loss(engine(_mine(x, HALVES[1])), _mine(target, HALVES[1])))
    engine.step()


KEPT_GATHERED = {"stage3_param_persistence_threshold": 10**6}
SCRIPTS: dict[str, tuple[Callable[..., None], int]] = {
    "two backwards": (_two_backwards, 1),
    "forwards first": (_forwards_first, 1),
    "retained graph": (_retained, 1),
    "a head each": (_a_head_each, 1),
    "plain backward": (_plain_backward, 1),
    "thrown away": (_thrown_away, 1),
    "two steps": (_two_steps, 2),
    "three backwards": (_three_backwards_two_steps, 2),
}


def _run(phase: str, script: Callable[..., None], accumulation: int, **how: Any) -> dict[str, torch.Tensor]:
    """What the phase made of three steps: scores, or the sparse or dense masters' way from the base."""
    import deepspeed

    world = torch.distributed.get_world_size()
    model = _model(how.pop("is_reentrant", False))
    zero = how.pop("zero", {})
    if phase == "sparse":
        names = [name for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
        generator = torch.Generator().manual_seed(2)
        drawn = {name: torch.rand(model.get_parameter(name).shape, generator=generator) < 0.4 for name in names}
        block: Any = lota.sparse_zero3(lota.Mask.from_dense(drawn), **how)
    else:
        block = lota.calibration_zero3(score=phase, density=0.2, include=["*trunk*", "*heads*"], **how)
    with block as run:
        config = cases.config(accumulation, world, gradient_clipping=0.0, zero=zero)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        config["zero_force_ds_cpu_optimizer"] = False  # torch's own where the optimizer is offloaded
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        for step in range(STEPS):
            script(engine, *_batch(step))
        if phase == "sparse":
            found = {str(number): state.master.clone() for number, state in enumerate(run.core.states)}
        else:
            found = {name: values.clone() for name, _, values in run._run.scores()}
        engine.destroy()
    (run if phase == "sparse" else run._run).release()
    return found


OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
QUICK = ("forwards first", "a head each", "thrown away", "two steps")
QUICK_PHASES: list[tuple[str, dict[str, Any]]] = [("sparse", {}), ("gradient", {}), ("task_vector", {})]
PHASES: list[tuple[str, dict[str, Any]]] = [
    *QUICK_PHASES,
    ("sparse", {"reduce_every": "step"}),
    ("sparse", {"gradient_reduction": "dense"}),
    ("fisher", {}),
    ("task_vector", {"zero": OFFLOAD}),
]


def _scripts(phase: str, how: dict[str, Any], names: tuple[str, ...]) -> dict[str, dict[str, torch.Tensor]]:
    found = {"expected": _run(phase, _one_backward, 1, **how)}
    for name in names:
        script, accumulation = SCRIPTS[name]
        zero = how.get("zero", {}) | (KEPT_GATHERED if script is _retained else {})
        found[name] = _run(phase, script, accumulation, **how | {"zero": zero})
    return found


def _check(ranks: Any, world: int, phase: str, how: dict[str, Any], names: tuple[str, ...]) -> None:
    for found in ranks(world).run(_scripts, phase, how, names):
        expected = found.pop("expected")
        for script, values in found.items():
            for name, value in values.items():
                # the same sums in fp32, in another order
                scale = expected[name].abs().max()
                assert scale > 0, "the phase did something"
                assert (value - expected[name]).abs().max() <= 2e-5 * scale, f"{phase}, {script}: {name}"


@pytest.mark.parametrize(("phase", "how"), QUICK_PHASES)
def test_scripts_sum_up(ranks, phase, how):
    _check(ranks, 2, phase, how, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "how"), PHASES)
@pytest.mark.parametrize("world", [1, 2])
def test_every_script_sums_up(ranks, world, phase, how):
    _check(ranks, world, phase, how, tuple(SCRIPTS))


def test_one_rank_sums_up(ranks):
    _check(ranks, 1, "gradient", {}, ("two backwards",))


def _reentrant(phase: str) -> list[dict[str, torch.Tensor]]:
    return [_run(phase, _two_backwards, 1, is_reentrant=kind) for kind in (False, True)]


@pytest.mark.parametrize("world", [1, 2])
def test_weights_used_twice_under_reentrant_checkpointing_sum_up(ranks, world):
    for plain, reentrant in ranks(world).run(_reentrant, "gradient"):
        for name, value in plain.items():
            assert (reentrant[name] - value).abs().max() <= 2e-5 * value.abs().max(), name


def _surprise(what: str) -> tuple[str, int]:
    """A batch of one backward, then something else: the error, and how many batches were scored."""
    import deepspeed

    model = _model()
    with lota.calibration_zero3(score="gradient", density=0.2, include=["*trunk*", "*heads*"]) as run:
        world = torch.distributed.get_world_size()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=cases.config(1, world))
        _one_backward(engine, *_batch(0))
        x, target = _batch(1)
        error = ""
        try:
            engine.backward(_loss(engine(_mine(x, HALVES[0])), _mine(target, HALVES[0])))
            if what == "second backward":
                loss = _loss(engine(_mine(x, HALVES[1])), _mine(target, HALVES[1]))
                engine.backward(loss)
            elif what == "zero_grad":
                engine.optimizer.zero_grad()
            else:
                run.mask()
        except ValueError as caught:
            error = str(caught)
        batches = run._run.core.num_batches
        engine.destroy()
    run._run.release()
    return error, batches


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("second backward", "second gradient before engine.step() in global batch 2"),
        ("zero_grad", "zero_grad() between backward and step"),
        ("mask", "a backward without engine.step() is in the score already"),
    ],
)
def test_a_batch_scored_already_cannot_be_corrected(ranks, world, what, message):
    for error, batches in ranks(world).run(_surprise, what):
        assert message in error and batches == 1
        assert what != "second backward" or "set gradient_accumulation_steps to 2 or more" in error
