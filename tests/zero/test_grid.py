"""Ranks, shard groups and reductions make no difference: a model from files trains as one dense process would.

1, 2 and 4 ranks, shard groups of 1, 2 and 4, both reductions; `from_pretrained` under ZeRO-3; 20 steps in fp32 against
float64; some ranks have no gradient for some weights. What crosses shard groups is counted below torch.distributed.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import lota
from tests.counting import Collectives
from tests.zero import cases

STEPS, DENSITY, ROWS, LENGTH, VOCABULARY = 20, 0.2, 8, 6, 48


class FlaggedMLP(LlamaMLP):
    """An MLP with a weight that only flagged rows use: it is gathered on every rank, and some have no gradient."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.extra = nn.Parameter(torch.randn(config.hidden_size, config.hidden_size) * 0.2)
        self.flags = torch.zeros(1, dtype=torch.bool)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        if bool(self.flags.any()):
            y = y + torch.where(self.flags[:, None, None], F.linear(x, self.extra), torch.zeros_like(x))
        return y


class FlaggedLlama(LlamaForCausalLM):
    """flags[row, layer] says which rows use a layer's `extra`."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = FlaggedMLP(config)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, flags: torch.Tensor) -> torch.Tensor:
        for depth, layer in enumerate(self.model.layers):
            layer.mlp.flags = flags[:, depth]
        return super().forward(input_ids=input_ids, use_cache=False).logits


def _rows(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, flags and targets of one step. The first layer's `extra` is used by the first quarter of the rows (one
    rank of four), the second one's in every other step."""
    generator = torch.Generator().manual_seed(step)
    flags = torch.zeros(ROWS, 2, dtype=torch.bool)
    flags[: ROWS // 4, 0] = True
    flags[:, 1] = step % 2 == 0
    tokens, target = torch.randint(VOCABULARY, (2, ROWS, LENGTH), generator=generator)
    return tokens, flags, target


def _loss(model: nn.Module, tokens: torch.Tensor, flags: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(tokens, flags).flatten(0, 1), target.flatten())


def _float64_model(folder: Path) -> nn.Module:
    """The files in plain torch; Llama's own norm computes in float32 whatever it is given."""
    model = FlaggedLlama.from_pretrained(folder, dtype=torch.float64)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    FlaggedLlama(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(base: Path) -> dict[str, Any]:
    """The dense run, on the entries with the largest gradients: spread unevenly over tensors and ranks."""
    model = _float64_model(base)
    trained = {n: p for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n}
    gradients = torch.autograd.grad(_loss(model, *_rows(2)), list(trained.values()))
    largest = torch.cat([g.abs().flatten() for g in gradients])
    threshold = largest.kthvalue(round((1 - DENSITY) * largest.numel())).values
    masks = {name: g.abs() > threshold for name, g in zip(trained, gradients, strict=True)}

    def losses(step: int) -> Iterator[torch.Tensor]:
        yield _loss(model, *_rows(step))

    first, norms = cases.dense_steps(trained, masks, STEPS, losses)
    weights = {name: param.detach() for name, param in model.named_parameters()}
    return {"masks": masks, "first": first, "norms": norms, "weights": weights}


def _train(folder: str, masks: dict[str, torch.Tensor], shards: int, reduction: str) -> dict[str, Any]:
    """Load, compare with the files, train; what this rank saw."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad
    from transformers.integrations import HfDeepSpeedConfig

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    config = cases.config(1, world, zero={"reduce_bucket_size": 1000})
    files = load_file(f"{folder}/model.safetensors")
    loading = HfDeepSpeedConfig(config)  # from_pretrained shards while it lives
    model = FlaggedLlama.from_pretrained(folder, dtype=torch.float32)
    is_sharded = all(param.ds_tensor.ds_numel <= -(-param.ds_numel // world) for param in model.parameters())
    del loading
    mask = lota.Mask.from_dense(masks)
    rows = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    norms, first = [], {}
    traffic = Collectives()
    with lota.sparse_zero3(mask, shard_group_size=shards, gradient_reduction=reduction) as run:
        engine, *_ = deepspeed.initialize(model=model, optimizer=cases.default_optimizer(model), config=config)
        loaded = cases.gathered(engine.module)
        for step in range(1, STEPS + 1):
            with traffic:
                engine.backward(_loss(engine, *(tensor[rows] for tensor in _rows(step))))
            if step == 1:
                named = engine.module.named_parameters()
                first = {name: safe_get_full_grad(param).clone() for name, param in named if name in masks}
            with traffic:
                engine.step()
            norms.append(float(engine.get_global_grad_norm()))
        result = {
            "is_sharded": is_sharded,
            "differ_before": [name for name, tensor in files.items() if not torch.equal(loaded[name], tensor)],
            "first": first,
            "norms": norms,
            "after": cases.gathered(engine.module),
            "traffic": dict(traffic.payload),
            "sent": run.report()["bytes_sent"],
            "owned": run.report()["num_active_this_rank"],
        }
        engine.destroy()
    run.release()
    gc.collect()
    return result


def _grid(folder: str, masks: dict[str, torch.Tensor], combinations: list[tuple[int, str]]) -> list[dict[str, Any]]:
    return [_train(folder, masks, *combination) for combination in combinations]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_grid(ranks, base, expected, world):
    masks = expected["masks"]
    combinations = [(size, how) for size in (1, 2, 4) if size <= world for how in ("compact", "dense")]
    results = ranks(world).run(_grid, str(base), masks, combinations)
    files = load_file(base / "model.safetensors")
    for number, (shards, reduction) in enumerate(combinations):
        for rank in range(world):
            result, where = results[rank][number], f"rank {rank} of {world}, shards {shards}, {reduction}"
            assert result["is_sharded"], where
            assert not result["differ_before"], (where, result["differ_before"])
            _check_values(result, expected, files, where)
            _check_bytes(result, masks, rank, world, shards, reduction, where)


def _check_values(result: dict[str, Any], expected: dict[str, Any], files: dict[str, torch.Tensor], where: str) -> None:
    for name, gradient in expected["first"].items():
        # fp32 sums in another order than the reference's float64 ones
        assert (result["first"][name].double() - gradient).abs().max() < 2e-6, (where, name)
    assert torch.allclose(torch.tensor(result["norms"]), torch.tensor(expected["norms"]), rtol=1e-4), where
    for name, weight in expected["weights"].items():
        assert (result["after"][name].double() - weight).abs().max() <= 1e-5 * weight.abs().max(), (where, name)
        frozen = ~expected["masks"].get(name, torch.zeros_like(weight, dtype=torch.bool))
        assert torch.equal(result["after"][name][frozen], files[name][frozen]), (where, name)
        assert frozen.all() or (result["after"][name] != files[name]).sum() > 0.8 * (~frozen).sum(), (where, name)


def _check_bytes(
    result: dict[str, Any],
    masks: dict[str, torch.Tensor],
    rank: int,
    world: int,
    shards: int,
    reduction: str,
    where: str,
) -> None:
    """Across groups go gradients of what a rank owns and a few words that ranks agree by; weights stay inside."""
    group = tuple(range(rank - rank % shards, rank - rank % shards + shards))
    across = {key: size for key, size in result["traffic"].items() if not set(key[1]) <= set(group)}
    replicas = tuple(range(rank % shards, world, shards))
    gradients = across.pop(("all_reduce", replicas, torch.float32), 0)
    # The norm and the skip flag; one flag per bucket; once, DeepSpeed's check that ranks run modules in the same order.
    words = {("all_reduce", torch.float64): 16, ("all_reduce", torch.int32): 4 * 40, ("broadcast", torch.int64): 100}
    for (kind, _, dtype), size in across.items():
        assert size <= STEPS * words.get((kind, dtype), 0), (where, across)
    pieces = [_piece(mask.flatten(), rank % shards, shards) for mask in masks.values()]
    is_compact = reduction == "compact"
    sent = sum(int(mask.sum()) if is_compact else mask.numel() for mask in masks.values())
    owned = sum(int(piece.sum()) if is_compact else piece.numel() for piece in pieces)
    assert gradients == (STEPS * 4 * owned if shards < world else 0), where
    inside = result["traffic"].get(("all_to_all", group, torch.float32), 0)
    assert inside == (STEPS * 4 * sent if shards > 1 else 0), where
    assert result["sent"] == gradients + inside, where
    assert result["owned"] == sum(int(p.sum()) for p in pieces), where


def _piece(flat: torch.Tensor, owner: int, shards: int) -> torch.Tensor:
    length = -(-flat.numel() // shards)
    return flat[owner * length : (owner + 1) * length]
