"""A model may keep some of its tensors in fp32, as `zero.Init` leaves them: each trains, is scored and ends in the
ticket in its own dtype, on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lota
from tests.zero import cases

LR = 1e-2
IN_FP32 = ("mlp.0.weight", "head.weight")


class Mixed(nn.Module):
    """Every layer computes in the dtype of its weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.mlp = nn.ModuleList([nn.Linear(5, 16, bias=False), nn.Linear(16, 17, bias=False)])
        self.head = nn.Linear(17, 3, bias=False)
        self.to(torch.bfloat16)
        for name in IN_FP32:
            self.get_submodule(name.removesuffix(".weight")).float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.mlp:
            x = torch.tanh(layer(x.to(_dtype(layer))))
        return self.head(x.to(_dtype(self.head)))


def _dtype(layer: nn.Module) -> torch.dtype:
    return layer.weight.dtype


def _config() -> dict[str, Any]:
    return cases.config(1, torch.distributed.get_world_size(), bf16={"enabled": True}, gradient_clipping=0.0)


def _train(model: nn.Module, steps: int) -> Any:
    """The engine, after `steps` on rows that all ranks share out."""
    import deepspeed

    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=_config())[0]
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x, target = torch.randn(8, 5, generator=generator), torch.randint(0, 3, (8,), generator=generator)
        rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
        engine.backward(F.cross_entropy(engine(x[rows]).float(), target[rows]))
        engine.step()
    return engine


def _sharded() -> nn.Module:
    import deepspeed

    model = Mixed()
    deepspeed.zero.Init(module=model, config_dict_or_path=_config())
    return model


def _sparse(path: str) -> dict[str, Any]:
    base = {name: param.detach().clone() for name, param in Mixed().named_parameters()}
    generator = torch.Generator().manual_seed(1)
    mask = lota.Mask.from_dense({n: torch.rand(w.shape, generator=generator) < 0.3 for n, w in base.items()})
    with lota.sparse_zero3(mask) as run:
        engine = _train(_sharded(), 3)
        run.save_ticket(path)
        trained = cases.gathered(engine.module)
        engine.destroy()
    run.release()
    return {"base": base, "trained": trained, "mask": mask}


def _calibrate(score: str) -> dict[str, torch.Tensor]:
    with lota.calibration_zero3(score=score, density=0.5, include=["*"]) as run:
        engine = _train(_sharded(), 1)
        found = {name: scores.clone() for name, _, scores in run._run.scores()}
        run.mask()
        engine.destroy()
    return found


@pytest.mark.parametrize("size", [1, 2])
def test_sparse_training_and_its_ticket(ranks, size, tmp_path: Path):
    got = ranks(size).run(_sparse, str(tmp_path / "ticket"))[0]
    base, trained, mask = got["base"], got["trained"], got["mask"]
    for name, weight in base.items():
        frozen = ~mask.dense(name)
        assert trained[name].dtype == weight.dtype == (torch.float32 if name in IN_FP32 else torch.bfloat16)
        assert torch.equal(trained[name][frozen], weight[frozen])
        assert (trained[name] != weight).any()
    model, ticket = Mixed(), lota.Ticket.load(tmp_path / "ticket")
    applied = lota.apply_(model, ticket)
    assert all(torch.equal(param, trained[name]) for name, param in model.named_parameters())
    applied.revert()
    assert all(torch.equal(param, base[name]) for name, param in model.named_parameters())


@pytest.mark.parametrize("size", [1, 2])
def test_calibration_by_dense_training_moves_every_dtype(ranks, size):
    """AdamW's first step moves every weight with a gradient by the learning rate, whatever its dtype."""
    for found in ranks(size).run(_calibrate, "task_vector"):
        for name, scores in found.items():
            moved = scores[scores != 0].abs()
            assert moved.numel() > scores.numel() // 2, name
            assert torch.allclose(moved.median(), torch.tensor(LR), rtol=1e-3), name


@pytest.mark.parametrize("size", [1, 2])
def test_calibration_by_gradients_scores_every_dtype(ranks, size):
    for found in ranks(size).run(_calibrate, "gradient"):
        assert all((scores > 0).any() for scores in found.values())


def _offloaded() -> None:
    with lota.calibration_zero3(density=0.5, include=["*"]):
        import deepspeed

        model = _sharded()
        config = _config()
        config["zero_optimization"]["offload_param"] = {"device": "cpu"}
        deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)


def test_offloaded_weights_of_several_dtypes_are_refused(ranks):
    (outcome,) = ranks(1).outcomes(_offloaded)
    assert outcome.error_type == "ValueError"
    assert "several dtypes" in outcome.error
