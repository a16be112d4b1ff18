"""`lota run` of an unedited program gives the mask and the ticket of the blocks written into it, byte for byte; and one
that fails gives none."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lota
from tests.rank_pool import RankPool
from tests.wrap import programs
from tests.zero.trainers import make_base

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = str(ROOT / "tests" / "wrap" / "programs.py")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "PORT")
DEEPSPEED = ("-m", "deepspeed.launcher.runner", "--no_local_rank", "--num_gpus", "2", "--master_port", "PORT")
LAUNCHERS: dict[int, dict[str, tuple[str, ...]]] = {
    1: {"loop": (), "sft": ()},
    2: {"loop": TORCHRUN, "sft": DEEPSPEED},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def lota_run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`lota run WORDS`, in a process and an environment of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "lota", "run", *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False)


def started(name: str, num_ranks: int, base: Path, *deed: str) -> list[str]:
    """The words of a program's command."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = (*LAUNCHERS[num_ranks][name], PROGRAM, name, str(base), *deed)
    return [sys.executable, *(port if word == "PORT" else word for word in words)]


def with_blocks(name: str, folder: str, score: str, out: str) -> None:
    """The same program with the blocks written in, as a rank of a pool."""
    import gc

    from accelerate.state import AcceleratorState

    program: Callable[[Path], None] = getattr(programs, name)
    with lota.calibration_zero3(score=score, density=0.05) as calibration:
        program(Path(folder))
        engine = calibration._run.engine
        mask = calibration.mask()
    engine.destroy()
    AcceleratorState._reset_state()
    gc.collect()
    with lota.sparse_zero3(mask, shard_group_size=1) as run:
        program(Path(folder))
        run.save_ticket(out)
    run.engine.destroy()
    AcceleratorState._reset_state()


@pytest.mark.parametrize(
    ("name", "num_ranks", "score"),
    [
        pytest.param("loop", 1, "task_vector", marks=pytest.mark.slow),
        ("loop", 2, "gradient"),
        pytest.param("sft", 1, "gradient", marks=pytest.mark.slow),
        pytest.param("sft", 2, "task_vector", marks=pytest.mark.slow),
    ],
)
def test_the_ticket_is_that_of_the_blocks(
    ranks: Callable[[int], RankPool], base: Path, tmp_path: Path, name: str, num_ranks: int, score: str
) -> None:
    options = ("--score", score, "--density", "0.05", "--shard_group_size", "1", "--num_steps", str(programs.STEPS))
    done = lota_run("both", "--out", "run", *options, "--", *started(name, num_ranks, base), cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert f"run/ticket: ticket of 3 steps on {num_ranks} ranks" in done.stdout
    ranks(num_ranks).run(with_blocks, name, str(base), score, str(tmp_path / "blocks"))

    ours, theirs = lota.Ticket.load(tmp_path / "run" / "ticket"), lota.Ticket.load(tmp_path / "blocks")
    assert lota.Mask.load(tmp_path / "run" / "mask").digest == ours.mask.digest == theirs.mask.digest
    assert ours.num_changed > 0.5 * ours.num_active
    files = [path.name for path in sorted((tmp_path / "blocks").iterdir())]
    assert [path.name for path in sorted((tmp_path / "run" / "ticket").iterdir())] == files
    for file in files:
        pair = [(folder / file).read_bytes() for folder in (tmp_path / "run" / "ticket", tmp_path / "blocks")]
        if file.endswith(".json"):
            contents = [json.loads(content) for content in pair]
            provenance, _ = (content.pop("provenance") for content in contents)
            assert provenance["made by"] == "lota run" and provenance["steps"] == programs.STEPS
            assert all(content.pop("sha256") for content in contents) and contents[0] == contents[1]
        else:
            assert pair[0] == pair[1], file
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["mask", "ticket"]
    if name == "sft":  # its own save: without weights, which its DeepSpeed configuration does not gather
        assert (base / "out-training" / "NO_WEIGHTS_HERE.txt").exists()


@pytest.fixture(scope="module")
def mask(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from safetensors.torch import load_file

    path = tmp_path_factory.mktemp("mask") / "mask"
    shapes = {name: tensor.shape for name, tensor in load_file(base / "model.safetensors").items() if "mlp" in name}
    lota.Mask.from_dense({name: torch.rand(shape) < 0.1 for name, shape in shapes.items()}).save(path)
    return path


@pytest.mark.parametrize(
    ("name", "num_ranks", "deed", "status", "says"),
    [
        ("loop", 1, "only evaluates", 3, "no DeepSpeed engine that trains was built"),
        pytest.param(
            "loop", 1, "trains a second model", 1, "ValueError: a second trainable engine was built",
            marks=pytest.mark.slow,
        ),
        ("loop", 1, "exits at once", 1, "did not finish its block"),
        pytest.param(
            "loop", 1, "exits", 1, "the program ended after 1 steps, and --num_steps asks for 3",
            marks=pytest.mark.slow,
        ),
        pytest.param("loop", 1, "is killed", 137, "was ended by signal 9", marks=pytest.mark.slow),
        ("loop", 2, "rank 1 crashes", 1, "RuntimeError: the disk of rank 1 is gone"),
        pytest.param(
            "sft", 1, "exits", 1, "in the middle of its Trainer's train(), after 1 of 3 steps",
            marks=pytest.mark.slow,
        ),
        ("loop", 1, "crashes afterwards", 1, "is not taken for the ticket of a run that failed"),
    ],
)
def test_a_run_that_fails_gives_no_ticket(
    base: Path, mask: Path, tmp_path: Path, name: str, num_ranks: int, deed: str, status: int, says: str
) -> None:
    options: list[Any] = ["--mask", mask, "--ticket", "out/ticket"]
    options += ["--num_steps", programs.STEPS] if name == "loop" else []
    done = lota_run("train", *map(str, options), "--", *started(name, num_ranks, base, *deed.split()), cwd=tmp_path)
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-6000:]
    said = [line for line in done.stderr.splitlines() if line.startswith("[lota]")]
    assert says in "\n".join(said), done.stderr[-6000:]
    assert "No ticket was written" in said[0]
    assert not (tmp_path / "out" / "ticket").exists()
    kept = list((tmp_path / "out").iterdir())
    assert len(kept) == (deed == "crashes afterwards")
    if kept:
        assert lota.Ticket.load(kept[0] / "result").num_changed > 0
        shutil.rmtree(kept[0])
