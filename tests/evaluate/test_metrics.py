"""Metrics equal values counted by hand, on the cases where careless ones go wrong."""

from __future__ import annotations

from decimal import Decimal

import pytest

from lota.evaluate.metrics import check_metrics, check_references, exact, last_number, marked_number, number, scorer


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("it costs $1,234.50.", "1234.50"),
        ("10-2=8", "8"),
        ("5-3", "3"),  # a minus between numbers is no sign
        ("x = -3", "-3"),
        ("(2)-4", "4"),
        ("1,2,3", "3"),  # a list, not 123
        ("12,345,678", "12345678"),
        ("about .5 of them", "0.5"),
        ("18.", "18"),
        ("3/4", "4"),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text: str, last: str | None) -> None:
    assert last_number(text) == (None if last is None else Decimal(last))


def test_marked_number_is_the_first_after_the_first_mark() -> None:
    assert marked_number("1 + 2\n#### 3\n\nQuestion: 4\n#### 5") == 3
    assert marked_number("####$1,000") == 1000
    assert marked_number("so 7") is None and marked_number("#### none") is None


def test_number_match() -> None:
    answer = "4 + 14 = <<4+14=18>>18\n#### 18"
    assert number("thus #### 18.00", answer) == {"number_marked": 1.0, "number_last": 1.0}
    assert number("it is 18", answer) == {"number_marked": 0.0, "number_last": 1.0}
    assert number("#### 18\nQuestion: what about 5?", answer) == {"number_marked": 1.0, "number_last": 0.0}
    assert number("#### 180", answer) == {"number_marked": 0.0, "number_last": 0.0}
    assert number("none at all", answer) == {"number_marked": 0.0, "number_last": 0.0}
    assert number("12 apples", "He has 12 apples")["number_last"] == 1.0  # an answer without a mark


def test_exact_match_forgives_only_white_space_at_the_ends() -> None:
    assert exact(" SELECT a\n", "SELECT a") == {"exact": 1.0}
    assert exact("SELECT  a", "SELECT a") == {"exact": 0.0} == exact("select a", "SELECT a")


def test_rouge_by_hand() -> None:
    score = scorer(["rouge"])("the cat sat on a mat", "the cat was on the mat")
    # Shared words: the, cat, on, mat = 4 of 6 and 6. Shared pairs: "the cat" = 1 of 5 and 5. Longest common
    # subsequence: the cat on mat = 4.
    assert score == pytest.approx({"rouge1": 4 / 6, "rouge2": 1 / 5, "rougeL": 4 / 6})
    # Two words against four: precision 1, recall 1/2. Stemming makes "cats" and "cat" one word.
    assert scorer(["rouge"])("two cats", "two cat sat down")["rouge1"] == pytest.approx(2 / 3)
    assert scorer(["rouge"])("", "word") == {"rouge1": 0, "rouge2": 0, "rougeL": 0}


def test_only_what_was_asked_for() -> None:
    assert scorer(["loss"])("a", "a") == {}
    assert scorer(["exact", "number"])("1", "1") == {"exact": 1.0, "number_marked": 0.0, "number_last": 1.0}


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"loss, exact, number, rouge, got 'rogue'\. Did you mean 'rouge'\?"):
        check_metrics(["loss", "rogue"])
    with pytest.raises(ValueError, match="every name once"):
        check_metrics(["loss", "loss"])
    with pytest.raises(ValueError, match="number needs a number in every answer, row 2 has none: 'no'"):
        check_references(["number"], ["#### 1", "no"])
    check_references(["loss", "rouge"], ["no"])
