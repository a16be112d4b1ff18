"""Long work says how far it is; short work says nothing; --quiet leaves errors alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from lota import progress
from lota.cli import main as cli
from lota.cli.parsers import say


def test_lines_come_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    lines: list[str] = []
    names = [f"t{number}" for number in range(100)]
    for number, name in enumerate(progress.tracked(names, "compared", lines.append)):
        assert name == names[number]
        clock[0] += 2.0
    assert len(lines) == 33, "a line in six seconds, and none when all is done"
    assert lines[0] == "compared: 3% of 100 tensors, 3 min left"
    assert lines[-1] == "compared: 99% of 100 tensors, 2 s left"
    assert list(progress.tracked([], "compared", lines.append)) == []


def test_a_second_of_work_says_nothing() -> None:
    lines: list[str] = []
    list(progress.tracked(["a", "b"], "compared", lines.append))
    assert lines == []


def test_quiet_prints_errors_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.algebra.test_algebra import save_base, tune

    base, tuned = tmp_path / "base", tmp_path / "tuned"
    save_base(base)
    tune(base, tuned, share=0.1, rate=0.05)
    for words, status in (
        (["extract", "--base", str(base), "--tuned", str(tuned), "--out", str(tmp_path / "ticket")], 0),
        (["apply", str(tmp_path / "ticket"), "--base", str(base), "--out", str(tmp_path / "again")], 0),
        (["diff", str(base), str(tuned)], 1),
        (["verify", str(tmp_path / "ticket"), "--base", str(base), "--tuned", str(tmp_path / "again")], 0),
    ):
        capsys.readouterr()
        assert cli([*words, "--quiet"]) == status
        out, err = capsys.readouterr()
        assert out == "" and "lota" not in err and str(tmp_path) not in err, (words, out, err)
    assert cli(["apply", str(tmp_path / "none"), "--base", str(base), "--out", str(tmp_path / "x"), "--quiet"]) == 2
    assert "none" in capsys.readouterr().err
    say("and afterwards it is as before")
    assert "as before" in capsys.readouterr().err
