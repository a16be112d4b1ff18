"""Patches in a checkpoint's own coordinates are what `lota apply` writes, and their reverse is the base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from lota.delivery.apply import Verified, apply_to_checkpoint, checkpoint_changes, checkpoint_patches
from lota.delivery.rewrite import same_bits
from lota.ticket import Ticket
from tests.delivery.test_apply import load_checkpoint
from tests.delivery.test_folders import SIZES, save_base, ticket_on


def check(base: Path, tickets: list[Ticket], folder: Path) -> None:
    apply_to_checkpoint(base, tickets, folder / "applied")
    before, wanted = load_checkpoint(base), load_checkpoint(folder / "applied")
    made = {name: tensor.clone() for name, tensor in before.items()}
    for reverse, goal in ((False, wanted), (True, before)):
        patches = checkpoint_patches(base, tickets, reverse=reverse)
        assert patches and len({patch.name for patch in patches}) == len(patches)
        for name, shape, dtype, values, indices in patches:
            assert made[name].shape == shape and made[name].dtype == dtype == values.dtype
            made[name].view(-1)[indices] = values
        assert made.keys() == goal.keys() and all(same_bits(made[name], goal[name]) for name in goal)


def test_patches_of_two_tickets(tmp_path: Path) -> None:
    model = save_base(tmp_path / "base", max_shard_size="30KB")
    check(tmp_path / "base", [ticket_on(model, "q_proj"), ticket_on(model, "down_proj")], tmp_path)


def test_patches_name_the_experts_as_the_files_do(tmp_path: Path) -> None:
    sizes = SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).bfloat16().save_pretrained(tmp_path / "base", max_shard_size="30KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    ticket = ticket_on(model, "experts.gate_up_proj", "q_proj")
    check(tmp_path / "base", [ticket], tmp_path)
    names = {patch.name for patch in checkpoint_patches(tmp_path / "base", [ticket])}
    assert any(name.endswith("experts.3.up_proj.weight") for name in names)


def test_another_base_and_another_dtype_are_refused(tmp_path: Path) -> None:
    model = save_base(tmp_path / "base")
    ticket = ticket_on(model, "q_proj")
    save_base(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="another base"):
        checkpoint_patches(tmp_path / "other", [ticket])
    save_base(tmp_path / "wide", dtype=torch.float32)
    with pytest.raises(ValueError, match="lota apply --dtype"):
        checkpoint_patches(tmp_path / "wide", [ticket])


def test_what_was_verified_once_is_not_read_through_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same files a second ticket's fingerprints are compared with those that are known, and others refused."""
    model = save_base(tmp_path / "base")
    ticket, other = ticket_on(model, "q_proj"), ticket_on(save_base(tmp_path / "other", seed=1), "down_proj")
    verified = Verified()
    first = checkpoint_changes(tmp_path / "base", ticket, verified=verified)
    with monkeypatch.context() as patched:
        patched.setattr("lota.delivery.live.fingerprint", lambda *_: pytest.fail("read through again"))
        again = checkpoint_changes(tmp_path / "base", ticket, verified=verified)
        assert all(same_bits(*pair) for one, two in zip(first, again) for pair in zip(one.entries, two.entries))
        checkpoint_changes(tmp_path / "base", ticket_on(model, "down_proj"), verified=verified)
        with pytest.raises(ValueError, match="another base"):
            checkpoint_changes(tmp_path / "base", other, verified=verified)
