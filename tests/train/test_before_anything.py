"""What a run could not end well with is refused before a model is loaded, in one line; two runs share no folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lota.architecture import read_config
from lota.cli import main as cli
from lota.delivery.base import check_base, check_numbers
from lota.files import only_writer
from lota.run.resume_checks import check_options
from tests.delivery.architecture_table import load
from tests.train.jobs import ROOT
from tests.train.test_merged import save_base


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_base("tied", folder / "base")
    rows = [{"prompt": f"Q: {number}", "completion": f" {number}"} for number in range(4)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    talk = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]
    (folder / "talk.jsonl").write_text(
        "\n" + json.dumps({"messages": talk[1:]}) + "\n" + json.dumps({"messages": talk})
    )
    (folder / "no_system.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    (folder / "notes").mkdir()
    (folder / "notes" / "config.yaml").write_text("a: 1")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    return folder


def train(world: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    argv = ["--model_name_or_path", str(world / "base"), "--train_file", str(world / "rows.jsonl")]
    argv += ["--output_dir", str(world / "run"), "--max_steps", "1", "--learning_rate", "1e-3", "--report_to", "none"]
    return subprocess.run(
        [sys.executable, "-m", "lota", "train", *argv, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        check=False,
    )


CASES: list[tuple[list[str], str]] = [
    (["--max_length", "-5"], "max_length must be at least 1, got -5"),
    (["--max_steps", "0"], "max_steps must be at least 1"),
    (["--learning_rate", "0"], "learning_rate must be above 0"),
    (["--optim", "adafactor"], "optimizer Adafactor is not element-wise"),
    (["--lr_scheduler_type", "cosine_with_min_lr"], "lr_scheduler_type: cosine_with_min_lr cannot be used"),
    (["--report_to", "wandb"], "report_to: WandbCallback requires wandb"),
    (["--train_file", "{world}/nothing.jsonl"], "no such file"),
    (["--model_name_or_path", "{world}/nothing"], "no such folder"),
    (["--model_name_or_path", "{world}/notes"], "is the folder of a run, no model"),
    (["--model_name_or_path", "{world}/adapter"], "is a PEFT adapter, no model"),
    (
        ["--train_file", "{world}/talk.jsonl", "--chat_template_path", "{world}/no_system.jinja"],
        "talk.jsonl, line 3: the chat template refuses a conversation of system, user, assistant: no system here",
    ),
]


def test_refusals_are_one_line_with_status_2(world: Path) -> None:
    """What users see; the others run in a process that is there already."""
    for words, message in CASES[:2]:
        done = train(world, *(word.format(world=world) for word in words))
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 2 and message in last and "Resume" not in done.stderr, done.stderr[-500:]
    assert not (world / "run").exists()


@pytest.mark.parametrize(("words", "message"), CASES[2:])
def test_refusals(world: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, ranks: Any) -> None:
    argv = ["--model_name_or_path", str(world / "base"), "--train_file", str(world / "rows.jsonl")]
    argv += ["--output_dir", str(world / "run"), "--max_steps", "1", "--learning_rate", "1e-3", "--report_to", "none"]
    from tests.train import jobs

    filled = [*argv, *(word.format(world=world) for word in words)]
    (outcome,) = ranks(1).outcomes(jobs.run_recipe, "train_lota", filled)
    assert outcome.error_type == "ValueError" and message in outcome.error, outcome.error
    assert not any((world / "run").glob("*"))


def test_an_ascii_terminal_and_a_second_run(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["--output_dir", str(out), "--calibration_steps", "1", "--score", "gradient", "--bf16", "true"]
    with only_writer(out, "runs in"):
        done = train(world, *words)
        assert done.returncode == 2 and "runs in" in done.stderr.strip().splitlines()[-1], done.stderr[-500:]
    done = train(world, *words, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "\\u27e6" in done.stdout and (out / "ticket").is_dir()
    assert not list(tmp_path.glob(".run.lock"))


def test_a_base_must_be_whole(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "base", tmp_path / "base")
    check_base(str(tmp_path / "base"))
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(ValueError, match=rf"does not hold {name}, which LlamaForCausalLM has"):
        check_base(str(tmp_path / "base"))
    check_base(str(tmp_path / "base"), is_whole=False)
    tensors[name][3, 4] = float("nan")
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name} holds NaN at 1 of"):
        check_numbers(load(tmp_path / "base"), "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    check_base(str(tmp_path / "base"))  # other formats train, and cannot be merged
    with pytest.raises(ValueError, match=r"holds no \.safetensors file"):
        check_base(str(tmp_path / "base"), needs_safetensors=True)


def test_code_of_a_folder_runs_only_where_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "configuration_own.py").write_text(
        f"from transformers import LlamaConfig\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_for_tests'\n"
    )
    content = {"model_type": "own_for_tests", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(content))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert cli(["plan", str(folder)]) == 2 and "trust_remote_code" in capsys.readouterr().err
    with pytest.raises(ValueError, match="trust_remote_code"):
        check_base(str(folder))
    assert not (tmp_path / "ran").exists()
    assert read_config(str(folder), trust_remote_code=True).model_type == "own_for_tests"
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "entries",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": -3},
        {"num_hidden_layers": "many"},
        {"vocab_size": 10**30},
        {"hidden_size": 0},
        {"num_attention_heads": 0},
        {"num_labels": 10**9},
        {"rope_theta": "x", "rope_parameters": 7},
    ],
)
def test_absurd_sizes_end_quickly(world: Path, tmp_path: Path, entries: dict[str, Any]) -> None:
    shutil.copytree(world / "base", tmp_path / "base")
    content = json.loads((tmp_path / "base" / "config.json").read_text()) | entries
    (tmp_path / "base" / "config.json").write_text(json.dumps(content))
    assert cli(["plan", str(tmp_path / "base")]) in (0, 2)


def test_the_same_files_through_links_are_the_same_run(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    before = {"train_file": [str(tmp_path / "a.jsonl")], "seed": 1}
    check_options(before, {"train_file": [str(tmp_path / "link.jsonl")], "seed": 1}, tmp_path)
    mixture = [{"train_file": str(tmp_path / "link.jsonl"), "weight": 1}]
    check_options({"mixture": [{"train_file": str(tmp_path / "a.jsonl"), "weight": 1}]}, {"mixture": mixture}, tmp_path)
    with pytest.raises(ValueError, match="train_file was"):
        check_options(before, {"train_file": [str(tmp_path / "b.jsonl")], "seed": 1}, tmp_path)
