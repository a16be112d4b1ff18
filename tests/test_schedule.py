"""The sum of a run's learning rates equals that of a run stepped for real, and nothing that is alive is changed."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as lrs

import lota
from lota.schedule import total_learning_rate
from tests.zero import cases

NUM_STEPS = 20


def _optimizer(lr: Any = None) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (0.1, 0.03)]
    if lr is not None:
        groups = [{**group, "lr": torch.tensor(group["lr"])} for group in groups]
    return torch.optim.AdamW(groups, lr=0.5)


class Owner:
    """Of a schedule that is its method; what a copy would cost, it refuses."""

    def rate(self, step: int) -> float:
        return 1 / (1 + step)

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("the owner of a schedule was copied")


class Counting:
    """A schedule that counts its calls, as no schedule should, but some do."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, step: int) -> float:
        self.calls += 1
        return 1 / (1 + self.calls)


TORCH = {
    "lambda": lambda o: lrs.LambdaLR(o, lambda step: 1 / (1 + step)),
    "two lambdas": lambda o: lrs.LambdaLR(o, [lambda step: 0.9**step, lambda step: 1 / (1 + step)]),
    "method": lambda o: lrs.LambdaLR(o, Owner().rate),
    "multiplicative": lambda o: lrs.MultiplicativeLR(o, lambda step: 1 - step / 30),
    "step": lambda o: lrs.StepLR(o, 4),
    "multi step": lambda o: lrs.MultiStepLR(o, [3, 9]),
    "constant": lambda o: lrs.ConstantLR(o, 0.3, 5),
    "linear": lambda o: lrs.LinearLR(o, 0.2, total_iters=9),
    "exponential": lambda o: lrs.ExponentialLR(o, 0.8),
    "polynomial": lambda o: lrs.PolynomialLR(o, 12, 2.0),
    "cosine": lambda o: lrs.CosineAnnealingLR(o, NUM_STEPS),
    "restarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 3, 2),
    "cyclic": lambda o: lrs.CyclicLR(o, 0.01, [0.1, 0.2], 3),
    "cyclic, own scale": lambda o: lrs.CyclicLR(o, 0.01, 0.1, 3, scale_fn=lambda x: 1 / x, cycle_momentum=False),
    "one cycle": lambda o: lrs.OneCycleLR(o, [0.1, 0.2], NUM_STEPS),
    "sequential": lambda o: lrs.SequentialLR(o, [lrs.LinearLR(o, 0.1), lrs.CosineAnnealingLR(o, 15)], [5]),
    "sequential, restarts": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1), lrs.CosineAnnealingWarmRestarts(o, 2, 2), lrs.StepLR(o, 2)], [4, 12]
    ),
    "chained": lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o, 0.1, 4), lrs.ExponentialLR(o, 0.9)]),
}
NESTED = {
    "sequential in chained": lambda o: lrs.ChainedScheduler([TORCH["sequential"](o), lrs.ExponentialLR(o, 0.9)]),
    "chained in sequential": lambda o: lrs.SequentialLR(o, [TORCH["chained"](o), lrs.StepLR(o, 2)], [6]),
}


def _deepspeed() -> dict[str, Any]:
    from deepspeed.runtime import lr_schedules

    return {
        "warmup": lambda o: lr_schedules.WarmupLR(o, warmup_max_lr=0.2, warmup_num_steps=6),
        "decay": lambda o: lr_schedules.WarmupDecayLR(o, NUM_STEPS, warmup_max_lr=0.2, warmup_num_steps=6),
        "cosine": lambda o: lr_schedules.WarmupCosineLR(o, NUM_STEPS, warmup_num_steps=6),
        "one cycle": lambda o: lr_schedules.OneCycle(o, 0.01, 0.1, cycle_first_step_size=5),
        "range test": lambda o: lr_schedules.LRRangeTest(o, 0.01, 5),
    }


def _real(make: Any, num_steps: int = NUM_STEPS, **options: Any) -> list[list[float]]:
    """The learning rates of every group, of a run whose optimizer and scheduler step."""
    optimizer = _optimizer(**options)
    scheduler, rates = make(optimizer), []
    for _ in range(num_steps):
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


def _check(make: Any, stepped: int, is_stated: bool = False, is_found: bool = False, **options: Any) -> None:
    """The sum, of a scheduler that has been stepped so often, and the rest of its run."""
    rates, optimizer = _real(make, **options), _optimizer(**options)
    scheduler = make(optimizer)
    for _ in range(stepped):
        optimizer.step()
        scheduler.step()
    before = _settings(optimizer, scheduler)
    totals = total_learning_rate(optimizer, None if is_found else scheduler, None if is_stated else NUM_STEPS)
    for number, total in enumerate(totals):
        assert total == sum(step[number] for step in rates), "the same additions in the same order"
    assert _settings(optimizer, scheduler) == before
    for step in range(stepped, NUM_STEPS):
        assert [float(group["lr"]) for group in optimizer.param_groups] == rates[step], step
        optimizer.step()
        scheduler.step()


def _settings(optimizer: Any, scheduler: Any) -> bytes:
    """All that a scheduler can change, as bytes."""
    state = {key: value for key, value in scheduler.state_dict().items() if "_fn_" not in key and "lambdas" not in key}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    file = io.BytesIO()
    torch.save([groups, repr(state)], file)
    return file.getvalue()


@pytest.mark.parametrize("stepped", [0, 1, 7, NUM_STEPS - 1])
@pytest.mark.parametrize("name", TORCH)
def test_schedulers_of_torch(name, stepped):
    _check(TORCH[name], stepped, is_stated=name == "one cycle")


@pytest.mark.parametrize("name", NESTED)
def test_nested_schedulers_of_torch(name):
    _check(NESTED[name], 0)
    optimizer = _optimizer()
    scheduler = NESTED[name](optimizer)
    optimizer.step()
    scheduler.step()
    with pytest.raises(ValueError, match="has been stepped already and cannot be put back"):
        total_learning_rate(optimizer, scheduler, NUM_STEPS)


@pytest.mark.parametrize("name", ["lambda", "cosine", "one cycle", "chained", "cyclic"])
def test_learning_rates_that_are_tensors(name):
    _check(TORCH[name], 0, lr="tensor")


@pytest.mark.parametrize("stepped", [0, 1, 7])
@pytest.mark.parametrize("name", ["warmup", "decay", "cosine", "one cycle", "range test"])
def test_schedulers_of_deepspeed(name, stepped):
    _check(_deepspeed()[name], stepped, is_stated=name in ("decay", "cosine"))


STATED = ("linear", "cosine", "cosine_with_restarts", "polynomial", "cosine_with_min_lr", "cosine_warmup_with_min_lr")
OPEN = ("constant", "constant_with_warmup", "inverse_sqrt")


@pytest.mark.parametrize("stepped", [0, 7])
def test_schedulers_of_transformers(stepped):
    """Every name that there is."""
    from transformers import SchedulerType, get_scheduler

    own = {"warmup_stable_decay": {"num_decay_steps": 5}, "cosine_with_min_lr": {"min_lr": 0.01}}
    own["cosine_warmup_with_min_lr"] = own["cosine_with_min_lr"]
    for name in (member.value for member in SchedulerType):

        def make(optimizer, name=name):
            return get_scheduler(name, optimizer, 3, NUM_STEPS, own.get(name))

        optimizer = _optimizer()
        scheduler = make(optimizer)
        if name in STATED or name == "warmup_stable_decay":
            _check(make, stepped, is_stated=True, is_found=True)
        elif name in OPEN:
            _check(make, stepped)
            with pytest.raises(ValueError, match="LambdaLR does not state it: pass num_steps"):
                total_learning_rate(optimizer)
        else:
            with pytest.raises(ValueError, match=r"depend on metrics, .* that depends on the step alone"):
                total_learning_rate(optimizer, num_steps=NUM_STEPS)
        del scheduler


def test_a_schedule_that_counts_is_not_called():
    optimizer = _optimizer()
    counting = Counting()
    scheduler = lrs.LambdaLR(optimizer, counting)
    calls = counting.calls
    assert total_learning_rate(optimizer, scheduler, NUM_STEPS)[0] > 0
    assert counting.calls == calls


class Wrapping:
    """As DeepSpeed's and accelerate's optimizers do it: the same list of groups."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups


def test_the_scheduler_of_the_same_groups_is_found():
    optimizer, other = _optimizer(), _optimizer()
    schedulers = [lrs.ExponentialLR(other, 0.5), TORCH["step"](optimizer)]
    expected = total_learning_rate(optimizer, schedulers[1], NUM_STEPS)
    assert total_learning_rate(optimizer, num_steps=NUM_STEPS) == expected
    assert total_learning_rate(Wrapping(optimizer), num_steps=NUM_STEPS) == expected
    assert expected != [0.1 * NUM_STEPS, 0.03 * NUM_STEPS]


def test_without_a_scheduler_the_rates_are_constant():
    """One that is left over in a circle does not count."""
    optimizer = _optimizer()
    left_over = TORCH["step"](optimizer)
    left_over.circle = left_over
    with_it = total_learning_rate(optimizer, num_steps=7)
    del left_over
    assert total_learning_rate(optimizer, num_steps=7) == [0.1 * 7, 0.03 * 7] != with_it
    with pytest.raises(ValueError, match="to know how long the run is, and there is no scheduler: pass num_steps"):
        total_learning_rate(optimizer)


def test_several_schedulers():
    """Those inside another one count as part of it; two beside each other are refused."""
    optimizer = _optimizer()
    outer = TORCH["sequential"](optimizer)
    expected = total_learning_rate(optimizer, outer, NUM_STEPS)
    assert total_learning_rate(optimizer, num_steps=NUM_STEPS) == expected
    beside = TORCH["step"](optimizer)
    with pytest.raises(ValueError, match=r"2 schedulers set .* \(SequentialLR, StepLR\), .*ChainedScheduler"):
        total_learning_rate(optimizer, num_steps=NUM_STEPS)
    del beside
    assert total_learning_rate(optimizer, num_steps=NUM_STEPS) == expected


def _accelerated(split_batches: bool) -> tuple[list[float], list[float], list[float]]:
    """The sums found, given the wrapper, and of the run, where accelerate steps the scheduler."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DataLoaderConfiguration
    from transformers import get_scheduler

    try:
        loading = DataLoaderConfiguration(split_batches=split_batches)
        accelerator = Accelerator(cpu=True, dataloader_config=loading)
        optimizer = _optimizer()
        scheduler = get_scheduler("linear", optimizer, 3, NUM_STEPS)
        prepared, wrapper = accelerator.prepare(optimizer, scheduler)
        found = total_learning_rate(optimizer)
        given = total_learning_rate(prepared, wrapper)
        used = [0.0, 0.0]
        for _ in range(NUM_STEPS if split_batches else NUM_STEPS // 2):
            used = [total + group["lr"] for total, group in zip(used, optimizer.param_groups, strict=True)]
            prepared.step()
            wrapper.step()
        assert max(group["lr"] for group in optimizer.param_groups) == 0, "the schedule is at its end"
        return found, given, used
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.mark.parametrize("split_batches", [False, True])
def test_accelerate_steps_once_for_every_process(ranks, split_batches):
    for found, given, used in ranks(2).run(_accelerated, split_batches):
        assert found == given == used


def _engine(is_in_config: bool) -> tuple[list[float], list[float]]:
    """The sums found for DeepSpeed's optimizer in a ZeRO-3 block, and those of the run."""
    import deepspeed

    model = cases.make_model(torch.bfloat16)
    optimizer = torch.optim.AdamW(
        [{"params": list(model.blocks.parameters())}, {"params": list(model.head.parameters())}]
    )
    scheduler = {"type": "WarmupDecayLR", "params": {"total_num_steps": 5, "warmup_num_steps": 2}}
    overrides = {"scheduler": scheduler} if is_in_config else {}
    client = None if is_in_config else TORCH["lambda"](optimizer)
    with lota.sparse_zero3(lota.Mask.from_dense(cases.make_masks())):
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=client,
            config=cases.config(1, 1, bf16={"enabled": True}, **overrides),
        )
        found = total_learning_rate(engine.optimizer, num_steps=None if is_in_config else 5)
        used = [0.0] * len(found)
        for step in range(1, 6):
            used = [total + group["lr"] for total, group in zip(used, engine.optimizer.param_groups, strict=True)]
            ((x, flags, target),) = cases.micro_batches(step, 1)
            logits = engine(x.bfloat16(), flags)
            engine.backward(torch.nn.functional.cross_entropy(logits.float(), target))
            engine.step()
        engine.destroy()
    return found, used


@pytest.mark.parametrize("is_in_config", [False, True])
def test_the_scheduler_of_an_engine_is_found(ranks, is_in_config):
    ((found, used),) = ranks(1).run(_engine, is_in_config)
    assert found == used and min(found) > 0


class Own(lrs.LRScheduler):
    """A scheduler of the user's with a count of its own."""

    count = 0

    def get_lr(self) -> list[float]:
        self.count += 1
        return [base / self.count for base in self.base_lrs]


def test_refused():
    optimizer = _optimizer()
    own = Own(optimizer)
    assert total_learning_rate(optimizer, own, 3) == [0.1 + 0.1 / 2 + 0.1 / 3, 0.03 + 0.03 / 2 + 0.03 / 3]
    own.step()
    with pytest.raises(ValueError, match="Own has been stepped already and cannot be put back to its beginning"):
        total_learning_rate(optimizer, own, 3)
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="num_steps must be a positive integer"):
            total_learning_rate(optimizer, own, wrong)
    with pytest.raises(ValueError, match="Wrapping is not a scheduler of a known kind"):
        total_learning_rate(optimizer, Wrapping(optimizer), 3)
    with pytest.raises(ValueError, match="ReduceLROnPlateau depend on metrics"):
        total_learning_rate(optimizer, lrs.ReduceLROnPlateau(optimizer), 3)
    single = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match="StepLR sets the learning rates of 1 parameter groups, the optimizer has 2"):
        total_learning_rate(optimizer, lrs.StepLR(single, 3), 3)
