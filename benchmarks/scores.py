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
import csv
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lota.data.dataset import read_jsonl
from lota.data.tokenizer import encode, load_tokenizer
from lota.evaluate.answer_loss import collate
from lota.retention import Importance
from lota.selection import select
from lota.study.analysis import points
from lota.study.frontier import Point, levels, rise_at
from lota.study.jobs import Job, work
from lota.study.methods import base_run
from lota.study.presets import PRESETS, Preset
from lota.study.questions import q2
from lota.study.rows import read
from lota.study.runs import Plan, Run

DENSITY = 0.1
SCORES = ("gradient", "interference", "low_fisher", "relative", "principal", "antiprincipal", "column")
NEAR_ZERO = 0.01  # of importances, whose mean is 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of `lota study cpu`")
    parser.add_argument("--scores", nargs="+", default=list(SCORES), choices=SCORES)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/scores.csv"))
    options = parser.parse_args()
    preset = PRESETS["cpu"]
    runs = {run.name: run for run in (base_run(preset), *q2(preset, []))}
    plan = Plan(options.study, runs)
    sweep = [run for run in runs.values() if run.facts.get("method") == "ticket 10%" and run.facts["seed"] == 0]
    sweep = [run for run in sweep if run.name.startswith("q2/" + preset.tasks.new)]
    folder = options.out.parent / "scores"
    _make_masks(plan.resolved(dict(sweep[0].options)), plan.resolved(vars(_measured(sweep[0]))), preset,
                [name for name in options.scores if not (folder / name / "mask").is_dir()], folder)  # fmt: skip
    rows = [row for name in options.scores for run in sweep for row in _rows(plan, run, name, folder, options.study)]
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    _show(rows, options.study, preset)
    print(f"written: {options.out}")


def _make_masks(
    options: dict[str, Any], measure: dict[str, Any], preset: Preset, scores: list[str], folder: Path
) -> None:
    if not scores:
        return
    model = AutoModelForCausalLM.from_pretrained(options["model_name_or_path"], dtype=torch.float32)
    importance = Importance.load(measure["importance"])
    parameters = {name: model.get_parameter(name) for name in importance.names}
    wanted = _mean_gradients(model, parameters, options, preset.calibration_steps)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    for score in scores:
        values = {name: _score(score, p.detach(), wanted[name], importance, name) for name, p in parameters.items()}
        pieces = [(name, 0, value.reshape(-1)) for name, value in values.items()]
        mask = select(partial(iter, pieces), shapes, density=DENSITY).mask
        mask.save(folder / score / "mask", {"score": score})


def _mean_gradients(model: Any, parameters: dict[str, Any], options: dict[str, Any], count: int) -> dict[str, Tensor]:
    """Mean |gradient| of the new task's batches, by name."""
    tokenizer, size = load_tokenizer(options["model_name_or_path"]), options["global_batch_size"]
    rows = [encode(tokenizer, row) for row in read_jsonl(Path(options["train_file"][0]))]
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for number in range(count):
        first = number * size % (len(rows) - size)
        ids, labels = collate(rows[first : first + size], tokenizer.pad_token_id)
        model.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        for name, parameter in parameters.items():
            total[name] += parameter.grad.abs() / count
    return total


def _score(score: str, weight: Tensor, gradient: Tensor, importance: Importance, name: str) -> Tensor:
    needed = importance.at(name, torch.arange(weight.numel())).view(weight.shape)
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


def _rows(plan: Plan, run: Run, score: str, folder: Path, study: Path) -> Iterator[dict[str, Any]]:
    """Train on the score's mask at the run's rate, unless that is done, and score the points between."""
    place = folder / score / f"{run.facts['rate']:g}"
    options = {key: value for key, value in plan.resolved(dict(run.options)).items() if key != "density"}
    options |= {"mask": str(folder / score / "mask")}
    if not (place / "result.json").is_file():
        measure = plan.resolved(vars(_measured(run)))
        starts = folder / "starts.json"
        work(Job(run.name, "train", options, measure, place, study / "data", starts, keeps=False))
    result = json.loads((place / "result.json").read_text(encoding="utf-8"))
    new, old = (Path(task).name for task in plan.resolved(vars(_measured(run)))["tasks"][:2])
    for point in result["points"]:
        yield {
            "score": score,
            "rate": run.facts["rate"],
            "alpha": point["alpha"],
            "new_dev": point[f"{new} dev"],
            "new_test": point[f"{new} test"],
            "old_dev_rise": point[f"{old} dev rise"],
            "old_test_rise": point[f"{old} test rise"],
            "general_rise": point["general test rise"],
            "kl": point["kl"],
        }


def _measured(run: Run) -> Any:
    assert run.measure is not None
    return run.measure


def _show(rows: list[dict[str, Any]], study: Path, preset: Preset) -> None:
    """What every score forgets at the study's levels, over what full fine-tuning forgets there."""
    known = read(study / "runs.csv")
    full = points(known, "q2", "full", preset.seeds[0], preset.tasks.new)
    wanted = levels(full[-1].new, full[:-1], preset.levels)
    print(f"forgetting over full fine-tuning's, at {', '.join(f'{level:.0%}' for level in preset.levels)} of its gain")
    for score in dict.fromkeys(row["score"] for row in rows):
        own = [
            Point(row["new_test"], row["old_test_rise"], row["new_dev"], row["old_dev_rise"])
            for row in rows
            if row["score"] == score
        ]
        cells = [(rise_at([*own, full[-1]], level), rise_at(full, level)) for level in wanted]
        print(f"  {score:<14}", *(f"{one / two:6.2f}" if one is not None and two else "     -" for one, two in cells))


if __name__ == "__main__":
    main()
