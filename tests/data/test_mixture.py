"""Shares of a mixture are exact and the same for every run of a seed; rows set aside are trained by nobody."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from lota.data.dataset import load
from lota.data.mixture import apportion, choose, epoch_counts, set_aside, shuffled
from lota.data.options import plan_data
from lota.run.options import LotaArguments


@pytest.mark.parametrize(
    ("sizes", "weights", "total", "counts"),
    [
        ([100, 100], [1, 1], None, [100, 100]),
        ([100, 10], [0.9, 0.1], None, [90, 10]),  # the small set decides, no row twice
        ([1000, 30], [3, 1], None, [90, 30]),
        ([7, 7, 7], [1, 1, 1], 10, [4, 3, 3]),
        ([5], [0.3], 12, [12]),
        ([10, 10], [0.1, 0.2], None, [5, 10]),  # 0.1 + 0.2 is exactly 0.3
    ],
)
def test_counts(sizes: list[int], weights: list[float], total: int | None, counts: list[int]) -> None:
    assert epoch_counts(sizes, weights, total) == counts


def test_a_set_without_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"entry 2 would get none of 5 rows at a weight of 0.01 of 1.01"):
        epoch_counts([5, 5], [1, 0.01])


def test_apportion_gives_all_away() -> None:
    for total in range(20):
        shares = [Fraction(1, 7), Fraction(2, 7), Fraction(4, 7)]
        counts = apportion(total, shares)
        assert sum(counts) == total and all(abs(c - total * s) < 1 for c, s in zip(counts, shares, strict=True))


def test_choosing_takes_every_row_equally_often() -> None:
    assert set(Counter(choose(7, 24, "s")).values()) == {3, 4}
    assert choose(7, 7, "s") == [*range(7)] and len(set(choose(7, 5, "s"))) == 5
    assert choose(50, 20, "s") == choose(50, 20, "s") != choose(50, 20, "t")
    stay, drawn = set_aside(10, 3, "s")
    assert sorted([*stay, *drawn]) == [*range(10)] and len(drawn) == 3
    assert sorted(shuffled(9, "s")) == [*range(9)]


def write(path: Path, name: str, count: int) -> str:
    rows = "".join(f'{{"prompt": "{name}{k}", "completion": "c"}}\n' for k in range(count))
    path.write_text(rows, encoding="utf-8")
    return str(path)


def test_a_mixture_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixture = [
        {"train_file": write(tmp_path / "a.jsonl", "a", 40), "weight": 0.75},
        {"train_file": write(tmp_path / "b.jsonl", "b", 5), "weight": 0.25},
    ]
    args = LotaArguments(mixture=mixture)
    prompts = list(load(plan_data(args), seed=3).train["prompt"])
    assert Counter(prompt[0] for prompt in prompts) == {"a": 15, "b": 5} and len(set(prompts)) == 20
    assert prompts != sorted(prompts) and prompts == list(load(plan_data(args), seed=3).train["prompt"])
    assert prompts != list(load(plan_data(args), seed=4).train["prompt"])
    assert "a.jsonl: 15 of its 40 rows in an epoch (75.00%)" in capsys.readouterr().out

    repeated = load(plan_data(LotaArguments(mixture=mixture, mixture_rows=60)), seed=3).train["prompt"]
    assert set(Counter(prompt for prompt in repeated if prompt[0] == "b").values()) == {3}
    assert "b.jsonl: 15 rows, of 5 repeated" in capsys.readouterr().out

    everything = [{key: value for key, value in entry.items() if key != "weight"} for entry in mixture]
    assert len(load(plan_data(LotaArguments(mixture=everything))).train) == 45


@pytest.mark.parametrize("options", [{"eval_rows": 9}, {"eval_fraction": 0.2}])
def test_evaluation_rows_are_trained_by_nobody(tmp_path: Path, options: dict[str, float]) -> None:
    mixture = [
        {"train_file": write(tmp_path / "a.jsonl", "a", 40), "weight": 1},
        {"train_file": write(tmp_path / "b.jsonl", "b", 5), "weight": 1},
    ]
    args = LotaArguments(mixture=mixture, mixture_rows=90, **options)  # type: ignore[arg-type]
    train, evaluation = load(plan_data(args), seed=1)
    assert evaluation is not None and len(train) == 90
    assert Counter(prompt[0] for prompt in evaluation["prompt"]) == {"a": 8, "b": 1}
    assert not set(train["prompt"]) & set(evaluation["prompt"])
    assert set(train["prompt"]) | set(evaluation["prompt"]) == {f"a{k}" for k in range(40)} | {
        f"b{k}" for k in range(5)
    }


def test_a_single_set_keeps_the_order_of_its_file(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", "a", 10)
    train, evaluation = load(plan_data(LotaArguments(train_file=file, eval_rows=2)), seed=1)
    assert evaluation is not None and len(evaluation) == 2
    assert [*train["prompt"]] == [p for p in (f"a{k}" for k in range(10)) if p not in set(evaluation["prompt"])]
