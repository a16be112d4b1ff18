"""A card has the hub's front matter, tells what the ticket tells, and is no part of the ticket."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from lota.delivery.card import is_card, merged_card, ticket_card, write_ticket_card
from lota.ticket import Mask, Ticket, read_manifest
from tests.delivery.test_live import Model, make_ticket

MADE = {
    "model": "meta-llama/Llama-3.1-8B", "revision": "main", "score": "task_vector", "steps": 80, "learning_rate": 2e-4,
    "data": "openai/gsm8k/main (train)", "versions": {"torch": "2.13.0"},
}  # fmt: skip


def save(path: Path, provenance: dict[str, Any]) -> Ticket:
    made = make_ticket(Model(torch.bfloat16))
    base_values = {name: made.base_values(name) for name in made.names}
    ticket = Ticket(made.mask, {name: made.values(name) for name in made.names}, base_values, provenance)
    ticket.save(path)
    return ticket


def front(text: str) -> dict[str, Any]:
    _, matter, _ = text.split("---\n", 2)
    return yaml.safe_load(matter)


def test_the_card_of_a_ticket(tmp_path: Path) -> None:
    path = tmp_path / "ticket"
    ticket = save(path, MADE)
    write_ticket_card(path, {"evaluation loss after": 1.25, "left out": None})
    text = (path / "README.md").read_text(encoding="utf-8")
    assert front(text) == {
        "base_model": "meta-llama/Llama-3.1-8B", "base_model_relation": "adapter", "datasets": ["openai/gsm8k"],
        "library_name": "lota", "tags": ["lota", "lottery-ticket", "sparse-fine-tuning"],
    }  # fmt: skip
    for fact in (
        "| base | meta-llama/Llama-3.1-8B, revision main |",
        f"| active entries | {ticket.num_active} of {ticket.mask.eligible} in 2 tensors |",
        f"| changed entries | {ticket.num_changed} |",
        "| score | task_vector |", "| learning rate | 0.0002 |", "| evaluation loss after | 1.25 |",
        "| versions | torch 2.13.0 |", "lota apply --base meta-llama/Llama-3.1-8B", "dtype=torch.bfloat16",
        "lota revert",
    ):  # fmt: skip
        assert fact in text, fact
    assert "left out" not in text and is_card(text)


def test_a_ticket_with_a_card_reads_and_is_replaced_as_one_without(tmp_path: Path) -> None:
    path = tmp_path / "ticket"
    ticket = save(path, MADE)
    write_ticket_card(path)
    loaded = Ticket.load(path)
    loaded.verify()
    assert loaded.mask == ticket.mask
    ticket.save(path, overwrite=True)  # the card of what was there goes with it
    assert sorted(file.name for file in path.iterdir()) == ["ticket.json", "ticket.safetensors"]


def test_local_names_do_not_reach_the_front_matter(tmp_path: Path) -> None:
    path = tmp_path / "ticket"
    data = [{"data": "a/b (train)", "weight": 1.0}, {"data": "/home/me/rows.jsonl", "weight": 2.0}]
    ticket = save(path, {"model": str(tmp_path), "data": data})
    text = ticket_card(read_manifest(path))
    assert "base_model" not in front(text) and front(text)["datasets"] == ["a/b"]
    assert f"| base | {tmp_path} |" in text
    merged = merged_card([ticket], {"model_type": "llama"})
    assert front(merged)["library_name"] == "transformers" and "| model type | llama |" in merged and is_card(merged)
    mask = Mask.from_dense({"w": torch.ones(2, 2, dtype=torch.bool)})
    Ticket(mask, {"w": torch.zeros(4)}).save(tmp_path / "bare")  # knows nothing of its making
    text = ticket_card(read_manifest(tmp_path / "bare"))
    assert "| base weights | not recorded |" in text and "holds no base values" in text
