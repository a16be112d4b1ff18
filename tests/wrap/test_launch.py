"""What `lota run` refuses before the command starts, and how it ends with commands that train nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lota.cli import main as cli

PYTHON = (sys.executable, "-c")


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that the commands of these tests write when they are started."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "started"


def _touch(path: Path) -> str:
    return f"open({str(path)!r}, 'a').write(__import__('os').environ['LOTA_PHASE'])"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "--mask", "no_mask", "--ticket", "t"), "no_mask"),
        (("calibrate", "--mask", "there"), "there exists already"),
        (("calibrate", "--mask", "m", "--score", "gradeint"), "Did you mean 'gradient'"),
        (("calibrate", "--mask", "m", "--density", "10"), "Did you mean 0.1"),
        (("calibrate", "--mask", "m", "--protect", "no_ticket"), "no_ticket"),
        (("both", "--out", "o", "--kernels", "cuda"), "kernels must be one of"),
        (("both", "--out", "o", "--num_steps", "0"), "num_steps must be at least 1"),
        (("both", "--out", "o", "--shard_group_size", "rack"), "shard_group_size must be a number of ranks"),
        (("both", "--out", "o", "--pull", "10"), "retain"),
    ],
)
def test_wrong_options_are_refused_before_the_command_starts(
    started: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    (started.parent / "there").mkdir()
    (started.parent / "there" / "file").touch()
    assert cli(["run", *words, "--", *PYTHON, _touch(started)]) == 2
    assert message in capsys.readouterr().err
    assert not started.exists()


@pytest.mark.parametrize("words", [("--output_dir", "out"), ("--output_dir=out",), ("output_dir=out",), ("a.yaml",)])
def test_both_phases_in_one_folder_are_refused(
    started: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    (started.parent / "a.yaml").write_text("stage: sft\noutput_dir: out  # of the model\n", encoding="utf-8")
    assert cli(["run", "both", "--out", "o", "--", *PYTHON, _touch(started), *words]) == 2
    assert "would both write to out" in capsys.readouterr().err
    assert not started.exists()


def test_a_command_that_cannot_be_started(started: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["run", "calibrate", "--mask", "m", "--", "no_such_program"]) == 2
    assert "no_such_program" in capsys.readouterr().err
    assert not (started.parent / "m").exists() and not list(started.parent.glob(".m*"))


@pytest.mark.parametrize(("code", "status"), [("", 3), ("import sys; sys.exit(7)", 7)])
def test_a_command_without_deepspeed_gives_nothing(
    started: Path, capsys: pytest.CaptureFixture[str], code: str, status: int
) -> None:
    words = ("run", "both", "--out", "o", "--", *PYTHON, f"{_touch(started)}\n{code}", "--output_dir", "out/{phase}")
    assert cli(list(words)) == status
    assert "No mask was written" in capsys.readouterr().err
    assert started.read_text(encoding="utf-8") == "calibration"  # and no second run
    assert not any((started.parent / "o").iterdir())


def test_a_signal_reaches_the_command(started: Path) -> None:
    handler = "import signal, sys, time\nsignal.signal(15, lambda *_: sys.exit(9))"
    code = f"{handler}\n{_touch(started)}\ntime.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-m", "lota", "run", "calibrate", "--mask", "m", "--", *PYTHON, code], env=os.environ
    )
    deadline = time.monotonic() + 60
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 9
    assert not list(started.parent.glob("m")) and not list(started.parent.glob(".m*"))
