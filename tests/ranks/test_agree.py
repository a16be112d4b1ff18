"""What one rank sees and another does not is refused on every rank, naming the rank, before anything is loaded."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lota.ranks import agree
from tests.data import tiny
from tests.rank_pool import RankPool
from tests.train.jobs import forget

ROWS = [{"prompt": f"{a} {b} ", "completion": f"{b} {a}"} for a in "abcd" for b in "efgh"]


def write(path: Path, rows: list[dict[str, str]] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def options(tmp_path: Path) -> dict[str, str]:
    """A run that works, on this machine, where every rank gets the same."""
    return {
        "model_name_or_path": str(tiny.save(tmp_path / "base")),
        "train_file": str(write(tmp_path / "train.jsonl")),
        "output_dir": str(tmp_path / "run"),
        "max_steps": "1",
        "calibration_steps": "1",
        "bf16": "false",
    }


def run_as_if_apart(name: str, of_rank: list[dict[str, str]]) -> None:
    """A recipe on this rank with options of its own, as a path means another thing on another host."""
    import importlib
    import sys

    agree.PATIENCE_SECONDS = 0.5
    argv = [word for key, value in of_rank[dist.get_rank()].items() for word in (f"--{key}", value)]
    before, sys.argv = sys.argv, [name, *argv]
    try:
        importlib.import_module(f"recipes.{name}").main()
    finally:
        sys.argv = before
        forget()


def refusal(ranks: Callable[[int], RankPool], name: str, of_rank: list[dict[str, str]]) -> str:
    """What the recipe says, which must be a ValueError, and the same, on every rank."""
    outcomes = ranks(len(of_rank)).outcomes(run_as_if_apart, name, of_rank)
    assert {outcome.error_type for outcome in outcomes} == {"ValueError"}, outcomes
    said = [re.split(r"\nValueError: ", outcome.error)[-1].strip() for outcome in outcomes]
    said = [text.replace(one["output_dir"], of_rank[0]["output_dir"]) for text, one in zip(said, of_rank)]
    assert len(set(said)) == 1, said
    return said[0]


MISSING = {
    "train_file": "no such file: /nowhere",
    "eval_file": "no such file: /nowhere",
    "model_name_or_path": "/nowhere",
    "mask": "/nowhere",
    "protect": "/nowhere",
    "config": "no such file: /nowhere",
    "deepspeed": "/nowhere",
    "chat_template_path": "/nowhere",
}


@pytest.mark.parametrize("option", MISSING)
@pytest.mark.parametrize("blind", [0, 1])
def test_a_path_that_one_rank_does_not_find(
    ranks: Callable[[int], RankPool], options: dict[str, str], tmp_path: Path, option: str, blind: int
) -> None:
    there = {"eval_file": options["train_file"], "config": str(tmp_path / "some.yaml"), "deepspeed": ""}
    (tmp_path / "some.yaml").write_text("logging_steps: 1")
    if option == "mask":
        del options["calibration_steps"]
    of_rank = [dict(options), dict(options)]
    if option in there:
        of_rank[1 - blind][option] = there[option]
    of_rank[blind][option] = "/nowhere.jinja" if option == "chat_template_path" else "/nowhere"
    message = refusal(ranks, "train_lota", [{k: v for k, v in one.items() if v} for one in of_rank])
    assert re.match(rf"rank {blind} \(\S+\) of 2 ranks: ", message), message
    assert MISSING[option] in message and message.endswith("Every host needs the same files under the same paths")
    assert not list((tmp_path / "run").glob("*"))


def test_a_path_that_no_rank_finds_is_said_as_ever(ranks: Callable[[int], RankPool], options: dict[str, str]) -> None:
    options["train_file"] = "/nowhere.jsonl"
    assert refusal(ranks, "calibrate_mask", [options, options]) == "no such file: /nowhere.jsonl"


@pytest.mark.parametrize("change", ["fewer", "other"])
def test_rows_that_differ(
    ranks: Callable[[int], RankPool], options: dict[str, str], tmp_path: Path, change: str
) -> None:
    rows = ROWS[:-1] if change == "fewer" else [*ROWS[:-1], {"prompt": "n", "completion": "n"}]
    other = options | {"train_file": str(write(tmp_path / "other" / "train.jsonl", rows))}
    message = refusal(ranks, "train_lota", [options, other])
    assert re.match(rf"rows differ between ranks: 16 training rows \(\w+\) on rank 0 \(\S+\), {len(rows)} ", message)


@pytest.mark.parametrize("name", ["train_lota", "calibrate_mask"])
def test_an_output_dir_that_is_not_shared(
    ranks: Callable[[int], RankPool], options: dict[str, str], tmp_path: Path, name: str
) -> None:
    other = options | {"output_dir": str(tmp_path / "elsewhere")}
    message = refusal(ranks, name, [options, other])
    assert re.search(r"is not one folder for all ranks: rank 1 \(\S+\) of 2 ranks saw nothing of what rank 0", message)
    assert message.endswith("on a file system that all hosts share")
    assert not list((tmp_path / "run").iterdir()) and not (tmp_path / "elsewhere").exists()


def test_an_output_dir_that_cannot_be_made(ranks: Callable[[int], RankPool], options: dict[str, str]) -> None:
    options["output_dir"] = os.path.join(options["train_file"], "run")
    assert "cannot be written to" in refusal(ranks, "train_lota", [options, options])


def decide() -> tuple[Any, str]:
    """from_rank_0, where ranks see different things, and where rank 0 fails."""
    chosen = agree.from_rank_0(lambda: f"checkpoint-{dist.get_rank()}")

    def look() -> None:
        if dist.get_rank() == 0:
            raise OSError("no disk")

    try:
        agree.from_rank_0(look)
    except (OSError, ValueError) as error:
        return chosen, str(error)
    return chosen, ""


def test_rank_0_decides(ranks: Callable[[int], RankPool]) -> None:
    assert ranks(2).run(decide) == [("checkpoint-0", "no disk")] * 2
