"""What is written after the reader has gone ends a process, except after the signal that asks it to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lota.ranks import output
from lota.ranks.stop import listening

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
from pathlib import Path
from tqdm import tqdm
from lota.ranks.output import outlive_readers
print("begun", flush=True)
sys.stdin.read()  # until the reader has gone
if len(sys.argv) > 2:
    outlive_readers()
print("line", flush=True)
print("line", file=sys.stderr, flush=True)
for _ in tqdm(range(3)):
    pass
Path(sys.argv[1]).touch()
"""


@pytest.mark.parametrize("is_asked", [False, True])
def test_output_that_nobody_reads(tmp_path: Path, is_asked: bool) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "saved"), *(["asked"] if is_asked else [])],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    while (line := process.stdout.readline()) != "begun\n":
        assert line, process.stderr.read()
    process.stdout.close()
    process.stderr.close()
    process.stdin.close()
    assert (process.wait(60) == 0) == is_asked == (tmp_path / "saved").exists()


def test_a_signal_to_stop_is_what_changes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    before = sys.stdout
    with listening():
        assert sys.stdout is before
        os.kill(os.getpid(), signal.SIGTERM)
        assert isinstance(sys.stdout, output._Outliving) and isinstance(sys.stderr, output._Outliving)
