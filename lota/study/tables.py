"""The tables of a study, in Markdown, made from its rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lota.study.analysis import Compared, gains, matrix, methods_of, sequence, survival
from lota.study.frontier import Interval, interval
from lota.study.presets import Preset
from lota.study.rows import Rows


def page(preset: Preset, rows: Rows) -> str:
    """All tables that the rows are there for."""
    parts = [f"# The study `{preset.name}`", _about(preset)]
    parts += [two_tasks(preset, rows), one_task(preset, rows), in_sequence(preset, rows), merging(rows), safety(rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def two_tasks(preset: Preset, rows: Rows) -> str:
    """Question 2: forgetting at matched quality, and what else is seen there."""
    shares = preset.levels
    compared = Compared(rows, "q2", shares)
    if not compared.levels:
        return ""
    head = ["method", *(f"{share:.0%}" for share in shares), "nats", "KL", "general text", "sum f d²", "moved", "seeds"]
    lines = []
    for method in compared.methods:
        relative = [compared.relative(method, share) for share in shares]
        beside = [
            compared.whole(method, preset.main_level, name)
            for name in (None, "kl", "general_rise", "fd2", "moved_share")
        ]
        seeds = max((found.count for found in relative if found), default=0)
        lines.append([method, *map(_cell, relative), *(_short(found) for found in beside), str(seeds)])
    text = (
        f"Rise of the old task's loss ({preset.tasks.old}) where the new one ({preset.tasks.new}) has reached a share "
        f"of what full fine-tuning gains, relative to full fine-tuning: mean and 95% interval over seeds. From `nats` "
        f"on: the rise itself and what else is seen at {preset.main_level:.0%}."
    )
    return "\n\n".join(["## Two tasks in sequence", text, _table(head, lines)])


def one_task(preset: Preset, rows: Rows) -> str:
    """Question 1: gains, and what general text loses at matched quality."""
    tasks = list(dict.fromkeys(str(row["new_task"]) for row in rows if row["question"] == "q1"))
    if not tasks:
        return ""
    share = preset.main_level
    compared = {task: Compared(rows, "q1", preset.levels, task) for task in tasks}
    head = ["method", *(f"gain on {task}" for task in tasks), f"general text at {share:.0%}", "KL", "moved"]
    lines = []
    for method in methods_of(rows, "q1"):
        gained = [gains(rows, method, task) if method in compared[task].methods else None for task in tasks]
        main = compared[tasks[0]]
        relative = main.relative(method, share)
        beside = [main.whole(method, share, name) for name in ("kl", "moved_share")]
        lines.append([method, *map(_cell, gained), _cell(relative), *map(_short, beside)])
    text = (
        "What each method takes off the test loss, relative to full fine-tuning, each at its best rate by dev rows; "
        f"rise of general text's loss where {share:.0%} of full's gain on {tasks[0]} is reached, relative to full."
    )
    return "\n\n".join(["## One task", text, _table(head, lines)])


def in_sequence(preset: Preset, rows: Rows) -> str:
    """Question 3: the matrices, and their two summaries."""
    parts = []
    summary = []
    for method in methods_of(rows, "q3"):
        seeds = sorted({int(row["seed"]) for row in rows if row["question"] == "q3" and row["method"] == method})
        found = [sequence(rows, method, seed) for seed in seeds]
        summary.append([method, *(_cell(interval([made[name] for made in found])) for name in ("gain", "forgetting"))])
        stages = matrix(rows, method, seeds[0])
        order = list(stages[0])
        lines = [[name, *(f"{stage[task]:.3f}" for task in order)] for name, stage in zip(["base", *order], stages)]
        parts.append(f"{method}, test losses after each stage:\n\n" + _table(["after", *order], lines))
    if not parts:
        return ""
    text = "Gain at the end against the base, and rise since a task's own stage, means over tasks in nats."
    return "\n\n".join(["## Five tasks in sequence", text, _table(["method", "gain", "forgetting"], summary), *parts])


def merging(rows: Rows) -> str:
    """Question 4."""
    lines = []
    for name in methods_of(rows, "q4"):
        method, how = name.rsplit(", ", 1)
        found = survival(rows, method, how)
        if found is not None:
            each = ", ".join(f"{task} {share:.2f}" for task, share in found["of"].items())
            lines.append([method, how, f"{found['mean']:.2f}", f"{found['least']:.2f}", each, f"{found['scale']:g}"])
    if not lines:
        return ""
    text = "The share of each task's gain, trained alone, that the merged model has; the scale is chosen on dev rows."
    return "\n\n".join(["## Merging", text, _table(["method", "merge", "mean", "least", "each", "scale"], lines)])


def safety(rows: Rows) -> str:
    """Question 5: what is written to harmful requests."""
    some = [row for row in rows if row["question"] in ("policy", "q5") and row["alpha"] == 1]
    if not some:
        return ""
    lines = []
    keys = dict.fromkeys((str(row["question"]), str(row["new_task"]), str(row["method"])) for row in some)
    for question, task, method in keys:
        own = [r for r in some if (r["question"], r["new_task"], r["method"]) == (question, task, method)]
        figures = [interval([float(row[name]) for row in own]) for name in ("refused_refused", "refused_answered")]
        loss = interval([float(row["new_test"]) for row in own])
        name = "after the policy" if question == "policy" else f"then {task}"
        lines.append([name, method, *map(_cell, figures), _cell(loss)])
    text = "Harmful requests that are refused and that are answered with steps, by two judges of what is written."
    return "\n\n".join(["## Safety", text, _table(["", "method", "refused", "answered", "loss of the tuning"], lines)])


def _about(preset: Preset) -> str:
    return (
        f"A base of {preset.base.num_parameters / 1e6:.1f}M weights, pretrained for {preset.base.steps} steps; "
        f"{preset.steps} steps of {preset.batch_rows} rows a task; calibration of {preset.calibration_steps} steps."
    )


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    made = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in made)


def _cell(found: Interval | None) -> str:
    return "-" if found is None else str(found)


def _short(found: Interval | None) -> str:
    return "-" if found is None else f"{found.mean:.3g}"
