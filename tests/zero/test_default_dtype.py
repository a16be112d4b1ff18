"""`torch.set_default_dtype` changes nothing: scores, masters, moments and tickets have the same bits under any."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import lota
from tests.zero import cases

STEPS, ACCUMULATION = 2, 2


def _under(default: str, phase: str, options: dict[str, Any], folder: str) -> dict[str, Any]:
    """One phase whose model and data are made before the default is set."""
    import deepspeed

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model, mask = cases.make_model(torch.bfloat16), lota.Mask.from_dense(cases.make_masks())
    batches = [cases.micro_batches(step, ACCUMULATION) for step in range(STEPS)]
    rows = slice(rank * cases.ROWS // world, (rank + 1) * cases.ROWS // world)
    options = dict(options)
    make_optimizer = options.pop("make_optimizer", cases.default_optimizer)
    accumulation = options.pop("accumulation", ACCUMULATION)
    block: Any = (
        lota.sparse_zero3(mask, **options)
        if phase == "sparse"
        else lota.calibration_zero3(density=0.2, include=["*blocks*"], **options)
    )
    torch.set_default_dtype(getattr(torch, default))
    try:
        with block as run:
            config = cases.config(accumulation, world, bf16={"enabled": True})
            engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model), config=config)
            for micro_batches in batches:
                for x, flags, target in micro_batches:
                    logits = engine(x[rows].bfloat16(), flags[rows])
                    engine.backward(F.cross_entropy(logits.float(), target[rows]))
                    engine.step()
        if phase == "sparse":
            run.save_ticket(folder)
            states = run.core.states
            found = {f"{n} master": state.master.clone() for n, state in enumerate(states)}
            found |= {f"{n} {kind}": v.clone() for n, state in enumerate(states) for kind, v in state.moments.items()}
            run.release()
        else:
            found = {name: values.clone() for name, _, values in run._run.scores()}
            chosen = run.mask()
            found["mask"] = torch.cat([chosen.dense(name).flatten() for name in found])
        engine.destroy()
    finally:
        torch.set_default_dtype(torch.float32)
    return found


def _all(phase: str, options: dict[str, Any], folder: str) -> list[dict[str, Any]]:
    return [_under(kind, phase, options, f"{folder}/{kind}") for kind in ("float32", "bfloat16", "float64")]


def _sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("phase", "options"),
    [
        ("sparse", {}),
        ("sparse", {"reduce_every": "step", "make_optimizer": _sgd}),
        ("sparse", {"gradient_reduction": "dense"}),
        ("calibration", {"score": "gradient"}),
        ("calibration", {"score": "fisher", "accumulation": 1}),
    ],
)
def test_the_same_bits_under_any_default(ranks, tmp_path, world, phase, options):
    for expected, *others in ranks(world).run(_all, phase, options, str(tmp_path)):
        assert all(value.dtype in (torch.float32, torch.bool) for value in expected.values())
        for other in others:
            assert other.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(other[name], value) and other[name].dtype == value.dtype, name
    for kind in ("bfloat16", "float64") if phase == "sparse" else ():
        one, other = (lota.Ticket.load(tmp_path / name) for name in ("float32", kind))
        assert one.mask == other.mask
        for name in one.names:
            assert torch.equal(one.values(name), other.values(name))
            assert torch.equal(one.base_values(name), other.base_values(name))
