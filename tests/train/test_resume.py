"""A run that is killed and started again resumes from its newest complete checkpoint, and ends in the very files of one
that was never stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerState
from trl import SFTConfig

from lota.run import checkpoint_manifest
from lota.run.batch import Batch
from lota.run.checkpoints import newest, take_over_state
from lota.run.resume import Resume
from lota.train.trainer import WholeCheckpoints
from tests.train.faults import ENVIRONMENT, kill_rank, start
from tests.train.test_end_to_end import ROOT, command_of, launch, succeed, world

__all__ = ["world"]  # a fixture of this module, too

OPTIONS = (
    *("--max_steps", "24", "--calibration_steps", "12", "--save_strategy", "steps"),
    *("--save_steps", "4", "--save_total_limit", "2"),
    *("--logging_steps", "1", "--merged", "false", "--report_to", "tensorboard"),
)


def kill_when(appears: Path, world: Path, output: Path, *options: str) -> None:
    """Start the job and kill every process of it, without warning, when `appears` is there."""
    process = subprocess.Popen(
        command_of("train_lota.py", world, output, *options), cwd=ROOT, env=ENVIRONMENT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not appears.exists():
        assert process.poll() is None, process.stdout and process.stdout.read()[-6000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in tree:
        member.send_signal(signal.SIGKILL)
    psutil.wait_procs(tree, 30)
    assert not (output / "summary.json").exists(), "it was done before it could be stopped"


def test_killed_three_times(world: Path, tmp_path: Path) -> None:
    """The whole job while it calibrates; one rank in the middle of a save, with nobody to watch over the ranks; the
    other one while it trains under DeepSpeed's launcher."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    go_on = (*OPTIONS, "--resume_from_checkpoint", "true")
    whole = succeed("train_lota.py", world, straight, *OPTIONS)

    kill_when(stopped / "calibration" / "checkpoint-4", world, stopped, *OPTIONS)
    assert newest(stopped) is None
    job = start("nobody", world, stopped, *go_on)
    took = kill_rank(job, 1, (stopped / ".checkpoint-8.partial").exists)
    assert took is not None and took < 30 and job.says_that_ended(1), job.text()[-4000:]
    assert [process.returncode for process in job.processes] == [1, -signal.SIGKILL]
    assert (stopped / "mask").is_dir() and not (stopped / "calibration").exists()
    assert newest(stopped) in (stopped / "checkpoint-4", stopped / "checkpoint-8")
    job = start("deepspeed", world, stopped, *go_on)
    took = kill_rank(job, 0, lambda: '"train", "step": 14,' in (stopped / "metrics.jsonl").read_text(encoding="utf-8"))
    assert took is not None and took < 30 and job.says_that_ended(0), job.text()[-4000:]
    assert job.processes[0].returncode != 0
    step = max(int(path.name.rpartition("-")[2]) for path in stopped.glob("checkpoint-*"))
    resumed = succeed("train_lota.py", world, stopped, *go_on)

    assert resumed["training"]["resumed_from_step"] == step >= 12
    for name in ("ticket/ticket.safetensors", "ticket/ticket.json", "mask/ticket.safetensors"):
        assert (stopped / name).read_bytes() == (straight / name).read_bytes(), name
    for key in ("train_loss", "last_step_loss", "eval_loss", "eval_loss_before"):
        assert resumed["training"][key] == whole["training"][key], key
    assert sorted(path.name for path in stopped.glob("checkpoint-*")) == ["checkpoint-20", "checkpoint-24"]
    assert not list(stopped.glob(".checkpoint*"))

    # Metrics and TensorBoard tell of one run: every step once, calibration first.
    rows = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [(row["phase"], row["step"]) for row in rows if "loss" in row]
    assert steps == [*(("calibrate", n) for n in range(1, 13)), *(("train", n) for n in range(1, 25))]
    events = EventAccumulator(str(straight / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/calibration_loss")] == list(range(1, 13))
    assert [event.step for event in events.Scalars("train/loss")] == list(range(13, 37))

    # A checkpoint is compact: 12 bytes an active entry in safetensors, and nothing of dense size beside it.
    checkpoint = straight / "checkpoint-24"
    state = list(checkpoint.glob("global_step24/*.safetensors"))
    stored = sum(file.stat().st_size for file in state)
    assert 12 * whole["mask"]["num_active"] <= stored < 16 * whole["mask"]["num_active"]
    others = {file.name: file.stat().st_size for file in checkpoint.rglob("*") if file.is_file() and file not in state}
    assert not {name for name in others if name.endswith((".safetensors", ".bin", ".pt"))} - {
        "training_args.bin",
        "scheduler.pt",
    }
    assert max(others.values()) < 200_000, others

    again = launch("train_lota.py", world, stopped, *OPTIONS, "--resume_from_checkpoint", "true")
    assert again.returncode != 0 and "holds a complete run" in again.stdout + again.stderr
    (stopped / "summary.json").unlink()
    again = launch("train_lota.py", world, stopped, *OPTIONS, "--resume_from_checkpoint", "true", "--density", "0.2")
    assert again.returncode != 0 and "density was 0.1, now 0.2" in again.stdout + again.stderr
    # An unfinished checkpoint is refused by name, and the newest complete one named.
    cut = next((stopped / "checkpoint-24").glob("global_step24/*-of-00002.safetensors"))
    os.truncate(cut, cut.stat().st_size - 7)
    before = {path: path.stat().st_mtime_ns for path in stopped.rglob("*") if path.is_file()}
    again = launch("train_lota.py", world, stopped, *OPTIONS, "--resume_from_checkpoint", "true")
    assert again.returncode != 0 and "is damaged" in again.stdout + again.stderr
    assert before.keys() <= {path for path in stopped.rglob("*") if path.is_file()}
    assert all(path.stat().st_mtime_ns == at for path, at in before.items() if path.name != "metrics.jsonl")


def test_the_newest_complete_checkpoint_is_chosen(tmp_path: Path) -> None:
    for step in (4, 20, 100):
        folder = tmp_path / f"checkpoint-{step}" / f"global_step{step}"
        folder.mkdir(parents=True)
        (folder / "checkpoint.json").touch()
        if step < 100:
            checkpoint_manifest.write(folder.parent, Batch(1, 1, 2), [checkpoint_manifest.list_files(folder.parent)])
    (tmp_path / ".checkpoint-200.partial").mkdir()
    assert newest(tmp_path) == tmp_path / "checkpoint-20"
    decided = Resume.decide("true", tmp_path)
    assert decided.of_phase(tmp_path) == tmp_path / "checkpoint-20"
    assert decided.of_phase(tmp_path / "calibration") is None and decided.batch == Batch(1, 1, 2)
    assert Resume.decide(str(tmp_path / "checkpoint-4"), tmp_path).checkpoint == tmp_path / "checkpoint-4"
    assert Resume.decide(None, tmp_path) == Resume.decide("False", tmp_path) == Resume()
    assert newest(tmp_path / "nowhere") is None


def test_a_checkpoints_state_becomes_the_runs_own(tmp_path: Path) -> None:
    state = TrainerState(max_steps=40, save_steps=5, logging_steps=5, best_global_step=10)
    asked = SFTConfig(str(tmp_path), save_steps=7, logging_steps=0.1, use_cpu=True, bf16=False, report_to=[])
    take_over_state(state, asked)
    assert (state.save_steps, state.logging_steps, state.best_model_checkpoint) == (7, 4, None)
    (tmp_path / "checkpoint-10").mkdir()  # where it was when the folder had another name, the Trainer does not find it
    take_over_state(state, asked)
    assert state.best_model_checkpoint == str(tmp_path / "checkpoint-10")


def test_what_a_run_had_after_the_checkpoint_it_went_on_from_is_removed(tmp_path):
    trainer = WholeCheckpoints()
    trainer.state = TrainerState(global_step=450)
    for name in ("checkpoint-400", "checkpoint-450", "checkpoint-600", "checkpoint-best"):
        (tmp_path / name).mkdir()
    trainer._remove_later(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-400", "checkpoint-450", "checkpoint-best"]
