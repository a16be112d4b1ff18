"""A run's key is a digest of its content: options, data and the runs it needs, and not what it is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from lota.study.runs import Measure, Plan, Run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "data" / "task").mkdir(parents=True)
    (tmp_path / "data" / "task" / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return tmp_path


def runs(rate: float = 1e-3, names: tuple[str, str] = ("one", "two")) -> dict[str, Run]:
    first = Run(names[0], "train", {"train_file": ["data:task/train.jsonl"], "learning_rate": rate})
    options = {"model_name_or_path": f"run:{names[0]}//merged", "retain": [f"run:{names[0]}//ticket"]}
    second = Run(names[1], "train", options, Measure(f"run:{names[0]}//merged", ("data:task",)), {"seed": 1})
    return {first.name: first, second.name: second}


def test_the_same_content_has_the_same_key_under_another_name(out: Path) -> None:
    one, other = Plan(out, runs()), Plan(out, runs(names=("a/x", "b/y")))
    assert [one.key(name) for name in one.runs] == [other.key(name) for name in other.runs]


def test_a_change_of_what_a_run_needs_changes_its_key(out: Path) -> None:
    before, changed = Plan(out, runs()), Plan(out, runs(rate=2e-3))
    assert before.key("two") != changed.key("two")
    keys = [before.key(name) for name in ("one", "two")]
    (out / "data" / "task" / "train.jsonl").write_text('{"prompt": "a", "completion": "c"}\n')
    after = Plan(out, runs())
    assert all(after.key(name) != key for name, key in zip(("one", "two"), keys))


def test_names_become_paths_and_what_is_needed_is_known(out: Path) -> None:
    plan = Plan(out, runs())
    assert plan.runs["two"].needs() == {"one"}
    path = plan.resolved(dict(plan.runs["two"].options))["model_name_or_path"]
    assert path == str(out / "runs" / plan.key("one") / "run" / "merged")
    assert plan.keeps("one") and not plan.keeps("two")


def test_a_run_that_another_asks_for_is_done_only_where_it_was_kept(out: Path) -> None:
    plan = Plan(out, runs())
    for name in plan.runs:
        plan.folder(name).mkdir(parents=True)
        (plan.folder(name) / "result.json").write_text("{}")
    assert plan.is_done("two") and not plan.is_done("one")
    (plan.folder("one") / "kept").touch()
    assert plan.is_done("one")
