"""Metrics of a written answer against its reference: exact match, number match, ROUGE; one value a row."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal

from lota.messages import did_you_mean

TEXT_METRICS = ("exact", "number", "rouge")
METRICS = ("loss", *TEXT_METRICS)

# A sign counts where no digit, letter or bracket stands before it, so that "5-3" holds 5 and 3. Commas group thousands.
_NUMBER = re.compile(r"(?:(?<![\w)\].])-)?(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|(?<!\d)\.\d+")
_MARK = "####"


def check_metrics(names: Sequence[str]) -> None:
    """ValueError for a name that is no metric, with the nearest that is, and for one given twice."""
    for name in names:
        if name not in METRICS:
            raise ValueError(f"metrics must be of {', '.join(METRICS)}, got {name!r}" + did_you_mean(name, METRICS))
    if len(set(names)) != len(names):
        raise ValueError(f"metrics: expected every name once, got {' '.join(names)}")


def check_references(metrics: Sequence[str], references: Sequence[str]) -> None:
    """ValueError for a reference that a metric can say nothing about."""
    if "number" in metrics:
        for row, reference in enumerate(references, start=1):
            if reference_number(reference) is None:
                raise ValueError(
                    f"metric number needs a number in every answer, row {row} has none: {reference[:80]!r}. "
                    "Leave number out of metrics"
                )


def scorer(metrics: Iterable[str]) -> Callable[[str, str], dict[str, float]]:
    """A function `(prediction, reference) -> values in [0, 1]` for the text metrics among `metrics`."""
    functions: list[Callable[[str, str], dict[str, float]]] = []
    if "exact" in metrics:
        functions.append(exact)
    if "number" in metrics:
        functions.append(number)
    if "rouge" in metrics:
        functions.append(_rouge())

    def score(prediction: str, reference: str) -> dict[str, float]:
        return {name: value for function in functions for name, value in function(prediction, reference).items()}

    return score


def exact(prediction: str, reference: str) -> dict[str, float]:
    """1 where the texts are equal but for white space at their ends."""
    return {"exact": float(prediction.strip() == reference.strip())}


def number(prediction: str, reference: str) -> dict[str, float]:
    """Whether the reference's number is the prediction's marked number, and whether it is its last number.

    Marked: the first number after the first `####`, where GSM8K's answers have it. Compared as decimals: 18 equals
    18.00, and 1,000 equals 1000.
    """
    wanted = reference_number(reference)
    return {
        "number_marked": float(wanted is not None and marked_number(prediction) == wanted),
        "number_last": float(wanted is not None and last_number(prediction) == wanted),
    }


def reference_number(reference: str) -> Decimal | None:
    """The marked number of a reference, or its last number where nothing is marked."""
    return marked_number(reference) if _MARK in reference else last_number(reference)


def marked_number(text: str) -> Decimal | None:
    """The first number after the first `####`; None where there is none."""
    _, mark, rest = text.partition(_MARK)
    found = _NUMBER.search(_plain(rest)) if mark else None
    return _decimal(found.group()) if found else None


def last_number(text: str) -> Decimal | None:
    """The last number of a text; None where there is none."""
    found = _NUMBER.findall(_plain(text))
    return _decimal(found[-1]) if found else None


def _plain(text: str) -> str:
    """Numbers as LaTeX and typographers write them in plain characters: 9{,}500, $5, and the minus sign."""
    return text.replace("$", "").replace("{,}", ",").replace("\N{MINUS SIGN}", "-")


def _decimal(text: str) -> Decimal:
    return Decimal(text.replace(",", ""))


def _rouge() -> Callable[[str, str], dict[str, float]]:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L (whole text, not by sentence), with Porter stemming."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError as error:
        raise ValueError(
            "metric rouge needs the package rouge-score: pip install 'lota[eval]', or rouge-score alone"
        ) from error
    names = ("rouge1", "rouge2", "rougeL")
    made = RougeScorer(names, use_stemmer=True)

    def rouge(prediction: str, reference: str) -> dict[str, float]:
        return {name: value.fmeasure for name, value in made.score(reference, prediction).items()}

    return rouge
