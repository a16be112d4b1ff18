"""A claim is held or failed where its whole interval lies on one side of the bound; the page has them once."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from lota.study.claims import Claim
from lota.study.frontier import Interval

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("mean", "half", "verdict"),
    [(0.4, 0.05, "held"), (0.6, 0.05, "failed"), (0.48, 0.05, "open"), (0.1, None, "open")],
)
def test_the_verdict_of_an_upper_bound(mean: float, half: float | None, verdict: str) -> None:
    assert Claim("forgets at most half", 0.5, True, Interval(mean, half, 3)).verdict == verdict


def test_the_verdict_of_a_lower_bound() -> None:
    assert Claim("reaches", 0.98, False, Interval(1.0, 0.01, 3)).verdict == "held"
    assert Claim("reaches", 0.98, False, Interval(0.9, 0.01, 3)).verdict == "failed"
    assert Claim("reaches", 0.98, False, None).verdict == "open"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_claims", ROOT / "docs" / "make_claims.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_part_once_whatever_it_had_before(maker: ModuleType) -> None:
    page = "# Results\n\nText.\n\n## Selection\n\nMore.\n"
    once = maker.page(page, "## Claims\n\none\n")
    assert once.count("## Claims") == 1 and once.endswith("## Selection\n\nMore.\n")
    assert maker.page(once, "## Claims\n\ntwo\n") == once.replace("one", "two")
    assert maker.page(once, "") == page


def test_the_page_says_what_the_tables_beside_it_say(maker: ModuleType) -> None:
    text = maker.PAGE.read_text(encoding="utf-8")
    assert maker.page(text, maker.part(maker.PAGE.parent)) == text, "run docs/make_claims.py"
