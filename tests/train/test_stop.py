"""A signal to one rank stops all after the same step with a checkpoint, and the run that resumes ends in the ticket of
one that was never stopped."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist
from transformers import TrainerCallback, TrainerState

from lota.ranks.stop import EXIT_STATUS, SIGNALS, listening
from lota.run.checkpoints import newest
from lota.train.phase import Phase
from tests.rank_pool import RankPool
from tests.train.jobs import ROOT, run_recipe, summary
from tests.train.test_end_to_end import command_of, world

__all__ = ["world"]  # a fixture of this module, too

TICKET = ("ticket/ticket.safetensors", "ticket/ticket.json")


def stopped(argv: list[str], number: int, to_rank: int, phase: str, moment: str, step: int) -> int:
    """train_lota on this rank; its exit status. `to_rank` gets the signal once, at a moment of a phase: when it is
    "built", or in the Trainer's "on_step_begin" or "on_train_end" after `step` steps."""

    class Signals(TrainerCallback):
        pass

    def send(self: object, args: object, state: TrainerState, control: object, **_: object) -> None:
        if dist.get_rank() == to_rank and state.global_step == step:
            os.kill(os.getpid(), number)

    setattr(Signals, moment, send)
    build = Phase.__init__

    def build_and_watch(self: Phase, name: str, *args: Any, **changes: Any) -> None:
        build(self, name, *args, **changes)
        if name == phase:
            self.trainer.add_callback(Signals())
            if moment == "built":
                send(self, None, self.trainer.state, None)

    before = [signal.getsignal(known) for known in SIGNALS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Phase, "__init__", build_and_watch)
        try:
            run_recipe("train_lota", argv)
        except SystemExit as end:
            # What a launcher sends to the ranks that end last must not change their status.
            assert [signal.signal(known, handler) for known, handler in zip(SIGNALS, before)] == [signal.SIG_IGN] * 2
            return int(end.code or 0)
    assert [signal.getsignal(known) for known in SIGNALS] == before
    return 0


def options(world: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--config", str(ROOT / "recipes" / "configs" / "demo.yaml"), "--model_name_or_path", str(world / "model")),
        *("--train_file", str(world / "train.jsonl"), "--eval_file", str(world / "test.jsonl")),
        *("--per_device_train_batch_size", "4", "--max_steps", "6", "--calibration_steps", "3", "--merged", "false"),
        *("--logging_steps", "2", "--output_dir", str(output), *more),
    ]


def test_stopped_wherever(ranks: Callable[[int], RankPool], world: Path, tmp_path: Path) -> None:
    """One run, save_strategy "no", stopped in and after calibration, before training, in it and after its last step."""
    straight, run, pool = tmp_path / "straight", tmp_path / "run", ranks(2)
    pool.run(run_recipe, "train_lota", options(world, straight))
    assert not list(straight.rglob("checkpoint-*"))
    argv = options(world, run, "--resume_from_checkpoint", "true")

    def stop(number: int, to_rank: int, phase: str, moment: str, step: int) -> None:
        assert pool.run(stopped, argv, number, to_rank, phase, moment, step) == [EXIT_STATUS] * 2
        assert not (run / "ticket").exists() and not list(run.rglob(".*partial"))

    stop(signal.SIGUSR1, 1, "calibrate", "on_step_begin", 1)
    assert newest(run / "calibration") == run / "calibration" / "checkpoint-2"
    stop(signal.SIGTERM, 0, "calibrate", "on_step_begin", 2)  # its last step, where it makes no checkpoint otherwise
    assert newest(run / "calibration") == run / "calibration" / "checkpoint-3" and not (run / "mask").exists()
    stop(signal.SIGTERM, 1, "train", "built", 0)
    assert (run / "mask").is_dir() and not (run / "calibration").exists() and newest(run) is None
    stop(signal.SIGTERM, 0, "train", "on_step_begin", 2)
    assert newest(run) == run / "checkpoint-3"
    stop(signal.SIGUSR1, 1, "train", "on_step_begin", 5)
    assert newest(run) == run / "checkpoint-6"
    pool.run(run_recipe, "train_lota", argv)

    for name in TICKET:
        assert (run / name).read_bytes() == (straight / name).read_bytes(), name
    assert (run / "mask/ticket.safetensors").read_bytes() == (straight / "mask/ticket.safetensors").read_bytes()
    now, then = summary(run)["training"], summary(straight)["training"]
    assert now["resumed_from_step"] == 6 and now["eval_loss"] == then["eval_loss"]
    assert now["train_loss"] == pytest.approx(then["train_loss"], rel=1e-6)  # as mean of other parts


def test_without_a_checkpoint_the_end_is_not_stopped(
    ranks: Callable[[int], RankPool], world: Path, tmp_path: Path
) -> None:
    """After calibration the mask is written first; after training the ticket, which nothing would bring back."""
    run = tmp_path / "run"
    argv = options(world, run, "--resume_from_checkpoint", "true")
    outcome = ranks(2).run(stopped, argv, signal.SIGTERM, 1, "calibrate", "on_train_end", 3)
    assert outcome == [EXIT_STATUS] * 2 and (run / "mask").is_dir() and not (run / "calibration").exists()
    assert ranks(2).run(stopped, argv, signal.SIGTERM, 1, "train", "on_train_end", 6) == [0, 0]
    assert summary(run)["training"]["steps"] == 6 and not list(run.glob("checkpoint-*"))


@pytest.mark.slow
def test_the_best_checkpoint_is_left_alone(ranks: Callable[[int], RankPool], world: Path, tmp_path: Path) -> None:
    """save_strategy "best" decides at every evaluation whether to save, load_best_model_at_end with save_total_limit 1
    removes every other checkpoint at the end: neither may undo what a stop saves."""
    best = (
        *("--score", "gradient", "--calibration_steps", "1", "--eval_strategy", "steps", "--eval_steps", "1"),
        *("--save_strategy", "best", "--load_best_model_at_end", "true", "--save_total_limit", "1"),
        # No step is better than the one before it: only the first is saved.
        *("--metric_for_best_model", "eval_loss", "--greater_is_better", "true"),
    )
    straight, run, pool = tmp_path / "straight", tmp_path / "run", ranks(2)
    pool.run(run_recipe, "train_lota", options(world, straight, *best))
    argv = options(world, run, *best, "--resume_from_checkpoint", "true")
    assert pool.run(stopped, argv, signal.SIGTERM, 0, "train", "on_step_begin", 2) == [EXIT_STATUS] * 2
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-3"}
    pool.run(run_recipe, "train_lota", argv)
    for name in TICKET:
        assert (run / name).read_bytes() == (straight / name).read_bytes(), name


def test_the_launchers_status(world: Path, tmp_path: Path) -> None:
    """`deepspeed` ends with the status of its ranks, of which one has got the signal."""
    output = tmp_path / "run"
    options = ("--max_steps", "2000", "--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "1")
    command = command_of("train_lota.py", world, output, *options, "--calibration_steps", "2")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(tmp_path / "log", "w+", encoding="utf-8") as log:
        launcher = psutil.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 240
            while newest(output) is None:
                assert launcher.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            (rank,) = (p for p in launcher.children(recursive=True) if p.environ().get("RANK") == "1")
            rank.send_signal(signal.SIGUSR1)
            status = launcher.wait(120)
        finally:
            for process in (*launcher.children(recursive=True), launcher) if launcher.is_running() else ():
                process.kill()
        log.seek(0)
        said = log.read()
    assert status == EXIT_STATUS, said[-3000:]
    assert "stopped by SIGUSR1 after step" in said and not (output / "ticket").exists()


def _child_ends_by_sigterm() -> bool:
    with listening():
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM
            time.sleep(0.05)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return False


def test_workers_that_a_library_forks_still_end_by_sigterm(ranks: Callable[[int], RankPool]) -> None:
    assert all(ranks(2).run(_child_ends_by_sigterm))
