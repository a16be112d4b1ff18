"""A checkpoint of any number of ranks, shard group and reduction resumes with any other: bit for bit where sums have
the same order, and else within the bounds of the comparison with dense training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import lota
from tests.zero import cases

STEPS, STOP = 6, 3  # and 3 x 2 micro steps are no whole number of steps of 4
# (ranks, shard group, reduction) of those that write a checkpoint and of those that go on from it
LAYOUTS = [
    *((1, 1, "compact"), (1, 1, "dense"), (2, 1, "compact"), (2, 1, "dense"), (2, 2, "compact"), (2, 2, "dense")),
    *((4, 1, "compact"), (4, 1, "dense"), (4, 2, "compact"), (4, 2, "dense"), (4, 4, "compact"), (4, 4, "dense")),
]
WRITERS = [(1, 1, "compact"), (2, 1, "dense"), (2, 2, "compact"), (4, 2, "compact"), (4, 4, "dense")]
BOUND = 1e-5  # of a vector's largest value: fp32 sums in another order


def _train(kind: str, shards: int | None, reduction: str, micro_steps: int, offload: str, stages: list[Any]) -> Any:
    """Steps of one run; stages: ("steps", first, last), ("save", folder), ("load", folder). What it ends with."""
    import deepspeed

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    masks = lota.Mask.from_dense(cases.make_masks())
    block = (
        lota.sparse_zero3(masks, shard_group_size=shards, gradient_reduction=reduction)
        if kind == "sparse"
        else lota.calibration_zero3(score=kind, density=0.1, include=["blocks*"])
    )
    zero = {offload: {"device": "cpu"}} if offload else {}
    with block:
        model = cases.make_model()
        optimizer = cases.default_optimizer(model)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        config = cases.config(micro_steps, world, zero=zero)
        config["train_micro_batch_size_per_gpu"] = 2 * cases.ROWS // (world * micro_steps)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)
        for what, *where in stages:
            if what == "save":
                engine.save_checkpoint(*where)
            elif what == "load":
                engine.load_checkpoint(*where)
            else:
                for step in range(where[0], where[1] + 1):
                    _step(engine, step, micro_steps, rank, world, uses_all=kind == "task_vector")
        pieces = [(v.key, v.start, v.get().cpu().clone()) for v in engine.run.core.vectors()]
        steps = engine.global_steps
        engine.destroy()
    engine.run.release()
    gathered: list[Any] = [None] * world
    torch.distributed.all_gather_object(gathered, pieces)
    found = {(key, start): piece for own in gathered for key, start, piece in own}
    names = sorted({key for key, _ in found})
    return steps, {n: torch.cat([found[at] for at in sorted(found) if at[0] == n]) for n in names}


def _step(engine: Any, step: int, micro_steps: int, rank: int, world: int, uses_all: bool) -> None:
    """The rows of a step are the same and in the same order, however many micro steps and ranks share them."""
    x, flags, target = map(torch.cat, zip(*cases.micro_batches(step, 2), strict=True))
    if uses_all:
        flags.fill_(True)  # DeepSpeed's own ZeRO-3 hangs where ranks use different weights
    size = len(x) // (micro_steps * world)
    for micro_step in range(micro_steps):
        first = (micro_step * world + rank) * size
        rows = slice(first, first + size)
        engine.backward(F.cross_entropy(engine(x[rows], flags[rows]), target[rows]))
        engine.step()


def _all(jobs: list[tuple[Any, ...]]) -> list[Any]:
    return [_train(*job) for job in jobs]


def _micro_steps(world: int) -> int:
    return {1: 4, 2: 2, 4: 2}[world]


def _assert_within(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and expected
    for key, values in expected.items():
        assert (found[key] - values).abs().max() <= BOUND * values.abs().max(), key


@pytest.fixture(scope="module")
def written(ranks, tmp_path_factory) -> dict[Any, tuple[Path, Any]]:
    """By layout of the writer: the checkpoint after STOP steps, and what the run had after all of them."""
    found = {}
    for layout in WRITERS:
        world, shards, reduction = layout
        folder = tmp_path_factory.mktemp("written")
        stages = [("steps", 1, STOP), ("save", str(folder)), ("steps", STOP + 1, STEPS)]
        job = ("sparse", shards, reduction, _micro_steps(world), "", stages)
        found[layout] = folder, ranks(world).run(_all, [job])[0][0]
    return found


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_every_layout_goes_on_from_every_other(ranks, written, world) -> None:
    readers = [layout for layout in LAYOUTS if layout[0] == world]
    jobs, pairs = [], []
    for writer, (folder, _) in written.items():
        for reader in readers if writer == WRITERS[3] else readers[-2:]:
            stages = [("load", str(folder)), ("steps", STOP + 1, STEPS)]
            jobs.append(("sparse", reader[1], reader[2], _micro_steps(world), "", stages))
            pairs.append((writer, reader))
    results = ranks(world).run(_all, jobs)[0]
    for (writer, reader), (steps, vectors) in zip(pairs, results, strict=True):
        straight_steps, straight = written[writer][1]
        assert steps == straight_steps == STEPS
        _assert_within(vectors, straight)
        if writer[0] == reader[0] and (world < 4 or writer[1] == reader[1]):  # of two numbers the order does not matter
            assert all(torch.equal(vectors[key], straight[key]) for key in straight), (writer, reader)


def test_offload_may_change(ranks, written) -> None:
    folder, (_, straight) = written[(2, 2, "compact")]
    stages = [("load", str(folder)), ("steps", STOP + 1, STEPS)]
    (_, vectors) = ranks(2).run(_all, [("sparse", 2, "compact", 2, "offload_param", stages)])[0][0]
    assert all(torch.equal(vectors[key], straight[key]) for key in straight)


@pytest.mark.parametrize("score", ["gradient", "fisher", "task_vector"])
def test_calibration_goes_on_with_other_ranks(ranks, tmp_path, score) -> None:
    stages = [("steps", 1, STOP), ("save", str(tmp_path)), ("steps", STOP + 1, STEPS)]
    _, straight = ranks(2).run(_all, [(score, None, "auto", 2, "", stages)])[0][0]
    stages = [("load", str(tmp_path)), ("steps", STOP + 1, STEPS)]
    for world, micro_steps in ((2, 2), (1, 4), (4, 1)):
        steps, vectors = ranks(world).run(_all, [(score, None, "auto", micro_steps, "", stages)])[0][0]
        assert steps == STEPS
        _assert_within(vectors, straight)
        if world == 2:
            assert all(torch.equal(vectors[key], straight[key]) for key in straight)
