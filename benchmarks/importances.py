"""The factored importance (two vectors a matrix) beside the exact one at a mask's entries: how alike, and what of it.

    lota study cpu --questions q2 --out runs/study-cpu
    python -m benchmarks.importances runs/study-cpu --out runs/bench/importances.csv

Both are collected from 64 micro-batches of the first task at the entries of the second one's 30% mask. Correlations are
of all these entries; the exact importance of 64 others is the ceiling. Then the study's runs of `ticket 30%, pull` are
made again with the exact importance in place of the factored one.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.study_runs import Study, print_levels, print_ratios
from benchmarks.timing import write_csv
from lota.data.dataset import read_jsonl
from lota.data.tokenizer import encode, load_tokenizer
from lota.evaluate.answer_loss import collate
from lota.retention import Importance
from lota.ticket import Mask

METHOD = "ticket 30%, pull"
BATCHES, ROWS = 64, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of `lota study cpu --questions q2`")
    parser.add_argument("--pull", type=float, default=10.0, help="K of the runs that are made again (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/importances.csv"))
    options = parser.parse_args()
    study, folder = Study(options.study), options.out.parent / "importances"
    sweep = [run for run in study.sweep(METHOD) if run.facts["pull"] == options.pull]
    found = _collect(study.options(sweep[0]), Path(study.measure(sweep[0])["tasks"][1]), folder)
    for name, value in _correlations(*found).items():
        print(f"{name}: {value:.3f}")
    rows: list[dict[str, Any]] = []
    for kind in ("factored", "exact"):
        for run in sweep:
            place = folder / kind / str(run.facts["setting"]).replace(" ", "-")
            rows += [{"kind": kind, **row} for row in study.rows(run, place, {"retain": [str(folder / f"{kind}.st")]})]
    write_csv(options.out, rows)
    print_levels()
    for kind in ("factored", "exact"):
        print_ratios(kind, study.ratios(row for row in rows if row["kind"] == kind))
    print(f"written: {options.out}")


def _collect(options: dict[str, Any], old: Path, folder: Path) -> tuple[Mask, Importance, Importance, Importance]:
    """The mask; factored and exact of the same rows, exact of others."""
    folder.mkdir(parents=True, exist_ok=True)
    mask = Mask.load(options["mask"])
    model = AutoModelForCausalLM.from_pretrained(options["model_name_or_path"], dtype=torch.float32)
    tokenizer = load_tokenizer(options["model_name_or_path"])
    rows = [encode(tokenizer, row) for row in read_jsonl(old / "train.jsonl")[: 2 * BATCHES * ROWS]]

    def batches(first: int) -> Any:
        for start in range(first, first + BATCHES * ROWS, ROWS):
            ids, labels = collate(rows[start : start + ROWS], tokenizer.pad_token_id)
            yield {"input_ids": ids, "labels": labels}

    factored = Importance.collect(model, batches(0))
    exact = Importance.collect(model, batches(0), mask=mask)
    factored.save(folder / "factored.st")
    exact.save(folder / "exact.st")
    return mask, factored, exact, Importance.collect(model, batches(BATCHES * ROWS), mask=mask)


def _correlations(mask: Mask, factored: Importance, exact: Importance, others: Importance) -> dict[str, float]:
    def values(importance: Importance) -> Tensor:
        return torch.cat([importance.at_active(mask, name) for name in mask.names]).double()

    one, two, three = map(values, (factored, exact, others))

    def both(a: Tensor, b: Tensor) -> tuple[float, float]:
        logs = [(x + 1e-4).log() for x in (a, b)]  # of values whose mean is 1
        return tuple(float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in ((a, b), logs))  # type: ignore[return-value]

    pairs = {"factored and exact": (one, two), "factored and exact of other rows": (one, three)}
    pairs["exact and exact of other rows"] = (two, three)
    found = {}
    for name, (a, b) in pairs.items():
        found[f"correlation, {name}"], found[f"correlation of logarithms, {name}"] = both(a, b)
    return found


if __name__ == "__main__":
    main()
