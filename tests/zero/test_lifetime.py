"""What surrounds a run: boundaries set by hand, zero_grad, failures inside a block, and what is left after it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import lota
from tests.zero import cases


def _initialize(model: torch.nn.Module, accumulation: int = 1, optimizer: Any = None) -> Any:
    import deepspeed

    world = torch.distributed.get_world_size()
    optimizer = optimizer or cases.default_optimizer(model)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=cases.config(accumulation, world))[0]


def _loss(engine: Any, step: int) -> torch.Tensor:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    rows = slice(rank * cases.ROWS // world, (rank + 1) * cases.ROWS // world)
    ((x, flags, target),) = cases.micro_batches(step, 1)
    return F.cross_entropy(engine(x[rows], flags[rows]), target[rows])


def _manual_boundary(reduce_every: str, late: bool) -> float:
    """Two micro steps whose boundary the caller sets, before the last backward or only after it."""
    with lota.sparse_zero3(lota.Mask.from_dense(cases.make_masks()), reduce_every=reduce_every):
        engine = _initialize(cases.make_model())
        for micro in (1, 2):
            engine.set_gradient_accumulation_boundary(micro == 2 and not late)
            engine.backward(_loss(engine, micro) / 2)
        engine.set_gradient_accumulation_boundary(True)
        engine.step()
        norm = float(engine.get_global_grad_norm())
        engine.destroy()
    return norm


def test_boundaries_set_by_hand(ranks):
    norms = [
        ranks(2).run(_manual_boundary, reduce_every, late)[0]
        for reduce_every in ("micro_step", "step")
        for late in (False, True)
    ]
    assert norms[0] > 0.1
    assert norms == pytest.approx([norms[0]] * 4, rel=1e-6)


def _zero_grad(discards: bool) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_grad

    masks = cases.make_masks()
    with lota.sparse_zero3(lota.Mask.from_dense(masks)):
        engine = _initialize(cases.make_model())
        if discards:
            engine.backward(_loss(engine, 1))
            engine.optimizer.zero_grad()
        engine.backward(_loss(engine, 2))
        gradients = {n: safe_get_full_grad(p).clone() for n, p in engine.module.named_parameters() if n in masks}
        engine.destroy()
    return gradients


def test_zero_grad_forgets(ranks):
    for kept, fresh in zip(ranks(2).run(_zero_grad, True), ranks(2).run(_zero_grad, False), strict=True):
        assert all(torch.equal(kept[name], fresh[name]) for name in fresh)


def _some_parameters(score: str) -> None:
    model = cases.make_model()
    with lota.calibration_zero3(score=score, include=["*blocks*"]):
        _initialize(model, optimizer=torch.optim.AdamW(model.blocks[0].parameters(), lr=0.1))


@pytest.mark.parametrize("score", ["gradient", "task_vector"])
def test_calibration_wants_every_eligible_tensor_in_the_optimizer(ranks, score):
    for outcome in ranks(2).outcomes(_some_parameters, score):
        assert outcome.error_type == "ValueError" and "calibration scores blocks.1." in outcome.error, outcome.error


def _fail_inside() -> dict[str, Any]:
    import deepspeed

    before = deepspeed.DeepSpeedEngine
    model = cases.make_model()
    try:
        with lota.sparse_zero3(lota.Mask.from_dense(cases.make_masks())):
            engine = _initialize(model)
            raise KeyError("the script's own")
    except KeyError as error:
        seen = str(error)
    engine.destroy()
    return {
        "restored": deepspeed.DeepSpeedEngine is before,
        "trainable": all(param.requires_grad for param in model.parameters()),
        "seen": seen,
    }


def test_a_failure_inside_leaves_nothing_behind(ranks):
    for result in ranks(2).run(_fail_inside):
        assert result == {"restored": True, "trainable": True, "seen": '"the script\'s own"'}


def _afterwards() -> dict[str, Any]:
    """Train after the block, build a second block on the same model, take the mask twice."""
    errors = {}
    model = cases.make_model()
    with lota.calibration_zero3(score="gradient", density=0.2, include=["*blocks*"]) as calibration:
        engine = _initialize(model)
        engine.backward(_loss(engine, 1))
        engine.step()
    groups = len(torch.distributed.distributed_c10d._world.pg_map)
    mask = calibration.mask()
    fewer_groups = len(torch.distributed.distributed_c10d._world.pg_map) < groups
    for name, attempt in {
        "train": lambda: _loss(engine, 2),
        "mask": calibration.mask,
        "second block": lambda: _second_block(model, mask),
    }.items():
        try:
            attempt()
        except (RuntimeError, ValueError) as error:
            errors[name] = str(error)
    engine.destroy()
    report = _second_block(model, mask)
    return {"errors": errors, "fewer_groups": fewer_groups, "steps": report["steps"]}


def _second_block(model: torch.nn.Module, mask: lota.Mask) -> dict[str, Any]:
    with lota.sparse_zero3(mask) as run:
        engine = _initialize(model)
        engine.backward(_loss(engine, 1))
        engine.step()
        report = run.report()
        engine.destroy()
    run.release()
    return report


def test_after_the_block(ranks):
    for result in ranks(2).run(_afterwards):
        assert "block of this engine has ended" in result["errors"]["train"]
        assert "mask() released the scores" in result["errors"]["mask"]
        assert "belongs to the engine of an earlier lota block" in result["errors"]["second block"]
        assert result["fewer_groups"]
        assert result["steps"] == 1, "the same model trains in a second block once the first engine is destroyed"


def _left_alive(destroys: bool) -> list[str]:
    """What of a dense calibration is still there when the script has dropped it, and the sparse run would begin."""
    model = cases.make_model()
    with lota.calibration_zero3(score="task_vector", density=0.2, include=["*blocks*"]) as calibration:
        engine = _initialize(model)
        # Dense ZeRO-3 wants the same weights in use on every rank.
        engine.backward(engine(torch.ones(2, 5), torch.ones(2, 2, dtype=torch.bool)).sum())
        engine.step()
        masters = engine.optimizer.fp32_partitioned_groups_flat[0]
        (moment,) = {id(s["exp_avg"]): s["exp_avg"] for s in engine.optimizer.optimizer.state.values()}.values()
        things = {"engine": engine, "model": model, "masters": masters, "moment": moment}
        seen = {name: weakref.ref(thing) for name, thing in things.items()}
    if destroys:
        engine.destroy()
    del engine, model, masters, moment, things
    calibration.mask()  # drops the engine, too
    if destroys:
        gc.collect()
    return [name for name, reference in seen.items() if reference() is not None]


@pytest.mark.parametrize("destroys", [False, True])
def test_dense_states_end_with_the_mask(ranks, destroys):
    """DeepSpeed's process-wide lists would keep 16 bytes a parameter beside the sparse run."""
    assert ranks(2).run(_left_alive, destroys) == [[], []]


def _device_before_collectives() -> list[str]:
    """What happens, in order, while an engine is built on a model that was made outside of `zero.Init`."""
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator

    events: list[str] = []

    def recorded(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            events.append(name)
            return function(*args, **kwargs)

        return call

    names = ("all_reduce", "all_gather_object", "all_to_all_single", "broadcast_object_list", "broadcast")
    before = {name: getattr(dist, name) for name in names}
    accelerator = get_accelerator()
    set_device = accelerator.set_device
    try:
        for name in names:
            setattr(dist, name, recorded(name, before[name]))
        accelerator.set_device = recorded("set_device", set_device)
        with lota.sparse_zero3(lota.Mask.from_dense(cases.make_masks())):
            _initialize(cases.make_model()).destroy()
    finally:
        accelerator.set_device = set_device
        for name in names:
            setattr(dist, name, before[name])
    return events


def test_a_rank_has_its_device_before_it_talks_to_others(ranks):
    for events in ranks(2).run(_device_before_collectives):
        assert "all_reduce" in events
        assert events[0] == "set_device"


def _steps_without_an_engine(where: str) -> tuple[str, bool]:
    """The error of a plain training loop inside a block, and whether the model's weights moved."""
    model = cases.make_model()
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    block = lota.calibration_zero3() if where == "calibration" else lota.sparse_zero3(_mask())
    error = ""
    try:
        with block:
            optimizer.step()
    except ValueError as caught:
        error = str(caught)
    moved = any(not torch.equal(param, value) for param, value in zip(model.parameters(), before, strict=True))
    optimizer.step()  # outside of the block nobody minds
    return error, moved


def _mask() -> lota.Mask:
    return lota.Mask.from_dense(cases.make_masks())


@pytest.mark.parametrize("where", ["calibration", "sparse"])
def test_a_trainer_without_deepspeed_is_stopped_at_its_first_step(ranks, where):
    ((error, moved),) = ranks(1).run(_steps_without_an_engine, where)
    assert "before a DeepSpeed engine was built" in error
    assert not moved
