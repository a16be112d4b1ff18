"""A checkpoint folder gets and loses exactly the ticket's values; whatever is wrong leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from lota.delivery.apply import apply_to_checkpoint, revert_checkpoint
from lota.delivery.card import is_card
from lota.delivery.live import apply_
from lota.ticket import Mask, Ticket
from tests.delivery.test_live import Model, identity_of, make_ticket

NAMES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def save_checkpoint(model: nn.Module, path: Path) -> None:
    """Two weight files with an index, as larger models have, beside files that must not be taken for weights."""
    path.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    homes = {name: NAMES["second" in name] for name in tensors}
    for file in NAMES:
        save_file({n: t for n, t in tensors.items() if homes[n] == file}, path / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": homes}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (path / "config.json").write_text(json.dumps({"dtype": "float32", "hidden": 5}), encoding="utf-8")
    (path / "README.md").write_text("the card of the base", encoding="utf-8")
    (path / "pytorch_model.bin").write_bytes(b"another format of the same weights would be stale")
    save_file({"layers.0.wq": tensors["first.weight"].clone()}, path / "consolidated.safetensors")


def load_checkpoint(path: Path) -> dict[str, Tensor]:
    # Copies: older safetensors map the file, which tests write again.
    return {name: tensor.clone() for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return got.keys() == expected.keys() and all(
        tensor.dtype == expected[name].dtype and torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8))
        for name, tensor in got.items()
    )


def files(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def test_checkpoint_equals_the_live_model_and_reverts_to_the_base(tmp_path: Path) -> None:
    model = Model(torch.bfloat16)
    save_checkpoint(model, tmp_path / "base")
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ticket = make_ticket(model, dtype=torch.float32)  # values that the weights' dtype rounds
    (tmp_path / "out").mkdir()  # an empty folder may be there
    apply_to_checkpoint(tmp_path / "base", [ticket], tmp_path / "out")
    apply_(model, ticket)
    assert same(load_checkpoint(tmp_path / "out"), model.state_dict())
    assert files(tmp_path / "out") == ["README.md", "config.json", *NAMES, "model.safetensors.index.json"]
    assert is_card((tmp_path / "out" / "README.md").read_text(encoding="utf-8"))  # not the base's
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "base" / "README.md").stat().st_mode & 0o777}

    revert_checkpoint(tmp_path / "out", [ticket], tmp_path / "again")
    assert same(load_checkpoint(tmp_path / "again"), base)
    assert files(tmp_path / "again") == ["config.json", *NAMES, "model.safetensors.index.json"]
    assert files(tmp_path) == ["again", "base", "out"]


def test_a_base_in_another_dtype_is_cast_as_the_training_did(tmp_path: Path) -> None:
    save_checkpoint(Model(torch.float32), tmp_path / "base")
    cast = Model(torch.float32).bfloat16()
    ticket = make_ticket(cast)
    with pytest.raises(ValueError, match="bfloat16, got"):
        apply_to_checkpoint(tmp_path / "base", [ticket], tmp_path / "out", dtype=torch.float32)
    assert files(tmp_path) == ["base"]
    said: list[str] = []
    apply_to_checkpoint(tmp_path / "base", [ticket], tmp_path / "out", say=said.append)
    assert "stored in float32, trained in bfloat16" in said[0]
    apply_(cast, ticket)
    assert same(load_checkpoint(tmp_path / "out"), cast.state_dict())
    config, index = (
        json.loads((tmp_path / "out" / name).read_text(encoding="utf-8"))
        for name in ("config.json", "model.safetensors.index.json")
    )
    assert config == {"dtype": "bfloat16", "hidden": 5}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in cast.state_dict().values())


def test_apply_refusals(tmp_path: Path) -> None:
    model = Model(torch.bfloat16)
    save_checkpoint(model, tmp_path / "base")
    ticket = make_ticket(model)
    with pytest.raises(ValueError, match="exists already"):
        apply_to_checkpoint(tmp_path / "base", [ticket], tmp_path / "base")
    with pytest.raises(ValueError, match=r"share \d+ entries"):
        apply_to_checkpoint(tmp_path / "base", [ticket, ticket], tmp_path / "out")
    with pytest.raises(ValueError, match=r"first\.weight.*fingerprint"):
        apply_to_checkpoint(tmp_path / "base", [make_ticket(Model(torch.bfloat16, seed=9))], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \.safetensors file"):
        apply_to_checkpoint(tmp_path / "empty", [ticket], tmp_path / "out")
    mask = Mask.from_dense({"second.wait": torch.ones(3, 7, dtype=torch.bool)})
    odd = Ticket(mask, {"second.wait": torch.zeros(21)})
    with pytest.raises(ValueError, match=r"second\.wait.*Did you mean 'second\.weight"):
        apply_to_checkpoint(tmp_path / "base", [odd], tmp_path / "out")
    (tmp_path / "base" / NAMES[1]).write_bytes(b"cut")
    with pytest.raises(ValueError, match=f"{NAMES[1]}: not a sound safetensors file"):
        apply_to_checkpoint(tmp_path / "base", [ticket], tmp_path / "out")
    (tmp_path / "base" / NAMES[1]).unlink()
    with pytest.raises(ValueError, match=NAMES[1]):
        apply_to_checkpoint(tmp_path / "base", [ticket], tmp_path / "out")
    assert files(tmp_path) == ["base", "empty"]


def test_revert_refuses_what_would_not_give_the_base(tmp_path: Path) -> None:
    model = Model(torch.bfloat16)
    save_checkpoint(model, tmp_path / "base")
    one = make_ticket(model)
    rest = Mask.from_dense({name: ~one.mask.dense(name) for name in one.names}, one.mask.base)
    base_values = {name: model.get_parameter(name).detach()[rest.dense(name)] for name in rest.names}
    other = Ticket(rest, {name: tensor + 1 for name, tensor in base_values.items()}, base_values)
    apply_to_checkpoint(tmp_path / "base", [one, other], tmp_path / "both")
    with pytest.raises(ValueError, match=r"first\.weight: expected the ticket's values at its \d+ entries"):
        revert_checkpoint(tmp_path / "base", [one], tmp_path / "out")
    with pytest.raises(ValueError, match=r"carries another ticket \(give all of them\)"):
        revert_checkpoint(tmp_path / "both", [one], tmp_path / "out")
    bare = Ticket(one.mask, {name: one.values(name) for name in one.names})
    with pytest.raises(ValueError, match="holds no base values"):
        revert_checkpoint(tmp_path / "both", [bare], tmp_path / "out")
    assert files(tmp_path) == ["base", "both"]
    revert_checkpoint(tmp_path / "both", [other, one], tmp_path / "out")
    assert same(load_checkpoint(tmp_path / "out"), model.state_dict())


@pytest.mark.parametrize("kind", ["llama", "mixture"])
def test_the_merged_folder_loads_in_transformers_with_the_live_models_logits(tmp_path: Path, kind: str) -> None:
    """The mixture's checkpoint names experts one by one, the loaded model fused: its ticket names the latter."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    mixture = Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(LlamaConfig(**sizes) if kind == "llama" else mixture)
    made.bfloat16().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    ticket = ticket_of(model, ["q_proj", "down_proj"])
    apply_to_checkpoint(tmp_path / "base", [ticket], tmp_path / "merged")
    apply_(model, ticket)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.dtype == torch.bfloat16
    assert same(loaded.state_dict(), model.state_dict())
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    revert_checkpoint(tmp_path / "merged", [ticket], tmp_path / "again")
    assert same(load_checkpoint(tmp_path / "again"), load_checkpoint(tmp_path / "base"))


def ticket_of(model: nn.Module, kinds: list[str], seed: int = 3) -> Ticket:
    """A tenth of the entries of the named kinds of tensors, moved by a little."""
    generator = torch.Generator().manual_seed(seed)
    weights = {n: p.detach() for n, p in model.named_parameters() if any(kind in n for kind in kinds)}
    mask = Mask.from_dense(
        {name: torch.rand(weight.shape, generator=generator) < 0.1 for name, weight in weights.items()},
        {name: identity_of(weight) for name, weight in weights.items()},
    )
    base_values = {name: weight[mask.dense(name)] for name, weight in weights.items()}
    values = {n: (b + 0.02 * torch.randn(b.shape, generator=generator)).to(b.dtype) for n, b in base_values.items()}
    return Ticket(mask, values, base_values, {"model": "owner/base"})
