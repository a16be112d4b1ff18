"""The recipes as a user starts them, on two ranks: every promised file is there, and only active entries moved."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lota.demo import base
from lota.demo.small_model import SmallModelConfig
from lota.demo.world import WorldConfig
from lota.ticket import Mask, Ticket

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of two layers with its data; hardly trained, which is enough to move."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        texts = WorldConfig(num_sentences=300, num_translations=200, num_train=64, num_test=16)
        sizes = SmallModelConfig(vocab_size=320, hidden_size=64, num_layers=2, steps=3, batch_rows=8)
        return base.prepare(texts, sizes, lambda _: None)


def command_of(script: str, world: Path, output: Path, *options: str) -> list[str]:
    """The command that starts a recipe on two ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(port)),
        *(f"recipes/{script}", "--config", "recipes/configs/demo.yaml", "--output_dir", str(output)),
        *("--model_name_or_path", str(world / "model"), "--train_file", str(world / "train.jsonl")),
        *("--per_device_train_batch_size", "4", "--eval_file", str(world / "test.jsonl"), *options),
    ]


def launch(script: str, world: Path, output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = command_of(script, world, output, *options)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)


def succeed(*args: Any) -> dict[str, Any]:
    done = launch(*args)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads((args[2] / "summary.json").read_text(encoding="utf-8"))


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_main_job(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    summary = succeed(
        *("train_lota.py", world, out, "--max_steps", "6", "--calibration_steps", "3"),
        *("--logging_steps", "1", "--gradient_accumulation_steps", "2", "--ticket_dtype", "float32"),
    )
    left = {"calibration.json", "config.yaml", "examples.txt", "mask", "merged", "metrics.jsonl"}
    left |= {"report.png", "run.json", "summary.json", "ticket"}
    assert {path.name for path in out.iterdir()} == left
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    card = (out / "ticket" / "README.md").read_text(encoding="utf-8")
    assert f"| evaluation loss after | {summary['training']['eval_loss']:.6g} |" in card
    assert "| score | task_vector |" in card and "| density asked | 0.1 |" in card
    ticket = Ticket.load(out / "ticket")
    assert ticket.num_active == round(0.1 * ticket.mask.eligible) == summary["mask"]["num_active"]
    assert summary["mask"]["density"] == ticket.density and summary["mask"]["density_asked"] == 0.1
    assert ticket.num_changed == summary["ticket"]["num_changed"] > 0
    assert ticket.values(ticket.names[0]).dtype == torch.float32  # masters, on request

    base, merged = weights(world / "model"), weights(out / "merged")
    assert base.keys() == merged.keys()
    for name, tensor in merged.items():
        expected = base[name].clone()
        if name in ticket.names:
            expected[ticket.mask.dense(name)] = ticket.values(name).bfloat16()
        assert torch.equal(tensor, expected), name
    AutoModelForCausalLM.from_pretrained(out / "merged")

    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = {
        phase: [r["step"] for r in rows if r["phase"] == phase and "loss" in r] for phase in ("calibrate", "train")
    }
    assert steps == {"calibrate": [1, 2, 3], "train": [1, 2, 3, 4, 5, 6]}
    # The rewind: both phases begin at the very same loss, that of the base.
    assert summary["training"]["eval_loss_before"] == summary["calibration"]["eval_loss_before"]
    assert summary["training"]["eval_loss"] < summary["training"]["eval_loss_before"]
    report = summary["training"]["report"]
    assert report["steps"] == 6 and report["skipped_steps"] == 0 and report["reductions"] == 12
    assert sum(report["bytes_held"].values()) < sum(report["bytes_held_dense"].values())
    assert {"calibration", "selection", "training", "ticket", "merged", "total"} <= summary["seconds"].keys()

    again = launch("train_lota.py", world, out)
    assert again.returncode != 0 and "already holds a run" in again.stderr + again.stdout


def test_mask_alone_then_training_on_it(world: Path, tmp_path: Path) -> None:
    summary = succeed(
        *("calibrate_mask.py", world, tmp_path / "mask", "--score", "gradient", "--density", "0.01"),
        *("--calibration_steps", "2", "--gradient_accumulation_steps", "2"),
    )
    mask = Mask.load(tmp_path / "mask" / "mask")
    assert mask.num_active == summary["mask"]["num_active"] == round(0.01 * mask.eligible)
    assert mask.digest == summary["mask"]["digest"]
    path = str(tmp_path / "mask" / "mask")
    summary = succeed("train_lota.py", world, tmp_path / "run", "--mask", path, "--max_steps", "2", "--merged", "false")
    assert Ticket.load(tmp_path / "run" / "ticket").mask == mask
    assert "calibration" not in summary and not (tmp_path / "run" / "merged").exists()


def test_full_fine_tuning_leaves_a_model(world: Path, tmp_path: Path) -> None:
    options = ("--method", "full", "--learning_rate", "1e-2", "--max_steps", "3")
    summary = succeed("train_lota.py", world, tmp_path / "run", *options)
    assert summary["training"]["eval_loss"] < summary["training"]["eval_loss_before"]
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "run" / "merged").iterdir()}
    assert len(set(modes.values())) == 1, "whoever reads the folder reads its weights"
    base, tuned = weights(world / "model"), weights(tmp_path / "run" / "merged")
    assert {n: (t.shape, t.dtype) for n, t in base.items()} == {n: (t.shape, t.dtype) for n, t in tuned.items()}
    assert all(not torch.equal(tensor, base[name]) for name, tensor in tuned.items())  # norms and embeddings too
