"""A new head, or added rows, on bases of many kinds: the folder and the card's own code give the trained logits, and
revert gives the base, or says why it cannot."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

import lota
from lota.delivery.apply import apply_to_checkpoint, revert_checkpoint
from lota.delivery.card import ticket_card
from lota.delivery.peft import export_peft
from lota.ticket import Ticket, read_manifest
from tests.delivery.test_apply import files, load_checkpoint, same
from tests.zero import cases

SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
LABELS = 3


def _gemma3() -> nn.Module:
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    text = SMALL | {"head_dim": 8, "sliding_window": 8}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


MAKE: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2)),
    "bert": lambda: BertModel(BertConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"})),
    "gpt2": lambda: GPT2Model(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, pad_token_id=0)),
    "wide": lambda: LlamaForCausalLM(LlamaConfig(**SMALL | {"hidden_size": 64, "intermediate_size": 96})),
    "gemma3": _gemma3,
}


def save_base(kind: str, folder: Path) -> Path:
    torch.manual_seed(0)
    MAKE[kind]().to(torch.bfloat16).save_pretrained(folder)
    return folder


def _classifier(base: Path, seed: int) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=LABELS, dtype=torch.bfloat16)
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = 0
    return model


def _resized(base: Path, seed: int) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.resize_token_embeddings(35, mean_resizing=False)
    return model


def _trained(
    base: Path, folder: Path, kind: str, dense: list[str], density: float = 0.2
) -> dict[str, torch.Tensor]:
    """Calibrate on the weights, train two steps, save the ticket; the trained tensors."""
    import deepspeed

    make = _resized if kind == "rows" else _classifier

    def initialize(model: Any) -> Any:
        config = cases.config(1, 1, bf16={"enabled": True})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    with lota.calibration_zero3(score="magnitude", density=density, dense=dense) as run:
        engine = initialize(make(base, 1))
        mask = run.mask()
        engine.destroy()
    with lota.sparse_zero3(mask) as run:
        engine = initialize(make(base, 2))
        for step in range(2):
            ids = torch.arange(1, 13, dtype=torch.int64).view(2, 6) + step
            labels = ids if kind == "rows" else torch.tensor([0, 2], dtype=torch.int64)
            engine.backward(engine(input_ids=ids, labels=labels).loss)
            engine.step()
        run.save_ticket(folder / "ticket", provenance={"model": str(base)})
        trained = cases.gathered(engine.module)
        engine.destroy()
    return trained


def logits_of(model: Any, tensors: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    if tensors is not None:
        model.load_state_dict(tensors, strict=False)
    ids = torch.arange(1, 13, dtype=torch.int64).view(2, 6)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def run_code(text: str, before: str, folder: Path) -> dict[str, Any]:
    """Run the Python of a card as it stands, with `TICKET` and `.` being `folder`."""
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace('"TICKET"', repr(str(folder))).replace('"."', repr(str(folder))).replace(before, "pass  #")
    names: dict[str, Any] = {}
    exec(code, names)
    return names


@pytest.mark.parametrize("kind", ["llama", "mixtral", "bert", "gpt2", "gemma3"])
def test_a_head_on_any_base_is_delivered(ranks, tmp_path: Path, kind: str) -> None:
    base = save_base(kind, tmp_path / "base")
    head = "classifier.*" if kind == "bert" else "score.weight"
    (trained,) = ranks(1).run(_trained, base, tmp_path, "head", [head])
    expected = logits_of(_classifier(base, 7), trained)
    ticket = Ticket.load(tmp_path / "ticket")

    apply_to_checkpoint(base, [ticket], tmp_path / "merged")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    assert torch.equal(logits_of(loaded), expected)

    names = run_code(ticket_card(read_manifest(tmp_path / "ticket")), "applied.revert()", tmp_path / "ticket")
    names["model"].config.pad_token_id = 0
    assert names["model"].config.num_labels == LABELS
    assert torch.equal(logits_of(names["model"]), expected)

    revert_checkpoint(tmp_path / "merged", [ticket], tmp_path / "again")
    assert AutoConfig.from_pretrained(tmp_path / "again").architectures == [type(MAKE[kind]()).__name__]
    again, before = (type(MAKE[kind]()).from_pretrained(folder).state_dict() for folder in (tmp_path / "again", base))
    assert same(again, before)


def test_the_adapters_card_loads_a_head(ranks, tmp_path: Path) -> None:
    base = save_base("wide", tmp_path / "base")
    (trained,) = ranks(1).run(_trained, base, tmp_path, "head", ["score.weight"])
    export_peft(Ticket.load(tmp_path / "ticket"), base, tmp_path / "adapter")
    names = run_code((tmp_path / "adapter" / "README.md").read_text(encoding="utf-8"), "nothing", tmp_path / "adapter")
    names["model"].config.pad_token_id = 0
    assert torch.equal(logits_of(names["model"].merge_and_unload()), logits_of(_classifier(base, 7), trained))


def test_tied_weights_that_are_stored_twice_grow_and_shrink_together(ranks, tmp_path: Path) -> None:
    """Both names of the file are edited: whichever transformers takes, the model is the trained one."""
    base = save_base("tied", tmp_path / "base")
    tensors = load_checkpoint(base)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    from safetensors.torch import save_file

    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    (trained,) = ranks(1).run(_trained, base, tmp_path, "rows", ["model.embed_tokens.weight[32:]"])
    ticket = Ticket.load(tmp_path / "ticket")
    apply_to_checkpoint(base, [ticket], tmp_path / "merged")
    merged = load_checkpoint(tmp_path / "merged")
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    assert torch.equal(merged["lm_head.weight"], trained["model.embed_tokens.weight"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    assert torch.equal(logits_of(loaded), logits_of(_resized(base, 5), trained))
    revert_checkpoint(tmp_path / "merged", [ticket], tmp_path / "again")
    assert same(load_checkpoint(tmp_path / "again"), tensors)


def test_a_second_copy_that_differs_is_a_tensor_of_its_own(tmp_path: Path) -> None:
    """transformers does not tie weights that are stored with different values; neither does apply."""
    base = save_base("tied", tmp_path / "base")
    tensors = load_checkpoint(base)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    from safetensors.torch import save_file

    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    name = "model.embed_tokens.weight"
    mask = lota.Mask.from_dense({name: torch.ones_like(tensors[name], dtype=torch.bool)})
    ticket = Ticket(mask, {name: torch.zeros(tensors[name].numel(), dtype=torch.bfloat16)})
    apply_to_checkpoint(base, [ticket], tmp_path / "merged")
    merged = load_checkpoint(tmp_path / "merged")
    assert not merged[name].any() and torch.equal(merged["lm_head.weight"], tensors["lm_head.weight"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])


def test_a_folder_saved_again_as_another_kind_of_model_is_not_the_base(ranks, tmp_path: Path) -> None:
    base = save_base("llama", tmp_path / "base")
    ranks(1).run(_trained, base, tmp_path, "head", ["score.weight"])
    ticket = Ticket.load(tmp_path / "ticket")
    apply_to_checkpoint(base, [ticket], tmp_path / "merged")
    assert "lm_head.weight" in load_checkpoint(tmp_path / "merged")
    LlamaForSequenceClassification.from_pretrained(tmp_path / "merged").save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"does not hold lm_head\.weight, which LlamaForCausalLM has"):
        revert_checkpoint(tmp_path / "saved", [ticket], tmp_path / "again")
    assert not (tmp_path / "again").exists() and "again" not in files(tmp_path)


def test_config_entries_of_the_trained_model_come_with_the_folder(ranks, tmp_path: Path) -> None:
    base = save_base("llama", tmp_path / "base")
    ranks(1).run(_trained, base, tmp_path, "head", ["score.weight"])
    ticket = Ticket.load(tmp_path / "ticket")
    assert ticket.model["class"] == "LlamaForSequenceClassification"
    assert len(ticket.model["config"]["id2label"]) == LABELS
    apply_to_checkpoint(base, [ticket], tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForSequenceClassification"] and len(config["id2label"]) == LABELS
    assert issubclass(getattr(transformers, config["architectures"][0]), nn.Module)


def test_every_weight_active_on_a_base_that_is_stored_in_fp32(ranks, tmp_path: Path) -> None:
    """All entries of all tensors: these are trained weights, whose dtype the folder gets, and no stored buffers."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path / "base")
    (trained,) = ranks(1).run(_trained, tmp_path / "base", tmp_path, "head", ["score.weight"], 1.0)
    apply_to_checkpoint(tmp_path / "base", [Ticket.load(tmp_path / "ticket")], tmp_path / "merged")
    merged = load_checkpoint(tmp_path / "merged")
    assert all(torch.equal(merged[name], tensor) for name, tensor in trained.items())
    assert json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
