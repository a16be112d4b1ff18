"""README's example runs as it stands, under every launcher and under none; recipes take accelerate's configuration."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lota.ticket import Ticket
from tests.zero.trainers import make_base

ROOT = Path(__file__).resolve().parents[1]
ACCELERATE = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config: {zero_stage: 3, zero3_init_flag: true, offload_optimizer_device: none, offload_param_device: none}
mixed_precision: bf16
num_machines: 1
num_processes: 2
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a user would stand: a base, rows, the DeepSpeed file, and README's first Python block as a script."""
    folder = tmp_path_factory.mktemp("user")
    make_base(folder / "base")
    rows = map(json.loads, (folder / "base" / "rows.jsonl").read_text(encoding="utf-8").splitlines())
    lines = [json.dumps({key: row[key] for key in ("prompt", "completion")}) for row in list(rows)[:16]]
    (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    shutil.copytree(ROOT / "ds_configs", folder / "ds_configs")
    block = re.search(r"```python\n(import lota\n.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert block is not None
    (folder / "script.py").write_text(block.group(1), encoding="utf-8")
    (folder / "accelerate.yaml").write_text(ACCELERATE, encoding="utf-8")
    return folder


def start(folder: Path, *words: str) -> None:
    """Run `python WORDS` in the folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


LAUNCHERS = {
    "nobody": (),
    "deepspeed": ("-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port"),
    "torchrun": ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"),
    "accelerate": ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port"),
}


@pytest.mark.parametrize(
    # The package's own job runs under torchrun below, and a recipe under accelerate.
    "launcher",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in ("torchrun", "accelerate"))) for name in LAUNCHERS],
)
def test_the_readme(folder: Path, launcher: str) -> None:
    shutil.rmtree(folder / "ticket", ignore_errors=True)
    words = LAUNCHERS[launcher]
    start(folder, *words, *([port()] if words else []), "script.py")
    ticket = Ticket.load(folder / "ticket")
    assert ticket.num_active == round(0.1 * ticket.mask.eligible)
    assert ticket.num_changed > 0


def test_a_recipe_takes_the_configuration_that_accelerate_launch_brings(folder: Path) -> None:
    options = {"model_name_or_path": "base", "train_file": "train.jsonl", "output_dir": "run", "score": "random"}
    options |= {"max_steps": "2", "per_device_train_batch_size": "2", "learning_rate": "1e-2"}
    start(
        folder,
        *("-m", "accelerate.commands.launch", "--config_file", "accelerate.yaml", "--main_process_port", port()),
        str(ROOT / "recipes" / "train_lota.py"),
        *(word for name, value in options.items() for word in (f"--{name}", value)),
    )
    summary = json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["world_size"] == 2 and summary["training"]["report"]["steps"] == 2
    assert "deepspeed" not in (folder / "run" / "config.yaml").read_text(encoding="utf-8")


MODULES = {
    "lota": ("-m", "lota", "train"),
    "deepspeed": (
        *("-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--module", "--master_port", "PORT"),
        *("lota", "train"),
    ),
    "torchrun": (
        *("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "PORT"),
        *("-m", "lota", "train"),
    ),
    "deepspeed lota.train": (
        *("-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--module", "--master_port", "PORT", "lota.train"),
    ),
}


@pytest.mark.parametrize(
    "how", [pytest.param(name, marks=[pytest.mark.slow] * (name == "deepspeed lota.train")) for name in MODULES]
)
def test_the_job_is_a_module_of_the_package(folder: Path, how: str, tmp_path: Path) -> None:
    """`lota train`, alone and as the ranks of a launcher, away from any checkout, with the packaged ZeRO-3 file."""
    options = {"model_name_or_path": "base", "train_file": "train.jsonl", "output_dir": str(tmp_path / "run")}
    options |= {"score": "random", "max_steps": "1", "per_device_train_batch_size": "2", "learning_rate": "1e-2"}
    words = (port() if word == "PORT" else word for word in MODULES[how])
    start(folder, *words, *(word for name, value in options.items() for word in (f"--{name}", value)))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["world_size"] == (1 if how == "lota" else 2) and summary["training"]["report"]["steps"] == 1
    assert summary["training"]["last_step_loss"] is not None, "a run shorter than logging_steps shows its losses"
