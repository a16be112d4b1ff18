"""A disk that fills up ends every rank with an error that names what did not fit; the checkpoint before is as it was,
and the run resumes from it when there is room."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lota.files import naming_disk_full, write_text
from lota.run.checkpoints import newest
from tests.train.faults import Job, start
from tests.train.test_end_to_end import succeed, world

__all__ = ["world"]  # a fixture of this module, too

OPTIONS = (
    *("--max_steps", "12", "--calibration_steps", "4", "--score", "gradient", "--save_strategy", "steps"),
    *("--save_steps", "4", "--logging_steps", "1", "--merged", "false"),
)
GO_ON = ("--resume_from_checkpoint", "true")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small file system can be mounted by root only, and not in every container")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=False)


def fill(disk: Path, leave: int) -> Path:
    """Take all room but `leave` bytes."""
    filler = disk / "filler"
    found = os.statvfs(disk)
    filler.write_bytes(bytes(max(found.f_bavail * found.f_bsize - leave, 0)))
    return filler


def fill_when(job: Job, appears: Path, disk: Path, leave: int) -> Path:
    deadline = time.monotonic() + 300
    while not appears.exists():
        assert not job.is_over() and time.monotonic() < deadline, job.text()[-4000:]
        time.sleep(0.002)
    return fill(disk, leave)


def check_ended_by(job: Job, what: str) -> None:
    job.wait(120)
    assert job.processes[0].returncode != 0
    lines = [line for line in job.text().splitlines() if "[lota] rank" in line]
    assert len(lines) == 1, job.text()[-4000:]
    assert "No space left on device" in lines[0] and "MiB are free" in lines[0] and what in lines[0]
    assert "--resume_from_checkpoint true" in lines[0] and "Traceback" not in job.text()


@pytest.mark.slow
def test_a_disk_that_fills_up(world: Path, small_disk: Path, tmp_path: Path) -> None:
    straight, run = tmp_path / "straight", small_disk / "run"
    succeed("train_lota.py", world, straight, *OPTIONS)

    job = start("deepspeed", world, run, *OPTIONS, log=tmp_path / "mask.log")
    filler = fill_when(job, run / "examples.txt", small_disk, 4096)
    check_ended_by(job, "/run/")
    assert not (run / "mask").exists() and not (run / "ticket").exists()
    filler.unlink()

    job = start("deepspeed", world, run, *OPTIONS, *GO_ON, log=tmp_path / "checkpoint.log")
    filler = fill_when(job, run / "checkpoint-4", small_disk, 64 << 10)
    check_ended_by(job, "checkpoint-8")
    before = {path: path.read_bytes() for path in (run / "checkpoint-4").rglob("*") if path.is_file()}
    assert newest(run) == run / "checkpoint-4" and not (run / "checkpoint-8").exists()
    filler.unlink()

    job = start("nobody", world, run, *OPTIONS, *GO_ON, log=tmp_path / "ticket.log")
    filler = fill_when(job, run / "checkpoint-12", small_disk, 16 << 10)
    check_ended_by(job, "ticket")
    assert not list(run.glob("*ticket*")) and newest(run) == run / "checkpoint-12"
    assert before == {path: path.read_bytes() for path in before}
    filler.unlink()

    (run / ".checkpoint-6.partial").mkdir()  # of a run with other save_steps
    done = succeed("train_lota.py", world, run, *OPTIONS, *GO_ON)
    assert done["training"]["resumed_from_step"] == 12
    for name in ("ticket/ticket.safetensors", "ticket/ticket.json", "mask/ticket.safetensors"):
        assert (run / name).read_bytes() == (straight / name).read_bytes(), name
    assert not list(run.glob(".*"))


def test_the_error_names_the_file(small_disk: Path) -> None:
    kept = small_disk / "kept.json"
    write_text(kept, "old")
    fill(small_disk, 4096)
    with pytest.raises(OSError, match=r"No space left on device, 0.0 MiB are free: make room.*kept.json"):
        write_text(kept, "new" * 10000)
    assert kept.read_text(encoding="utf-8") == "old"
    import torch

    with pytest.raises(OSError, match=r"No space left on device.*state.pt"), naming_disk_full(small_disk / "state.pt"):
        torch.save(torch.zeros(100_000), small_disk / "state.pt")
