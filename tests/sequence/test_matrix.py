"""The figures are those that the formulas give by hand; tables and pictures hold every cell; what is missing is named
so."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from lota.cli import main
from lota.sequence.matrix import Matrix, figure_lines, table, write_tables
from lota.sequence.state import Stage, State, TaskState, read_state

LOSSES = {  # stage -> task -> loss
    "base": {"a": 4.0, "b": 5.0, "c": 3.0},
    "a": {"a": 1.0, "b": 4.5, "c": 3.5},
    "b": {"a": 0.5, "b": 2.0, "c": 2.5},
    "c": {"a": 1.5, "b": 2.25, "c": 1.0},
}


def make_state(losses: dict[str, dict[str, float]]) -> State:
    state = State("lota", {"dtype": "float32"})
    on: tuple[str, ...] = ()
    for after, found in losses.items():
        trained = after if after in "abc" else ""
        if after.startswith("without "):
            on = tuple(name for name in on if name != after.removeprefix("without "))
        elif trained:
            on = (*on, after)
            state.tasks.append(TaskState(after, f"0{len(on)}-{after}", {}, True, True, is_complete=True))
        scores = {
            task: {
                "loss": loss,
                "exact_tokens": 1 - loss / 5,
                "exact_tokens_stderr": 0.1,
                "num_rows": 7.0,
                "num_answer_tokens": 21.0,
            }
            for task, loss in found.items()
        }
        state.stages.append(Stage(after, trained, on, scores))
    return state


def test_the_formulas_by_hand() -> None:
    matrix = Matrix.of(make_state(LOSSES))
    figures = matrix.figures("loss")
    assert figures == {
        "average": pytest.approx((1.5 + 2.25 + 1.0) / 3),
        "forgetting": pytest.approx(((1.5 - 0.5) + (2.25 - 2.0)) / 2),
        "backward_transfer": pytest.approx(-((1.5 - 1.0) + (2.25 - 2.0)) / 2),
        "forward_transfer": pytest.approx(((5.0 - 4.5) + (3.0 - 2.5)) / 2),
    }
    exact = matrix.figures("exact_tokens")  # the same scores, turned and divided by 5
    for name in ("forgetting", "backward_transfer", "forward_transfer"):
        assert exact[name] == pytest.approx(figures[name] / 5), name  # type: ignore[operator]
    assert exact["average"] == pytest.approx(1 - figures["average"] / 5)  # type: ignore[operator]
    after_b = matrix.figures("loss", 2)
    assert after_b["forgetting"] == pytest.approx(0.5 - 1.0)  # it became better
    assert after_b["backward_transfer"] == pytest.approx(0.5) and after_b["average"] == pytest.approx(1.25)
    assert matrix.figures("loss", 1) == {
        "average": 1.0, "forgetting": None, "backward_transfer": None, "forward_transfer": None
    }  # fmt: skip
    assert set(matrix.figures("loss", 0).values()) == {None}


def test_after_a_removal_the_others_count() -> None:
    losses = LOSSES | {"without b": {"a": 0.75, "c": 1.25}}
    figures = Matrix.of(make_state(losses)).figures("loss")
    assert figures["average"] == pytest.approx(1.0)
    assert figures["forgetting"] == pytest.approx(((0.75 - 0.5) + (1.25 - 1.0)) / 2)
    assert figures["backward_transfer"] == pytest.approx(-((0.75 - 1.0) + (1.25 - 1.0)) / 2)
    assert figures["forward_transfer"] == pytest.approx(3.0 - 2.5)


def test_a_figure_that_lacks_a_score_is_none() -> None:
    losses = {after: dict(found) for after, found in LOSSES.items()}
    del losses["c"]["a"]
    figures = Matrix.of(make_state(losses)).figures("loss")
    assert figures["average"] is None and figures["backward_transfer"] is None
    assert figures["forward_transfer"] == pytest.approx(0.5)


def test_tables_hold_every_cell(tmp_path: Path) -> None:
    state = make_state(LOSSES | {"without b": {"a": 0.75, "c": 1.25}})
    matrix = Matrix.of(state)
    write_tables(matrix, tmp_path)
    rows = list(csv.DictReader((tmp_path / "matrix.csv").open(encoding="utf-8")))
    assert len(rows) == 4 * 3 + 2
    for row in rows:
        stage = state.stages[int(row["stage"])]
        scores = stage.scores[row["task"]]
        assert row["after"] == stage.after and row["is_trained"] == str(int(row["task"] in stage.tasks))
        assert {name: float(row[name]) for name in scores} == scores and row["num_rows"] == "7"
    lines = list(csv.DictReader((tmp_path / "summary.csv").open(encoding="utf-8")))
    assert [line["after"] for line in lines] == ["base", "a", "b", "c", "without b"]
    assert float(lines[3]["loss_forgetting"]) == matrix.figures("loss", 3)["forgetting"]
    assert lines[0]["loss_average"] == "" and lines[-1]["num_tasks"] == "2"
    text = table(matrix, "loss")
    assert text[0] == "loss" and text[2].split() == ["base", "(4.000)", "(5.000)", "(3.000)"]
    assert text[-1].split() == ["without", "b", "0.750", "(-)", "1.250"]
    assert figure_lines([("x", matrix)], "loss")[1].split() == ["x", "1.000", "+0.250", "+0.000", "+0.500"]


def test_the_command_prints_and_draws_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = []
    for name, losses in (("one", LOSSES), ("two", {"base": {"a": 4.0}, "a": {"a": 1.0}})):
        (tmp_path / name).mkdir()
        state = make_state(losses)
        state.write(tmp_path / name)
        assert read_state(tmp_path / name) == state
        folders.append(str(tmp_path / name))
    assert main(["matrix", *folders, "--plot", str(tmp_path / "both.png")]) == 0
    out = capsys.readouterr().out
    assert f"{folders[0]}: loss" in out and f"{folders[1]}: exact_tokens" in out and "backward transfer" in out
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert main(["matrix", folders[0], "--json"]) == 0
    told = json.loads(capsys.readouterr().out)[folders[0]]
    assert told["figures"]["loss"]["forgetting"] == 0.625 and told["stages"][1]["scores"]["a"]["loss"] == 1.0
    assert main(["matrix", str(tmp_path)]) == 2
    assert "is no folder of a sequence: it has no sequence.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content | {"format_version": 9}, "expected format version 1, got 9"),
        (lambda content: content | {"stages": {"a": 1}}, "not as it is written"),
        (lambda content: content | {"more": 1}, "not as it is written"),
        (
            lambda content: content | {"tasks": [{**content["tasks"][0], "folder": "../../etc"}]},
            "is no folder of a task",
        ),
        (lambda content: [content], "expected a JSON object"),
    ],
)
def test_a_damaged_state_is_refused(tmp_path: Path, damage, message: str) -> None:
    make_state(LOSSES).write(tmp_path)
    path = tmp_path / "sequence.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_state(tmp_path)
