"""Stochastic rounding of bf16 weights under ZeRO-3 gives the bits of `lota.optim`, whatever ranks, shard groups,
sub-groups and reductions there are, also in a resumed run; whatever cannot round so is refused before training."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import lota
from lota.optim import MaskedAdamW, MaskedRMSprop
from tests.zero import cases

ROWS, STEPS, STOP, SEED = 8, 4, 2, 12345
SHAPES = {"a": (5, 7), "b": (3, 11), "c": (41, 29), "d": (2, 1)}


class Model(nn.Module):
    """Gradients are sums of small integers, exact in bf16 and in any order, so that all layouts have the same ones."""

    def __init__(self) -> None:
        super().__init__()
        for name, (width, out) in SHAPES.items():
            setattr(self, name, nn.Linear(width, out, bias=False))

    def forward(self, inputs: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> torch.Tensor:
        products = [(getattr(self, name)(inputs[name]) * targets[name]).float().sum() for name in SHAPES]
        return torch.stack(products).sum()


def _model(dtype: torch.dtype = torch.bfloat16) -> Model:
    torch.manual_seed(7)
    return Model().to(dtype)


def _mask() -> lota.Mask:
    generator = torch.Generator().manual_seed(9)
    masks = {}
    for name, (width, out) in SHAPES.items():
        masks[f"{name}.weight"] = torch.rand(out, width, generator=generator) < 0.4
    masks["b.weight"][:] = False  # frozen, and no place of its own
    masks["d.weight"][:] = True
    return lota.Mask.from_dense({name: masks[name] for name in reversed(masks)})  # not in the model's order


def _batch(step: int, rows: slice) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    inputs, targets = {}, {}
    for name, (width, out) in SHAPES.items():
        inputs[name] = torch.randint(-1, 2, (ROWS, width), generator=generator)[rows].bfloat16()
        targets[name] = torch.randint(-2, 3, (ROWS, out), generator=generator)[rows].bfloat16()
    return inputs, targets


ADAMW = {"lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
RMSPROP = {"lr": 3e-3, "weight_decay": 0.1}


def _optimizer(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(model.parameters(), **ADAMW)
    return torch.optim.RMSprop(model.parameters(), **RMSPROP)


def _train(kind: str, seed: int | None, shards: int | None, reduction: str, stages: list[Any], **zero: Any) -> Any:
    """Steps of one run; stages: ("steps", first, last), ("save", folder), ("load", folder). Its weights after each."""
    import deepspeed

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    rows = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    block = lota.sparse_zero3(_mask(), shard_group_size=shards, gradient_reduction=reduction, rounding_seed=seed)
    weights = []
    with block as run:
        model = _model()
        config = cases.config(1, world, zero=zero, gradient_clipping=0.0, bf16={"enabled": True})
        config["train_micro_batch_size_per_gpu"] = ROWS // world
        engine, *_ = deepspeed.initialize(model=model, optimizer=_optimizer(kind, model), config=config)
        for what, *where in stages:
            if what == "save":
                engine.save_checkpoint(*where)
            elif what == "load":
                engine.load_checkpoint(*where)
            else:
                for step in range(where[0], where[1] + 1):
                    engine.backward(engine(*_batch(step, rows)) * world / ROWS)
                    engine.step()
            weights.append(cases.gathered(engine.module))
        assert run.report()["rounding_seed"] == seed
        engine.destroy()
    run.release()
    return weights


def _all(jobs: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Any]:
    return [_train(*arguments, **zero) for arguments, zero in jobs]


def _masked(kind: str, seed: int | None) -> list[dict[str, torch.Tensor]]:
    """The same steps by `lota.optim` on whole tensors; the weights after STOP and after all."""
    model, found = _model(), []
    made = MaskedAdamW if kind == "adamw" else MaskedRMSprop
    optimizer: Any = made(model, _mask(), **(ADAMW if kind == "adamw" else RMSPROP), rounding_seed=seed)
    for step in range(1, STEPS + 1):
        model.zero_grad()
        (model(*_batch(step, slice(None))) / ROWS).backward()
        optimizer.step()
        if step in (STOP, STEPS):
            found.append({name: param.detach().clone() for name, param in model.named_parameters()})
    return found


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


LAYOUTS = {
    1: [(None, "compact", {}), (None, "dense", {}), (None, "compact", {"sub_group_size": 100})],
    2: [(None, "compact", {}), (1, "compact", {}), (None, "dense", {"sub_group_size": 100})],
    4: [(None, "compact", {}), (2, "dense", {}), (None, "compact", {"offload_param": {"device": "cpu"}})],
}


@pytest.mark.parametrize("kind", ["adamw", "rmsprop"])
def test_bits_are_those_of_the_masked_optimizer_on_any_layout(ranks, tmp_path, kind):
    expected = _masked(kind, SEED)
    assert not _equal(expected[-1], _masked(kind, None)[-1]), "some weights are rounded differently"
    assert not _equal(expected[-1], _masked(kind, SEED + 1)[-1])
    for world in (1, 2, 4) if kind == "adamw" else (2,):
        stages = [("steps", 1, STOP), ("steps", STOP + 1, STEPS)]
        jobs = [((kind, SEED, shards, reduction, stages), zero) for shards, reduction, zero in LAYOUTS[world]]
        jobs.append(((kind, None, None, "compact", stages), {}))
        for found in ranks(world).run(_all, jobs):
            for weights in found[:-1]:
                assert all(_equal(one, other) for one, other in zip(weights, expected, strict=True))
            assert _equal(found[-1][-1], _masked(kind, None)[-1]), "the gradients of all layouts are the same"


@pytest.mark.parametrize("kind", ["adamw", "rmsprop"])
def test_a_resumed_run_has_the_same_bits_on_any_ranks(ranks, tmp_path, kind):
    """Checkpoints hold masters; the weights of the last step are rounded from them once more."""
    expected = _masked(kind, SEED)
    stages: list[Any] = [("save", str(tmp_path / "begin")), ("steps", 1, STOP), ("save", str(tmp_path / "middle"))]
    ranks(2).run(_all, [((kind, SEED, None, "compact", stages), {})])
    for world, shards in ((1, None), (2, 1)):
        resumed = [("load", str(tmp_path / "middle")), ("steps", STOP + 1, STEPS)]
        begun = [("load", str(tmp_path / "begin")), ("steps", 1, STEPS)]
        jobs = [((kind, SEED, shards, "compact", stage), {}) for stage in (resumed, begun)]
        for middle, begin in ranks(world).run(_all, jobs):
            assert all(_equal(one, other) for one, other in zip(middle, expected, strict=True))
            assert _equal(begin[0], dict(_model().named_parameters())) and _equal(begin[1], expected[1])


def test_another_seed_is_refused_when_a_run_is_resumed(ranks, tmp_path):
    stages = [("steps", 1, 1), ("save", str(tmp_path))]
    ranks(1).run(_all, [(("adamw", SEED, None, "compact", stages), {})])
    for seed, message in ((None, "seed: 12345; this run has None"), (6, "seed: 12345; this run has 6")):
        (outcome,) = ranks(1).outcomes(_all, [(("adamw", seed, None, "compact", [("load", str(tmp_path))]), {})])
        assert f"made with another rounding {message}" in outcome.error, outcome.error


def _refused(kind: str) -> None:
    import deepspeed

    cases.allow_fp16_on_cpu()
    model = _model(torch.float16 if kind == "fp16" else torch.float32 if kind == "fp32" else torch.bfloat16)
    config = cases.config(1, 1, **({"fp16": {"enabled": True}} if kind == "fp16" else {}))
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if kind == "amsgrad":
        optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    elif kind != "sgd":
        optimizer = torch.optim.AdamW(model.parameters())
    with lota.sparse_zero3(_mask(), rounding_seed=SEED):
        deepspeed.initialize(model=model, optimizer=optimizer, config=config)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("fp32", r"rounding_seed=12345 rounds bf16 weights .* d\.weight is float32: load the model in bf16"),
        ("fp16", r"rounding_seed=12345 rounds bf16 weights .* is float16"),
        ("sgd", r"rounding_seed=12345 .* kernels of AdamW and RMSprop; optimizer SGD .* leave rounding_seed out"),
        ("amsgrad", r"rounding_seed=12345 .* optimizer AdamW with these settings runs as it is"),
    ],
)
def test_what_cannot_round_so_is_refused(ranks, kind, message):
    (outcome,) = ranks(1).outcomes(_refused, kind)
    assert outcome.error_type == "ValueError" and re.search(message, outcome.error, re.S), outcome.error


@pytest.mark.parametrize("seed", [-1, 1 << 63, 0.5, "1", True])
def test_seeds(seed):
    message = r"rounding_seed must be an integer in \[0, 2\*\*63\)"
    with pytest.raises(ValueError, match=message), lota.sparse_zero3(_mask(), rounding_seed=seed):
        pass
