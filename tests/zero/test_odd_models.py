"""A parameter without elements takes part in neither block and stops neither; a model with PEFT's adapters is refused
with the cure, and its adapters are trained where they are asked for; what is left out is logged and reported."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lota
from tests.zero import cases


class _WithEmpty(cases.Model):
    def __init__(self) -> None:
        super().__init__()
        # In a module of its own: DeepSpeed itself cannot gather it together with others on several ranks.
        self.blocks[0].attn_rest = nn.Linear(cases.WIDTH, 0, bias=False)


def _both_blocks(score: str) -> dict[str, Any]:
    import deepspeed

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    rows = slice(rank * cases.ROWS // world, (rank + 1) * cases.ROWS // world)

    def train(block: Any) -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        torch.manual_seed(3)
        model = _WithEmpty()
        before = {name: param.detach().clone() for name, param in model.named_parameters()}
        with block as run:
            config = cases.config(1, world)
            engine, *_ = deepspeed.initialize(model=model, optimizer=cases.default_optimizer(model), config=config)
            for x, flags, target in cases.micro_batches(1, 1):
                engine.backward(F.cross_entropy(engine(x[rows], torch.ones_like(flags)[rows]), target[rows]))
                engine.step()
            after = cases.gathered(engine.module)
            engine.destroy()
        return run, before, after

    calibration, *_ = train(lota.calibration_zero3(score=score, density=0.2))
    mask = calibration.mask()
    run, before, after = train(lota.sparse_zero3(mask))
    run.release()
    return {"mask": mask, "before": before, "after": after, "report": calibration.report()}


@pytest.mark.parametrize(("size", "score"), [(1, "gradient"), (2, "gradient"), (2, "task_vector")])
def test_a_parameter_without_elements(ranks, size, score):
    for result in ranks(size).run(_both_blocks, score):
        mask = result["mask"]
        assert "blocks.0.attn_rest.weight" in result["before"] and "blocks.0.attn_rest.weight" not in mask.names
        parts = ("extra", "up.weight", "down.weight")
        assert set(mask.names) == {f"blocks.{n}.{part}" for n in (0, 1) for part in parts}
        assert mask.num_active == round(0.2 * mask.eligible)
        for name, before in result["before"].items():
            active = mask.dense(name) if name in mask.names else torch.zeros_like(before, dtype=torch.bool)
            assert torch.equal(result["after"][name][~active], before[~active]), name
        assert {row["pattern"] for row in result["report"]["left_out"] if row["is_matrix"]} == {
            "embed.weight",
            "head.weight",
        }


def _adapted(include: list[str] | None, is_wrapped: bool, is_merged: bool = False) -> tuple[str, ...]:
    import deepspeed
    import peft
    import transformers

    torch.manual_seed(0)
    settings = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings, num_attention_heads=2))
    adapters = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(model, adapters) if is_wrapped else peft.inject_adapter_in_model(adapters, model)
    if is_merged:
        model = model.merge_and_unload()
        model.requires_grad_(True)
    with lota.calibration_zero3(score="gradient", density=0.5, include=include) as run:
        config = cases.config(1, torch.distributed.get_world_size())
        engine, *_ = deepspeed.initialize(model=model, optimizer=cases.default_optimizer(model), config=config)
        ids = torch.arange(8)[None]
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    mask = run.mask()
    engine.destroy()
    return mask.names


@pytest.mark.parametrize("is_wrapped", [True, False])
def test_adapters_are_refused_with_the_cure(ranks, is_wrapped):
    for outcome in ranks(1).outcomes(_adapted, None, is_wrapped):
        assert outcome.error_type == "ValueError"
        for part in ("adapters of PEFT", "merge_and_unload()", "requires_grad_(True)", "lora_A"):
            assert part in outcome.error


def test_adapters_that_are_asked_for(ranks):
    (names,) = ranks(1).run(_adapted, ["*.lora_A.*", "*.lora_B.*"], True)
    assert [name.split(".")[-3:-1] for name in names] == [["lora_A", "default"], ["lora_B", "default"]]


def test_merged_adapters_are_no_adapters(ranks):
    (names,) = ranks(1).run(_adapted, None, True, True)
    assert len(names) == 7 and not any("lora" in name for name in names)


def _left_out_of_a_multimodal_model() -> dict[str, Any]:
    import deepspeed
    import transformers

    from tests.selection.architectures import tiny_llava

    lines: list[tuple[int, str]] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append((record.levelno, record.getMessage()))  # type: ignore[method-assign]
    logging.getLogger("lota").addHandler(handler)
    torch.manual_seed(0)
    model = tiny_llava(transformers)
    with lota.calibration_zero3(score="magnitude", density=0.5) as run:
        config = cases.config(1, torch.distributed.get_world_size())
        engine, *_ = deepspeed.initialize(model=model, optimizer=cases.default_optimizer(model), config=config)
    logging.getLogger("lota").removeHandler(handler)
    report = run.report()
    mask = run.mask()
    engine.destroy()
    return {"lines": lines, "report": report, "names": mask.names}


def test_a_tower_that_is_left_out_is_a_warning(ranks):
    first, second = ranks(2).run(_left_out_of_a_multimodal_model)
    assert not any("vision" in name for name in first["names"])
    warnings = [line for level, line in first["lines"] if level == logging.WARNING]
    assert any('included by "model.vision_tower.encoder.layers.*"' in line for line in warnings)
    assert not second["lines"], "rank 0 says it"
    rows = {row["pattern"]: row["share"] for row in first["report"]["left_out"]}
    assert rows["model.vision_tower.encoder.layers.*"] > 0.01


def _with_poisoned_padding(kind: str) -> dict[str, Any]:
    """Tensors whose entries do not share out evenly: what fills up the last rank's piece is NaN, as memory that held
    something else may be."""
    import deepspeed

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 11, bias=False), nn.Linear(11, 7, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x)).square().sum()

    torch.manual_seed(0)
    mask = lota.Mask.from_dense({"two.weight": torch.rand(7, 11) < 0.5})
    block = (
        lota.sparse_zero3(mask) if kind == "sparse" else lota.calibration_zero3(score=kind, include=["*"], density=0.5)
    )
    world, poisoned = torch.distributed.get_world_size(), 0
    with block as run:
        with deepspeed.zero.Init(config_dict_or_path=cases.config(1, world)):
            model = Odd()
        for parameter in model.parameters():
            start = parameter.ds_tensor.numel() * torch.distributed.get_rank()
            padding = parameter.ds_tensor.data[max(0, parameter.ds_numel - start) :]
            padding.fill_(math.nan)
            poisoned += padding.numel()
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=cases.default_optimizer(model), config=cases.config(1, world)
        )
        for _ in range(2):
            engine.backward(engine(torch.ones(2, 3)))
            engine.step()
        after = cases.gathered(engine.module)
        if kind != "sparse":
            mask = run.mask()
            assert mask.num_active == round(0.5 * mask.eligible)
            with pytest.raises(ValueError, match=r"mask\(keep=True\)"):
                run.mask()
        engine.destroy()
    if kind == "sparse":
        run.release()
    return {"poisoned": poisoned, "finite": all(bool(torch.isfinite(weight).all()) for weight in after.values())}


@pytest.mark.parametrize("kind", ["sparse", "gradient", "task_vector"])
def test_what_fills_up_the_last_ranks_piece_does_not_matter(ranks: Any, kind: str) -> None:
    found = ranks(4).run(_with_poisoned_padding, kind)
    assert sum(rank["poisoned"] for rank in found) > 0 and all(rank["finite"] for rank in found)
