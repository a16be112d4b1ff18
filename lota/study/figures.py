"""The figures of a study: frontiers, and what forgetting goes with, as PNG."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lota.study.analysis import matrix, methods_of, repeated
from lota.study.frontier import front
from lota.study.presets import Preset
from lota.study.rows import Rows

_COLORS = ("black", "tab:gray", "tab:blue", "tab:cyan", "tab:olive", "tab:green", "tab:red", "tab:orange", "tab:purple")
_PREDICTORS = {"kl": "KL to the old model", "fd2": "sum f d²", "moved_share": "norm of the move"}


def draw(preset: Preset, rows: Rows, folder: Path) -> list[Path]:
    """All figures that the rows are there for; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {
        "frontier.png": _frontier(preset, rows),
        "predictors.png": _predictors(rows),
        "sequence.png": _matrices(rows),
    }
    paths = []
    for name, figure in made.items():
        if figure is not None:
            FigureCanvasAgg(figure).print_png(str(folder / name))
            paths.append(folder / name)
    return paths


def _frontier(preset: Preset, rows: Rows) -> Figure | None:
    """Rise of the old task's loss over the new task's loss, at the first seed; without and with old rows."""
    methods = methods_of(rows, "q2")
    if not methods:
        return None
    figure = Figure(figsize=(13, 5), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    with_rows = [method for method in methods if "replay" in method]
    _curves(left, rows, [method for method in methods if method not in with_rows], "no row of the old task")
    _curves(right, rows, ["full", *with_rows], "a tenth of the rows are the old task's")
    for axes in (left, right):
        axes.set_xlabel(f"loss of the new task ({preset.tasks.new}), nats a token")
    left.set_ylabel(f"rise of the old task's loss ({preset.tasks.old}), nats a token")
    return figure


def _curves(axes: Axes, rows: Rows, methods: list[str], title: str) -> None:
    lowest: list[float] = []
    for number, method in enumerate(methods):
        for seed, own in list(repeated(rows, "q2", method).items())[:1]:
            curve = sorted(front(own), key=lambda p: p.new)
            lowest.append(curve[0].new)
            style = "--" if "pull" in method else "-"
            color = _COLORS[number % len(_COLORS)]
            label = f"{method} (seed {seed})" if number == 0 else method
            axes.plot(
                [p.new for p in curve], [p.rise for p in curve], style, color=color, label=label, marker=".", lw=1.3
            )
    if lowest:
        axes.set_xlim(min(lowest) - 0.02, min(lowest) + 6 * (sorted(lowest)[len(lowest) // 2] - min(lowest) + 0.05))
    axes.set_title(title, fontsize=11)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _predictors(rows: Rows) -> Figure | None:
    """What the old task lost, over what was known without its rows, for every run of question 2 that saw none."""
    some = [row for row in rows if row["question"] == "q2" and row["alpha"] == 1 and not row["replay"]]
    some = [row for row in some if row.get("fd2") not in (None, "")]
    if len(some) < 4:
        return None
    figure = Figure(figsize=(13, 4), dpi=110, layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, 3), _PREDICTORS.items()):
        for is_pulled, color in ((False, "tab:gray"), (True, "tab:red")):
            own = [row for row in some if bool(row["pull"]) == is_pulled]
            label = "with the pull" if is_pulled else "without"
            axes.plot([r[name] for r in own], [r["old_test_rise"] for r in own], ".", color=color, label=label)
        correlation = spearman([row[name] for row in some], [row["old_test_rise"] for row in some])
        axes.set(
            xscale="log",
            xlabel=title,
            ylabel="rise of the old task's loss",
            title=f"rank correlation {correlation:.2f}",
        )
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.25)
    return figure


def spearman(one: list[float], other: list[float]) -> float:
    """Rank correlation; ties by their order."""
    count = len(one)
    ranks = [dict(zip(sorted(range(count), key=values.__getitem__), range(count))) for values in (one, other)]
    squares = sum((ranks[0][number] - ranks[1][number]) ** 2 for number in range(count))
    return 1 - 6 * squares / (count * (count**2 - 1)) if count > 1 else float("nan")


def _matrices(rows: Rows) -> Figure | None:
    """Rise of every task's loss since its own stage."""
    methods = [method for method in methods_of(rows, "q3") if len(matrix(rows, method, _seed(rows))) > 1]
    if not methods:
        return None
    figure = Figure(figsize=(4 * len(methods), 4), dpi=110, layout="constrained")
    for axes, method in zip(figure.subplots(1, len(methods), squeeze=False)[0], methods):
        base, *stages = matrix(rows, method, _seed(rows))
        order = list(base)
        cells = [[stage[task] - base[task] for task in order] for stage in stages]
        image = axes.imshow(cells, cmap="RdBu_r", vmin=-2, vmax=2)
        axes.set_xticks(range(len(order)), order, rotation=45, fontsize=8)
        axes.set_yticks(range(len(stages)), [f"after {task}" for task in order[: len(stages)]], fontsize=8)
        for line, values in enumerate(cells):
            for column, value in enumerate(values):
                axes.text(column, line, f"{value:.2f}", ha="center", va="center", fontsize=7)
        axes.set_title(method, fontsize=10)
    figure.colorbar(image, ax=figure.axes, shrink=0.6, label="loss against the base, nats")
    return figure


def _seed(rows: Rows) -> int:
    return min(int(row["seed"]) for row in rows if row["question"] == "q3")
