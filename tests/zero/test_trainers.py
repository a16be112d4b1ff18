"""Every trainer calibrates, trains, leaves frozen bits alone and saves a ticket; only the two blocks are added."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import lota
from tests.zero import trainers


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return trainers.make_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    ("kind", "score", "checkpointing", "shards"),
    [
        ("trainer", "gradient", None, None),
        ("trainer", "task_vector", "reentrant", 1),
        ("sft", "task_vector", "non-reentrant", None),
        ("sft", "snip", None, None),
        ("dpo", "gradient", None, 1),
    ],
)
def test_trainer(ranks, base, kind, score, checkpointing, shards):
    results = ranks(2).run(trainers.calibrate_and_train, kind, str(base), score, checkpointing, shards)
    first = results[0]
    mask = first["mask"]
    assert mask.num_active == round(0.1 * mask.eligible)
    assert not any("embed" in name or "norm" in name or "lm_head" in name for name in mask.names)
    for result in results:
        assert result["mask"] == mask
        assert all(result["flags"])
        for name, before in result["before"].items():
            active = mask.dense(name) if name in mask.names else torch.zeros_like(before, dtype=torch.bool)
            assert torch.equal(result["after"][name][~active], before[~active]), name
        assert result["saved"] == first["saved"]
        assert result["report"]["steps"] == 3
        assert result["report"]["skipped_steps"] == 0
    ticket = lota.Ticket.load(base / f"ticket-{kind}-{score}-{shards}")
    assert ticket.num_active == mask.num_active == first["saved"]["num_active"]
    assert ticket.num_changed == first["saved"]["num_changed"] > 0.8 * mask.num_active
    for name in ticket.names:
        positions = mask.indices(name)
        assert torch.equal(ticket.values(name), first["after"][name].flatten()[positions])
        assert torch.equal(ticket.base_values(name), first["before"][name].flatten()[positions])


def test_checkpoints_of_a_plain_trainer(ranks, base):
    mask = lota.Mask.from_dense(
        {
            name: torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1)) < 0.1
            for name, tensor in load_file(base / "model.safetensors").items()
            if "mlp" in name
        }
    )
    for result in ranks(2).run(trainers.stop_and_go_on, str(base), mask):
        weights = result["weights"]
        assert all(torch.equal(tensor, weights["resumed"][name]) for name, tensor in weights["straight"].items())
        # No dense weights, whatever the configuration asks for.
        assert not {name for name in result["names"] if name.endswith(("model.safetensors", "model.bin"))}
        assert "checkpoint-2/global_step2/checkpoint.json" in result["names"]
        assert result["eval"][0] > result["eval"][1] and result["best"].endswith("checkpoint-2")
        for name, tensor in weights["at step 2 of best"].items():
            assert torch.equal(tensor, weights["best"][name]), name
