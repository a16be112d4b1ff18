"""A folder is written whole or not at all, from the files that count, and nothing of the user's is touched."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import lota
from lota.cli import main
from lota.delivery.apply import apply_to_checkpoint, revert_checkpoint
from lota.delivery.rewrite import same_bits
from lota.delivery.side_files import copy_side_files
from lota.files import new_folder, only_writer
from lota.ticket import Mask, Ticket
from tests.delivery.architecture_table import load, logits, make_ticket
from tests.delivery.test_apply import load_checkpoint

SIZES: dict[str, Any] = {
    "vocab_size": 112,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def save_base(path: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype)
    model.save_pretrained(path, **options)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def ticket_on(model: Any, *parts: str) -> Ticket:
    return make_ticket(model, [name for name, _ in model.named_parameters() if any(part in name for part in parts)])


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def test_the_single_file_counts_where_an_index_is_beside_it(tmp_path: Path) -> None:
    save_base(tmp_path / "base", seed=1, max_shard_size="20KB")
    model = save_base(tmp_path / "other", seed=2)
    save_file(tensors_of(tmp_path / "other"), tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    ticket = ticket_on(model, "q_proj")
    apply_to_checkpoint(tmp_path / "base", [ticket], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("model*")) == ["model.safetensors"]
    lota.apply_(model, ticket)
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_another_base_is_refused_whatever_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Head, embeddings and norms too, which the ticket does not name."""
    model = save_base(tmp_path / "base")
    ticket_on(model, "_proj").save(tmp_path / "ticket")
    ticket = str(tmp_path / "ticket")
    assert main(["apply", "--base", str(tmp_path / "base"), ticket, "--out", str(tmp_path / "good")]) == 0
    assert "all 21 tensors have the base's fingerprint" in capsys.readouterr().out
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"):
        for folder in ("base", "good"):
            other = tmp_path / f"{folder}-{name}"
            other.mkdir()
            changed = tensors_of(tmp_path / folder)
            changed[name] = changed[name].clone()
            changed[name].view(-1)[3] += 1
            save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
            (other / "config.json").write_bytes((tmp_path / folder / "config.json").read_bytes())
        base, tuned = str(tmp_path / f"base-{name}"), str(tmp_path / f"good-{name}")
        for words in (
            ["apply", "--base", base, ticket],
            ["export", ticket, "--base", base, "--format", "peft"],
            ["revert", "--tuned", tuned, ticket],
        ):
            assert main([*words, "--out", str(tmp_path / "out")]) == 2
            assert f"{name}: expected the base's own weights" in capsys.readouterr().err
            assert not (tmp_path / "out").exists()
        with pytest.raises(ValueError, match="expected the base's own weights"):
            lota.apply_(load(tmp_path / f"base-{name}"), Ticket.load(ticket))
    assert main(["revert", "--tuned", str(tmp_path / "good"), ticket, "--out", str(tmp_path / "again")]) == 0
    before, after = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys() and all(same_bits(before[name], after[name]) for name in before)


def test_a_base_without_a_tensor_of_its_model_is_refused(tmp_path: Path) -> None:
    model = save_base(tmp_path / "base")
    tensors = tensors_of(tmp_path / "base")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not hold lm_head\.weight, which LlamaForCausalLM has"):
        apply_to_checkpoint(tmp_path / "base", [ticket_on(model, "q_proj")], tmp_path / "out")


def test_every_name_of_every_ticket_or_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    made = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).to(torch.bfloat16)
    made.save_pretrained(tmp_path / "base", max_shard_size="30KB")  # the experts of a layer lie in several files
    model = load(tmp_path / "base")
    ticket = ticket_on(model, "experts.gate_up_proj", "q_proj")
    before = logits(model)
    for name, shape in (("model.layers.0.q_projj.weight", (8, 8)), ("h.0.attn.c_attn.weight", (8, 24))):
        other = Ticket(Mask.from_indices({name: (shape, torch.tensor([1]))}), {name: torch.ones(1)})
        with pytest.raises(ValueError, match=f"names {name}, which .* does not have"):
            apply_to_checkpoint(tmp_path / "base", [ticket, other], tmp_path / "out")
        assert not (tmp_path / "out").exists()
    apply_to_checkpoint(tmp_path / "base", [ticket], tmp_path / "out")
    lota.apply_(model, ticket)
    assert torch.equal(logits(load(tmp_path / "out")), logits(model)) and not torch.equal(before, logits(model))
    one, other = load_checkpoint(tmp_path / "base"), load_checkpoint(tmp_path / "out")
    assert one.keys() == other.keys()
    changed = sum(int((one[key] != other[key]).sum()) for key in one)
    assert changed == ticket.num_changed  # every other entry of every expert is the base's
    revert_checkpoint(tmp_path / "out", [ticket], tmp_path / "again")
    again = load_checkpoint(tmp_path / "again")
    assert all(same_bits(again[key], one[key]) for key in one)


def test_a_tied_name_that_the_files_do_not_hold(tmp_path: Path) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).to(torch.bfloat16).save_pretrained(
        tmp_path / "base"
    )
    model = load(tmp_path / "base")
    weight = {"lm_head.weight": model.lm_head.weight}
    mask = Mask.from_dense({"lm_head.weight": torch.rand(weight["lm_head.weight"].shape) < 0.1})
    ticket = Ticket(mask, {"lm_head.weight": torch.ones(mask.num_active).bfloat16()})
    apply_to_checkpoint(tmp_path / "base", [ticket], tmp_path / "out")
    lota.apply_(model, ticket)
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_what_transformers_keeps_in_fp32_is_not_cast(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 4},
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        first_k_dense_replace=1,
        n_shared_experts=1,
    )
    model = DeepseekV3ForCausalLM(config)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    model.get_buffer(bias).copy_(torch.randn(4) * 0.01)
    model.save_pretrained(tmp_path / "base")
    for known in (True, False):  # with and without the frozen tensors of format 2
        live = load(tmp_path / "base")
        assert live.get_buffer(bias).dtype == torch.float32
        ticket = ticket_on(live, "q_b_proj")
        if not known:
            ticket = Ticket(
                ticket.mask.with_base(ticket.mask.base),
                {name: ticket.values(name) for name in ticket.names},
                {name: ticket.base_values(name) for name in ticket.names},
            )
        out = tmp_path / f"out-{known}"
        apply_to_checkpoint(tmp_path / "base", [ticket], out)
        lota.apply_(live, ticket)
        merged = load(out)
        differ = [
            name for name, tensor in live.state_dict().items() if not same_bits(tensor, merged.state_dict()[name])
        ]
        assert not differ and tensors_of(out)[bias].dtype == torch.float32
        card = (out / "README.md").read_text(encoding="utf-8")
        assert "cast to bfloat16" in card and "bit for bit" not in card


def test_float8_tensors_are_never_cast(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    tensors = {
        "a.weight": torch.randn(8, 8),
        "a.scale": torch.ones(1),
        "b.weight": torch.ones(4).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    ticket = Ticket(Mask.from_indices({"a.weight": ((8, 8), torch.tensor([5]))}), {"a.weight": torch.ones(1)})
    apply_to_checkpoint(tmp_path / "base", [ticket], tmp_path / "out", dtype=torch.bfloat16)
    found = {name: tensor.dtype for name, tensor in tensors_of(tmp_path / "out").items()}
    assert found == {"a.weight": torch.bfloat16, "a.scale": torch.bfloat16, "b.weight": torch.float8_e4m3fn}


@pytest.mark.parametrize(
    "file", ["../outside/sec.safetensors", "x/model.safetensors", "/etc/passwd", "a\0b", "", 5, None]
)
def test_an_index_names_files_of_its_folder(tmp_path: Path, file: Any) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.weight": file}}))
    ticket = Ticket(Mask.from_indices({"a.weight": ((8, 8), torch.tensor([5]))}), {"a.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="plain name of a file"):
        apply_to_checkpoint(base, [ticket], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_side_files(tmp_path: Path) -> None:
    """A folder as the hub has them: what belongs to the model comes along, byte for byte, and nothing else."""
    (tmp_path / "secret").write_text("secret")
    base = tmp_path / "base"
    kept = [
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "LICENSE",
        "preprocessor_config.json", "chat_template.jinja", "additional_chat_templates/tools.jinja", "modeling_own.py",
        "tiktoken/x.tiktoken", "2_Dense/model.safetensors",
    ]  # fmt: skip
    left = [
        "pytorch_model.bin", "pytorch_model.bin.index.json", "model.safetensors.index.json", "tf_model.h5",
        "flax_model.msgpack", "model.gguf", "onnx/model.onnx", "onnx/config.json", "original/consolidated.00.pth",
        "original/params.json", "adapter_config.json", "adapter_model.safetensors", ".git/config", ".cache/x",
        "training_args.bin", "optimizer.pt", "rng_state_0.pth", "trainer_state.json", "consolidated.safetensors",
    ]  # fmt: skip
    for name in [*kept, *left]:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(name.encode())
    (base / "modules.json").write_text(json.dumps([{"path": "2_Dense"}]))
    (base / "inside.txt").symlink_to("config.json")
    (base / "outside.txt").symlink_to(tmp_path / "secret")
    (base / "broken.txt").symlink_to(base / "nothing")
    os.mkfifo(base / "pipe")
    (base / "config.json").chmod(0o400)
    said: list[str] = []
    copy_side_files(base, tmp_path / "out", said.append)
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {*kept, "modules.json", "inside.txt"}
    assert all((tmp_path / "out" / name).read_bytes() == name.encode() for name in kept)
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert [text.split()[0] for text in said] == ["outside.txt"]


def test_a_read_only_base_gives_a_folder_that_can_be_removed(tmp_path: Path) -> None:
    model = save_base(tmp_path / "base")
    (tmp_path / "base" / "sub").mkdir()
    (tmp_path / "base" / "sub" / "x.jinja").write_text("x")
    before = (tmp_path / "base" / "config.json").read_bytes()
    for path in (tmp_path / "base").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    apply_to_checkpoint(tmp_path / "base", [ticket_on(model, "q_proj")], tmp_path / "out")
    assert all(os.stat(path).st_mode & 0o200 for path in (tmp_path / "out").rglob("*"))
    assert (tmp_path / "out" / "config.json").read_bytes() == before
    for path in (tmp_path / "base").rglob("*"):
        path.chmod(0o755)


def test_two_writers_of_one_folder(tmp_path: Path) -> None:
    """The second is refused while the first writes; what it wrote is whole."""
    started, checked = threading.Event(), threading.Event()

    def write() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("first")
            started.set()
            checked.wait(20)

    thread = threading.Thread(target=write)
    thread.start()
    started.wait(20)
    with pytest.raises(ValueError, match=r"process \d+ on .* writes .*out now"), new_folder(tmp_path / "out"):
        pass
    checked.set()
    thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "a").read_text() == "first"


def test_nothing_of_the_users_is_removed(tmp_path: Path) -> None:
    mine = [".out.partial", ".out.partial-mine", "out.partial"]
    for name in mine:
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("mine")
    left = tmp_path / f".out.partial-{'0' * 16}"  # as a writer that was killed leaves
    left.mkdir()
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
    assert {path.name for path in tmp_path.iterdir()} == {*mine, "out"}
    with only_writer(tmp_path / "other", "uses"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {*mine, "out"}


def test_overwrite_replaces_a_ticket_and_nothing_else(tmp_path: Path) -> None:
    ticket = Ticket(Mask.from_indices({"a": ((8,), torch.tensor([5]))}), {"a": torch.ones(1)})
    ticket.save(tmp_path / "t")
    ticket.save(tmp_path / "t", overwrite=True)
    (tmp_path / "t" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"also holds notes\.txt, which would be lost"):
        ticket.save(tmp_path / "t", overwrite=True)
    assert (tmp_path / "t" / "notes.txt").read_text() == "mine"


def test_a_merged_multimodal_base_is_the_whole_model(tmp_path: Path) -> None:
    """Trained as a causal language model, its text part under other names; the files keep theirs, and the vision
    part."""
    from transformers import AutoModelForImageTextToText, Qwen3_5Config

    text = SIZES | {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    text |= {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
    vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 4}
    vision |= {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16}
    torch.manual_seed(0)
    config = Qwen3_5Config(text_config=text, vision_config=vision, image_token_id=100, video_token_id=101)
    AutoModelForImageTextToText.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    live = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16).eval()
    ticket = ticket_on(live, "_proj")
    before = load_checkpoint(tmp_path / "base")
    assert not any(name in before for name in ticket.names)
    apply_to_checkpoint(tmp_path / "base", [ticket], tmp_path / "out")
    lota.apply_(live, ticket)
    assert torch.equal(logits(load(tmp_path / "out")), logits(live))
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert type(whole).__name__ == "Qwen3_5ForConditionalGeneration"
    revert_checkpoint(tmp_path / "out", [ticket], tmp_path / "again")
    again = load_checkpoint(tmp_path / "again")
    assert before.keys() == again.keys() and all(same_bits(before[name], again[name]) for name in before)
