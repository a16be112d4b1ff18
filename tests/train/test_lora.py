"""The LoRA baseline has the losses of plain PEFT and TRL to the last bit, an adapter for PEFT, and an exact merge."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lota.run.options import parse
from lota.run.resolve import Adapter, resolve
from lota.train import lora
from tests.train import jobs
from tests.zero.trainers import make_base

SETTINGS: dict[str, Any] = {
    "max_steps": 3,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "max_length": 32,
    "seed": 5,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def _plain_script(base: str) -> dict[str, Any]:
    """What a user of PEFT and TRL writes, and what it sends, counted from outside."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from tests.counting import Traffic

    arguments = SFTConfig(
        output_dir=base + "/plain",
        deepspeed=str(jobs.ROOT / "ds_configs" / "zero3.json"),
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **SETTINGS,
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    data = load_dataset("json", data_files=base + "/rows.jsonl", split="train").remove_columns("other")
    peft = LoraConfig(
        task_type="CAUSAL_LM", r=3, lora_alpha=8, lora_dropout=0.05, target_modules="all-linear", use_rslora=True
    )
    trainer = SFTTrainer(model, arguments, train_dataset=data, peft_config=peft)
    with Traffic() as traffic:
        trainer.train()
    history = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    jobs.forget(trainer)
    return {"losses": history, "sent": traffic.payload["reduce_scatter"]}


def test_the_baseline(ranks, base: Path) -> None:
    output = base / "recipe"
    argv = ["--method", "lora", "--lora_r", "3", "--lora_alpha", "8", "--use_rslora", "true", "--merged", "true"]
    argv += ["--model_name_or_path", str(base), "--train_file", str(base / "rows.jsonl"), "--output_dir", str(output)]
    argv += [word for key, value in SETTINGS.items() for word in (f"--{key}", str(value))]
    ranks(2).run(jobs.run_recipe, "train_lota", argv)
    plain = ranks(2).run(_plain_script, str(base))[0]
    assert jobs.losses(output) == plain["losses"] and len(plain["losses"]) == 3

    names = {path.name for path in output.iterdir()}
    left = {"adapter", "checkpoint-3", "config.yaml", "examples.txt", "merged", "metrics.jsonl", "run.json"}
    assert names - {"report.png", "summary.json"} == left
    summary = jobs.summary(output)
    report, trained = summary["training"]["report"], 2 * 3 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 56))
    adapter = load_file(output / "adapter" / "adapter_model.safetensors")
    assert report["num_trained"] == summary["adapter"]["num_trained"] == trained
    assert trained == sum(t.numel() for t in adapter.values())
    assert summary["adapter"]["bytes"] == sum(t.nbytes for t in adapter.values())
    assert report["steps"] == 3 and report["reductions"] == 6
    assert report["bytes_sent"] == plain["sent"]
    pieces = report["bytes_sent"] // (6 * 2 * 2)  # padded: two ranks, two bytes
    assert trained / 2 <= pieces < trained / 2 + len(adapter) and report["bytes_held"]["masters"] == 4 * pieces
    assert 2 * 4 * pieces <= report["bytes_held"]["moments"] < 2 * 4 * pieces + 64  # and step counters

    merged = load_file(output / "merged" / "model.safetensors")
    expected = _merged_by_peft(base, output / "adapter")
    assert merged.keys() == load_file(base / "model.safetensors").keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.items())
    assert sum(not torch.equal(t, load_file(base / "model.safetensors")[n]) for n, t in merged.items()) == 14

    # Stopped before its summary, the run resumes and writes both once more.
    (output / "summary.json").unlink()
    ranks(2).run(jobs.run_recipe, "train_lota", [*argv, "--resume_from_checkpoint", "true"])
    assert jobs.summary(output)["training"]["resumed_from_step"] == 3 and jobs.losses(output) == plain["losses"]
    for path, before in (("adapter/adapter_model.safetensors", adapter), ("merged/model.safetensors", merged)):
        again = load_file(output / path)
        assert again.keys() == before.keys() and all(torch.equal(again[name], before[name]) for name in before), path


def _merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """PEFT's own merge, of an fp32 model, rounded at the end."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: tensor.bfloat16() for name, tensor in merged.state_dict().items()}


@pytest.mark.parametrize("is_transposed", [False, True])
def test_the_merge_rounds_once(is_transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    down, up, weight = (torch.randn(shape, generator=generator).bfloat16() for shape in ((2, 5), (7, 2), (7, 5)))
    exact = weight.double() + (up.double() @ down.double()) * 1.5
    factor = lambda tensor: {"default": SimpleNamespace(weight=tensor)}  # noqa: E731
    layer = SimpleNamespace(
        lora_A=factor(down), lora_B=factor(up), scaling={"default": 1.5}, fan_in_fan_out=is_transposed
    )
    merged = lora._merge(layer, weight.T if is_transposed else weight)
    merged = merged.T if is_transposed else merged
    # No tie of bf16 is as near as fp32's error here, so that rounding the exact value is rounding the fp32 one.
    assert merged.dtype == torch.bfloat16 and torch.equal(merged, exact.bfloat16())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--method", "lora", "--density", "0.1"], "method: lora trains an adapter, so density would be ignored"),
        (["--method", "lora", "--shard_group_size", "1"], "shard_group_size would be ignored"),
        (["--method", "full", "--shard_group_size", "1"], "shard_group_size would be ignored"),
        (["--method", "full", "--lora_r", "8"], "method: full has no adapter, so lora_r would be ignored"),
        (["--lora_alpha", "8"], "method: lota has no adapter, so lora_alpha would be ignored"),
        (["--method", "lora", "--lora_r", "0"], "lora_r must be at least 1, got 0"),
        (["--method", "lora", "--lora_dropout", "1.5"], r"lora_dropout must be in \[0, 1\), got 1.5"),
    ],
)
def test_refusals(argv: list[str], message: str) -> None:
    words = ["--model_name_or_path", "base", *argv]
    with pytest.raises(ValueError, match=message):
        resolve(*parse(words), argv=words)


def test_without_peft_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else find(name, *a))
    words = ["--model_name_or_path", "base", "--method", "lora"]
    with pytest.raises(ValueError, match=r"needs PEFT, which is not installed: pip install 'peft"):
        resolve(*parse(words), argv=words)


def test_the_file_of_a_lota_run_serves_and_the_defaults_are_filled_in(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"density": 0.2, "lora_r": 4, "model_name_or_path": "base"}), encoding="utf-8")
    words = ["--config", str(path), "--method", "lora"]
    args, config = parse(words)
    options = resolve(args, config, argv=words)
    assert options.notes == ("method: lora trains an adapter; not used from the config file: density",)
    assert options.adapter == Adapter(4, 32, 0.05, ("all-linear",), False)
