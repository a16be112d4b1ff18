"""Both kinds of activation checkpointing, weights shared between blocks, and leaf modules: no gradient is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lota
from tests.zero import cases


class Shared(nn.Module):
    """One block applied three times; under reentrant checkpointing each use gives its weights a gradient of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed = nn.Linear(5, cases.WIDTH)
        self.mlp = nn.Sequential(nn.Linear(cases.WIDTH, 31), nn.Tanh(), nn.Linear(31, cases.WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x).requires_grad_()
        for _ in range(3):
            if self.kind == "none":
                h = h + self.mlp(h)
            else:
                h = h + checkpoint(self.mlp, h, use_reentrant=self.kind == "reentrant")
        return h[:, :3]


def _make(kind: str) -> Shared:
    torch.manual_seed(1)
    return Shared(kind)


def _masks() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    weights = {name: p for name, p in _make("none").named_parameters() if "mlp" in name and p.dim() == 2}
    return {name: torch.rand(p.shape, generator=generator) < 0.4 for name, p in weights.items()}


def _gradients(kind: str, reduce_every: str, leaf: bool) -> dict[str, Any]:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model, masks = _make(kind), _masks()
    if leaf:
        deepspeed.utils.set_z3_leaf_modules(model, [nn.Sequential])
    with lota.sparse_zero3(lota.Mask.from_dense(masks), reduce_every=reduce_every):
        config = cases.config(2, world, zero={"reduce_bucket_size": 100})
        engine, *_ = deepspeed.initialize(model=model, optimizer=cases.default_optimizer(model), config=config)
        rows = slice(rank * cases.ROWS // world, (rank + 1) * cases.ROWS // world)
        for x, _, target in cases.micro_batches(1, 2):
            engine.backward(F.cross_entropy(engine(x[rows]), target[rows]))
            if not engine.is_gradient_accumulation_boundary():
                engine.step()
        if reduce_every == "step":
            engine.step()
            gradients = {}
        else:
            gradients = {n: safe_get_full_grad(p).clone() for n, p in engine.module.named_parameters() if n in masks}
            engine.step()
        result = {"gradients": gradients, "norm": float(engine.get_global_grad_norm())}
        engine.destroy()
    return result


@pytest.fixture(scope="module")
def expected():
    model, masks = _make("none").double(), _masks()
    loss = sum(F.cross_entropy(model(x.double()), target) / 2 for x, _, target in cases.micro_batches(1, 2))
    parameters = {name: p for name, p in model.named_parameters() if name in masks}
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return {name: g * masks[name] for name, g in zip(parameters, gradients, strict=True)}


@pytest.mark.parametrize("kind", ["none", "reentrant", "non-reentrant"])
@pytest.mark.parametrize(("reduce_every", "leaf"), [("micro_step", False), ("step", False), ("micro_step", True)])
def test_no_gradient_is_lost(ranks, expected, kind, reduce_every, leaf):
    norm = float(sum((g**2).sum() for g in expected.values()).sqrt())
    for result in ranks(2).run(_gradients, kind, reduce_every, leaf):
        assert result["norm"] == pytest.approx(norm, rel=1e-5)
        for name, gradient in result["gradients"].items():
            assert (gradient.double() - expected[name]).abs().max() < 2e-6, name
