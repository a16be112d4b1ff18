"""Scores that ask what an earlier task needs, or what a matrix is made of, beside the gradient: which entries to train.

    lota study cpu --questions q2 --out runs/study-cpu    # the base, the first task, what full fine-tuning forgets
    python -m benchmarks.scores runs/study-cpu --out runs/bench/scores.csv

A second task is trained on 10% of the weights after a first one, without a pull, at the three learning rates of the
study and by its own runs and measures; only the mask differs. With g the mean |gradient| of the new task's batches, f
the old task's importance (factored, mean 1) and w the weights, entries are ranked by

    gradient        g
    interference    g / (f + 0.01): wanted by the new task over needed by the old one
    low_fisher      1 / f: what the old task needs least, whatever the new one wants
    relative        g / |w|
    principal       |W_r|, W_r the best approximation of the matrix of rank r, an eighth of its full one (LIFT, arXiv
                    2506.00772); antiprincipal: its smallest entries
    column          g, as means of whole columns

Every run is kept: the same command resumes.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.study_runs import PRESET, Study, print_levels, print_ratios
from benchmarks.timing import write_csv
from lota.data.dataset import read_jsonl
from lota.data.tokenizer import encode, load_tokenizer
from lota.evaluate.answer_loss import collate
from lota.retention import Importance
from lota.selection import select
from lota.study.runs import Run

DENSITY = 0.1
SCORES = ("gradient", "interference", "low_fisher", "relative", "principal", "antiprincipal", "column")
NEAR_ZERO = 0.01  # of importances, whose mean is 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of `lota study cpu --questions q2`")
    parser.add_argument("--scores", nargs="+", default=list(SCORES), choices=SCORES)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/scores.csv"))
    options = parser.parse_args()
    study, folder = Study(options.study), options.out.parent / "scores"
    sweep = study.sweep("ticket 10%")
    _make_masks(study, sweep[0], [name for name in options.scores if not (folder / name / "mask").is_dir()], folder)
    rows: list[dict[str, Any]] = []
    for score in options.scores:
        changes = {"mask": str(folder / score / "mask"), "density": None}
        for run in sweep:
            place = folder / score / f"{run.facts['rate']:g}"
            rows += [{"score": score, **row} for row in study.rows(run, place, changes)]
            print(f"{score} at {run.facts['rate']:g}: {rows[-len(PRESET.alphas)]}", flush=True)
    write_csv(options.out, rows)
    print_levels()
    for score in options.scores:
        print_ratios(score, study.ratios(row for row in rows if row["score"] == score))
    print(f"written: {options.out}")


def _make_masks(study: Study, run: Run, scores: list[str], folder: Path) -> None:
    if not scores:
        return
    options = study.options(run)
    model = AutoModelForCausalLM.from_pretrained(options["model_name_or_path"], dtype=torch.float32)
    importance = Importance.load(study.measure(run)["importance"])
    parameters = {name: model.get_parameter(name) for name in importance.names}
    wanted = _mean_gradients(model, parameters, options)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    for score in scores:
        pieces = []
        for name, parameter in parameters.items():
            needed = importance.at(name, torch.arange(parameter.numel())).view(parameter.shape)
            pieces.append((name, 0, _score(score, parameter.detach(), wanted[name], needed).reshape(-1)))
        mask = select(partial(iter, pieces), shapes, density=DENSITY).mask
        mask.save(folder / score / "mask", {"score": score})


def _mean_gradients(model: Any, parameters: dict[str, Any], options: dict[str, Any]) -> dict[str, Tensor]:
    """Mean |gradient| of the new task's batches, by name."""
    tokenizer, size = load_tokenizer(options["model_name_or_path"]), options["global_batch_size"]
    rows = [encode(tokenizer, row) for row in read_jsonl(Path(options["train_file"][0]))]
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for number in range(PRESET.calibration_steps):
        first = number * size % (len(rows) - size)
        ids, labels = collate(rows[first : first + size], tokenizer.pad_token_id)
        model.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        for name, parameter in parameters.items():
            total[name] += parameter.grad.abs() / PRESET.calibration_steps
    return total


def _score(score: str, weight: Tensor, gradient: Tensor, needed: Tensor) -> Tensor:
    """Of one matrix `[rows, columns]`; needed: the old task's importance."""
    if score == "gradient":
        return gradient
    if score == "interference":
        return gradient / (needed + NEAR_ZERO)
    if score == "low_fisher":
        return 1 / (needed + 1e-6)
    if score == "relative":
        return gradient / (weight.abs() + 1e-6)
    if score == "column":
        return gradient.mean(0, keepdim=True).expand_as(gradient)
    rank = max(1, min(weight.shape) // 8)
    left, middle, right = torch.linalg.svd(weight, full_matrices=False)
    near = ((left[:, :rank] * middle[:rank]) @ right[:rank]).abs()
    return near if score == "principal" else 1 / (near + 1e-12)


if __name__ == "__main__":
    main()
