"""Both kinds of activation checkpointing, weights shared between blocks, and leaf modules: no gradient is lost, and
frozen layers below the first trained one are backpropagated through only where reentrant checkpointing needs it."""

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


LAYERS = 3
KINDS = ["none", "reentrant", "non-reentrant", "deepspeed", "unknown", "hooks of transformers"]


def _language_model(is_mixture: bool) -> Any:
    import transformers

    torch.manual_seed(4)
    settings = {
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    if is_mixture:
        settings |= {"num_local_experts": 3, "num_experts_per_tok": 2}
    config = (transformers.MixtralConfig if is_mixture else transformers.LlamaConfig)(**settings)
    return transformers.AutoModelForCausalLM.from_config(config)


def _mask_of(model: Any, layer: int) -> dict[str, torch.Tensor]:
    """The MLP of one layer."""
    generator = torch.Generator().manual_seed(5)
    weights = {n: p for n, p in model.named_parameters() if f"layers.{layer}.mlp" in n and "gate.weight" not in n}
    return {name: torch.rand(p.shape, generator=generator) < 0.4 for name, p in weights.items()}


def _switch_on(model: Any, kind: str) -> None:
    import deepspeed

    if kind in ("reentrant", "non-reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
    elif kind == "deepspeed":
        model._set_gradient_checkpointing(True, deepspeed.checkpointing.checkpoint)
    elif kind == "unknown":
        model._set_gradient_checkpointing(True, lambda f, *args: checkpoint(f, *args, use_reentrant=True))
    elif kind == "hooks of transformers":
        model.enable_input_require_grads()


def _ids() -> torch.Tensor:
    return torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(6))


def _one_layer(kind: str, layer: int, is_leaf: bool, is_late: bool) -> dict[str, Any]:
    """Gradients of a mask over one layer's MLP; whether the first layer's output took part in the backward pass."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    model = _language_model(is_leaf).train()
    masks = _mask_of(model, layer)
    if is_leaf:
        deepspeed.utils.set_z3_leaf_modules(model, [type(model.model.layers[0].mlp)])
    if not is_late:
        _switch_on(model, kind)
    had_hooks = bool(getattr(model, "_require_grads_hooks", None))
    below = []
    with lota.sparse_zero3(lota.Mask.from_dense(masks)) as run:
        config = cases.config(1, torch.distributed.get_world_size())
        engine, *_ = deepspeed.initialize(model=model, optimizer=cases.default_optimizer(model), config=config)
        if is_late:
            _switch_on(model, kind)
        first = model.model.layers[0].register_forward_hook(lambda _, __, output: below.append(output.requires_grad))
        engine.backward(engine(input_ids=_ids(), labels=_ids()).loss)
        first.remove()
        gradients = {n: safe_get_full_grad(p).clone() for n, p in engine.module.named_parameters() if n in masks}
        engine.step()
        norm = float(engine.get_global_grad_norm())
        engine.destroy()
    run.release()
    return {
        "gradients": gradients,
        "norm": norm,
        "below": below[0],
        "hooks": (had_hooks, bool(getattr(model, "_require_grads_hooks", None))),
        "functions": torch.utils.checkpoint.CheckpointFunction.__name__,
    }


def _expected_of_layer(layer: int, is_mixture: bool) -> dict[str, torch.Tensor]:
    model = _language_model(is_mixture)
    model = model if is_mixture else model.double()  # stacked experts are multiplied in fp32 at most
    masks = _mask_of(model, layer)
    parameters = {name: p for name, p in model.named_parameters() if name in masks}
    gradients = torch.autograd.grad(model(input_ids=_ids(), labels=_ids()).loss, list(parameters.values()))
    return {name: g * masks[name] for name, g in zip(parameters, gradients, strict=True)}


def _check(results: list[dict[str, Any]], expected: dict[str, torch.Tensor]) -> None:
    norm = float(sum((g**2).sum() for g in expected.values()).sqrt())
    for result in results:
        assert result["norm"] == pytest.approx(norm, rel=1e-4)
        for name, gradient in result["gradients"].items():
            assert (gradient.double() - expected[name]).abs().max() < 1e-6 * max(1.0, norm), name
        assert result["hooks"][0] == result["hooks"][1] and result["functions"] == "CheckpointFunction"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_one_trained_layer(ranks, kind, layer):
    results = ranks(1).run(_one_layer, kind, layer, False, False)
    _check(results, _expected_of_layer(layer, is_mixture=False))
    is_needed = kind in ("reentrant", "deepspeed", "unknown")
    if layer > 0:
        assert results[0]["below"] == is_needed, "backward runs through frozen layers where it must, and only there"


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
@pytest.mark.parametrize("kind", ["none", "reentrant", "non-reentrant"])
def test_experts_of_one_layer_as_a_leaf_module(ranks, kind, layer):
    _check(ranks(2).run(_one_layer, kind, layer, True, False), _expected_of_layer(layer, is_mixture=True))


def test_checkpointing_switched_on_after_the_engine_was_built(ranks):
    results = ranks(2).run(_one_layer_late, LAYERS - 1)
    _check(results, _expected_of_layer(LAYERS - 1, is_mixture=False))


def _one_layer_late(layer: int) -> dict[str, Any]:
    return _one_layer("reentrant", layer, False, True) | {"hooks": (False, False)}
