"""A real vLLM server in an environment of its own answers as the trainer's model does, step for step; one that does not
ends the run by name."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lota.serve import Server, status
from lota.ticket import Ticket
from tests.serve.servers import VLLM_PYTHON, has_vllm, make_base, serving
from tests.train import jobs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_vllm(), reason=f"needs vLLM in {VLLM_PYTHON} (make test-vllm)"),
]
PORT = 18731
REWARD = f"""
import os
import signal
from pathlib import Path
from lota.serve import Server, switch

def low_words(completions, **others):
    return [sum(int(word[1:]) < 16 for word in text.split()) / 16 for text in completions]

def and_meddles(completions, trainer_state, **others):
    if trainer_state is not None and trainer_state.global_step == 1 and trainer_state.is_world_process_zero:
        switch(Server("http://127.0.0.1:{PORT}"), [])
    return low_words(completions)

def and_kills(completions, trainer_state, **others):
    if trainer_state is not None and trainer_state.global_step == 1 and trainer_state.is_world_process_zero:
        os.killpg(int(Path(__file__).with_name("pid").read_text()), signal.SIGKILL)
    return low_words(completions)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    make_base(folder / "base")
    make_base(folder / "other", seed=1)
    rows = torch.randint(0, 124, (32, 6), generator=torch.Generator().manual_seed(0)).tolist()
    lines = [json.dumps({"prompt": " ".join(f"w{word}" for word in row)}) for row in rows]
    (folder / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "rewards.py").write_text(REWARD, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def server(base: Path) -> Iterator[Server]:
    with serving(base / "base", PORT, base / "log") as (server, process):
        (base / "pid").write_text(str(process.pid), encoding="utf-8")
        yield server


def run(ranks, base: Path, name: str, *options: str) -> Path:
    settings = {
        "model_name_or_path": base / "base",
        "train_file": base / "prompts.jsonl",
        "output_dir": base / name,
        "reward": f"{base / 'rewards.py'}:low_words",
        "server": f"http://127.0.0.1:{PORT}",
        "server_check_steps": 1,
        "server_tolerance": 0.1,
        "calibration_steps": 2,
        "max_steps": 6,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "beta": 0.01,
        "per_device_train_batch_size": 8,
        "num_generations": 8,
        "max_completion_length": 16,
        "logging_steps": 1,
    }
    argv = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    ranks(2).run(jobs.run_recipe, "train_grpo", [*argv, *options])
    return base / name


def test_every_step_is_answered_by_the_model_of_that_step(ranks, base: Path, server: Server) -> None:
    output = run(ranks, base, "run")
    facts = jobs.summary(output)["training"]["server"]
    rows = map(json.loads, (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    moved = [row["kl"] for row in rows if "kl" in row and row["phase"] == "train"]
    assert facts["updates"] == 7 and facts["comparisons"] == 6
    assert facts["largest_difference"] < 0.1 < moved[-1]  # so a server that stayed behind would have been found
    assert math.isclose(moved[0], 0, abs_tol=1e-6)
    assert Ticket.load(output / "ticket").num_changed > 0
    assert status(server).tickets == () and not (output / "served").exists()


def test_another_base_is_refused_before_the_first_step(ranks, base: Path, server: Server) -> None:
    """And, should the comparison let it through, by fingerprints: the ticket of the untrained values is of another."""
    with pytest.raises(Exception, match=r"is not the model that is trained: of \d+ tokens its mean log-probability"):
        run(ranks, base, "other", "--model_name_or_path", str(base / "other"))
    with pytest.raises(Exception, match=r"expected the base's own weights.* The ticket belongs to another base model"):
        run(ranks, base, "unlike", "--server_tolerance", "100", "--model_name_or_path", str(base / "other"))


def test_a_difference_beyond_the_tolerance_ends_the_run_with_both_numbers(ranks, base: Path, server: Server) -> None:
    with pytest.raises(Exception, match=r"log-probability is -\d.* and the trainer's -\d.*server_tolerance 1e-09"):
        run(ranks, base, "strict", "--server_tolerance", "1e-9")


def test_a_server_that_lost_the_ticket_or_died_ends_the_run(ranks, base: Path, server: Server) -> None:
    """Last, because it ends the server."""
    reward = base / "rewards.py"
    with pytest.raises(Exception, match=r"has its base, and this run gave it .*: it was started again, or"):
        run(ranks, base, "meddled", "--reward", f"{reward}:and_meddles", "--server_check_steps", "99")
    with pytest.raises(Exception, match="no server there, or it ended"):
        run(ranks, base, "killed", "--reward", f"{reward}:and_kills")
