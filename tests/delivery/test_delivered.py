"""What was trained is what is delivered: the engine's logits, from the merged folder and from ticket and base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import lota
from lota.delivery.apply import apply_to_checkpoint, revert_checkpoint
from lota.ticket import Ticket
from tests.delivery.test_apply import load_checkpoint, same, ticket_of
from tests.zero.cases import config

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
IDS = torch.arange(48).view(2, 24)


def logits_of(model: Any) -> Tensor:
    model.eval()  # an engine's returns nothing
    with torch.no_grad():
        logits: Tensor = model(IDS).logits
    return logits


def train(base: str, mask: str, ticket: str, dtype: torch.dtype) -> Tensor:
    """Three steps on every rank, the ticket, and the logits of the engine that was trained."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    settings = config(1, torch.distributed.get_world_size(), bf16={"enabled": dtype == torch.bfloat16})
    with lota.sparse_zero3(mask) as run:
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2), config=settings
        )
        for _ in range(3):
            engine.backward(engine(IDS, labels=IDS).loss)
            engine.step()
        run.save_ticket(ticket, provenance={"model": "owner/base"})
        logits = logits_of(engine).cpu()
        engine.destroy()
    return logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merged_folder_and_applied_ticket_give_the_trained_engines_logits(ranks, tmp_path: Path, dtype) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).to(dtype).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    ticket_of(model, ["_proj"]).mask.save(tmp_path / "mask")
    torch.set_num_threads(1)
    before = logits_of(model)
    paths = [str(tmp_path / name) for name in ("base", "mask", "ticket")]
    first, second = ranks(2).run(train, *paths, dtype)
    assert torch.equal(first, second) and not torch.equal(first, before)

    ticket = Ticket.load(tmp_path / "ticket")
    handle = lota.apply_(model, ticket)
    assert torch.equal(logits_of(model), first)
    apply_to_checkpoint(tmp_path / "base", [ticket], tmp_path / "merged")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), first)
    handle.revert()
    assert torch.equal(logits_of(model), before)
    revert_checkpoint(tmp_path / "merged", [ticket], tmp_path / "again")
    assert same(load_checkpoint(tmp_path / "again"), load_checkpoint(tmp_path / "base"))
