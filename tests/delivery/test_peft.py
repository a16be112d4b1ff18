"""Stock PEFT, in a process that cannot import anything of ours, computes the applied model's logits exactly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3MoeConfig

from lota.cli import main
from lota.delivery.card import is_card
from lota.delivery.live import apply_
from lota.delivery.peft import export_peft
from lota.ticket import Mask, Ticket
from tests.delivery.test_apply import files, ticket_of
from tests.delivery.test_live import identity_of

pytest.importorskip("peft", reason="the extra `peft` is not installed")

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
MIXTURE = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# name -> configuration, dtype, kinds of tensors, modules that must go whole
CASES: dict[str, tuple[Any, torch.dtype, list[str], set[str]]] = {
    "llama_bf16": (LlamaConfig(**SIZES), torch.bfloat16, ["_proj"], set()),
    "llama_fp32": (LlamaConfig(**SIZES), torch.float32, ["_proj"], set()),
    "tied": (
        LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True),
        torch.bfloat16, ["embed", "norm", "q_proj"],
        {"lm_head", "model.embed_tokens", "model.norm", "model.layers.0.self_attn.q_proj"},
    ),
    "mixture": (Qwen3MoeConfig(**SIZES, **MIXTURE), torch.bfloat16, ["_proj"], {"model.layers.1.mlp.experts"}),
    "conv1d": (
        GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2),
        torch.float32, ["attn"], {"transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"},
    ),
}  # fmt: skip
IDS = torch.arange(48).view(2, 24)

STRANGER = """
import sys

class Refuse:  # an editable install would find us anywhere
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("lota", "recipes", "tests"):
            raise ImportError(name + " does not exist here")

sys.meta_path.insert(0, Refuse())
try:
    import lota
    sys.exit("lota could be imported")
except ImportError:
    pass
import json
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
logits = {}
for name, (base, adapter, dtype) in json.loads(sys.argv[1]).items():
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        logits[name] = model(torch.arange(48).view(2, 24)).logits
        if name.startswith("llama"):
            logits[name + " merged"] = model.merge_and_unload()(torch.arange(48).view(2, 24)).logits
save_file(logits, sys.argv[2])
"""


def make_base(config: Any, dtype: torch.dtype, path: Path) -> nn.Module:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(path)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model.eval()


def with_values_near_zero(ticket: Ticket) -> Ticket:
    """A few values so close to zero that no single fp32 difference leads there."""
    values = {name: ticket.values(name).clone() for name in ticket.names}
    for tensor in values.values():
        tensor[:3] *= 1e-9
    base_values = {name: ticket.base_values(name) for name in ticket.names}
    return Ticket(ticket.mask, values, base_values, ticket.provenance)


def test_stock_peft_gives_the_applied_models_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    expected, folders = {}, {}
    for name, (config, dtype, kinds, whole) in CASES.items():
        base, adapter = tmp_path / name / "base", tmp_path / name / "adapter"
        model = make_base(config, dtype, base)
        ticket = with_values_near_zero(ticket_of(model, kinds))
        plain = str(dtype).removeprefix("torch.")
        if name == "llama_bf16":  # through the command line
            ticket.save(tmp_path / name / "ticket")
            options = ["--base", str(base), "--format", "peft", "--out", str(adapter)]
            assert main(["export", str(tmp_path / name / "ticket"), *options]) == 0
            assert "entries are exact on CPUs only" in capsys.readouterr().out
        else:
            export_peft(ticket, base, adapter)
        assert files(adapter) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
        readme = (adapter / "README.md").read_text(encoding="utf-8")
        assert is_card(readme) and f"dtype=torch.{plain}" in readme and "low_cpu_mem_usage=True" in readme
        assert "import lota" not in readme and "from lota" not in readme, "stock PEFT alone loads it"
        written = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        assert whole <= set(written["modules_to_save"] or ())
        with torch.no_grad():
            before = model(IDS).logits
            apply_(model, ticket)
            expected[name] = model(IDS).logits
        assert not torch.equal(before, expected[name])
        folders[name] = (str(base), str(adapter), plain)
    command = [sys.executable, "-I", "-c", STRANGER, json.dumps(folders), str(tmp_path / "logits.safetensors")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    logits = load_file(tmp_path / "logits.safetensors")
    for name, wanted in expected.items():
        assert torch.equal(logits[name], wanted), name
    assert torch.equal(logits["llama_bf16 merged"], expected["llama_bf16"])
    assert torch.equal(logits["llama_fp32 merged"], expected["llama_fp32"])


def test_refusals_leave_nothing_behind(tmp_path: Path) -> None:
    model = make_base(LlamaConfig(**SIZES), torch.bfloat16, tmp_path / "base")
    ticket, out = ticket_of(model, ["q_proj"]), tmp_path / "out"
    other = make_base(LlamaConfig(**SIZES, initializer_range=0.05), torch.bfloat16, tmp_path / "other")
    assert other is not model
    with pytest.raises(ValueError, match=r"q_proj\.weight.*fingerprint"):
        export_peft(ticket, tmp_path / "other", out)
    with pytest.raises(ValueError, match="expected base weights in bfloat16, got"):
        export_peft(ticket, tmp_path / "base", out, dtype=torch.float32)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="exists already"):
        export_peft(ticket, tmp_path / "base", tmp_path / "full")
    mask = Mask.from_dense({"model.layers.0.q_prj.weight": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"q_prj\.weight, which the model does not have\. Did you mean"):
        export_peft(Ticket(mask, {mask.names[0]: torch.zeros(4)}), tmp_path / "base", out)
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = model.get_parameter(name).detach()
    all_of_it = Mask.from_dense({name: torch.ones_like(weight, dtype=torch.bool)}, {name: identity_of(weight)})
    bad = Ticket(all_of_it, {name: torch.full((weight.numel(),), float("nan"), dtype=torch.bfloat16)})
    with pytest.raises(ValueError, match=r"q_proj\.weight: a value or base value is infinite or NaN"):
        export_peft(bad, tmp_path / "base", out)
    assert files(tmp_path) == ["base", "full", "other"]
