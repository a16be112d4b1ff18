"""Pictures of sequences: the ledger as bars, and the matrices of one or several sequences as heat maps with numbers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from lota.sequence.ledger import Ledger, Share
from lota.sequence.matrix import METRICS, Matrix
from lota.sequence.state import Stage

_FREE = "0.9"
_MAX_BARS = 120
TITLES = {"loss": "answer loss, nats a token", "exact_tokens": "exact match"}


def draw_ledger(ledger: Ledger, path: Path) -> None:
    """Of all layers and kinds of tensors, which part each task owns and which is free, by one rename."""
    groups = {"layer": ledger.layers, "kind of tensor": ledger.kinds}
    groups = {title: dict(list(shares.items())[:_MAX_BARS]) for title, shares in groups.items()}
    longest = max(len(shares) for shares in groups.values())
    figure = Figure(figsize=(13, 1.8 + 0.28 * (longest + 1)), dpi=110)
    figure.set_layout_engine("constrained")
    whole = ledger.whole
    free = whole.free / whole.eligible if whole.eligible else 0.0
    figure.suptitle(f"{whole.eligible:,} eligible weights, {free:.2%} of them free", fontsize=12)
    for axes, (title, shares) in zip(figure.subplots(1, 2), groups.items()):
        _draw_shares(axes, {"all": whole, **shares}, [task.name for task in ledger.tasks])
        axes.set_title(f"by {title}", fontsize=11)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=8, frameon=False, fontsize=9)
    _save(figure, path)


def _draw_shares(axes: Axes, shares: dict[str, Share], tasks: Sequence[str]) -> None:
    parts = np.array([[*share.owned, share.free] for share in shares.values()], dtype=float)
    parts /= np.maximum(np.array([[share.eligible] for share in shares.values()], dtype=float), 1)
    left = np.zeros(len(shares))
    colors = [*(colormaps["tab20"](number % 20) for number in range(len(tasks))), _FREE]
    for column, (label, color) in enumerate(zip([*tasks, "free"], colors)):
        axes.barh(range(len(shares)), parts[:, column], left=left, color=color, label=label, height=0.8)
        left += parts[:, column]
    axes.set_yticks(range(len(shares)), list(shares), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def draw_matrices(matrices: Sequence[tuple[str, Matrix]], path: Path) -> None:
    """A line a sequence, a heat map a metric, of one scale over all sequences; a frame where a stage trained the task,
    pale numbers where the task is not in the model. By one rename."""
    rows = max(len(matrix.stages) for _, matrix in matrices)
    columns = max(len(matrix.tasks) for _, matrix in matrices)
    size = (max(7.0, 2 * (1.6 + 0.85 * columns)), len(matrices) * (1.2 + 0.42 * rows))
    figure = Figure(figsize=size, dpi=110)
    figure.set_layout_engine("constrained")
    grid = figure.subplots(len(matrices), len(METRICS), squeeze=False)
    for column, metric in enumerate(METRICS):
        values = [_values(matrix, metric) for _, matrix in matrices]
        known = np.concatenate([each[~np.isnan(each)] for each in values])
        low, high = (0.0, 1.0) if metric == "exact_tokens" else (known.min(), known.max()) if known.size else (0, 1)
        for line, (title, matrix) in enumerate(matrices):
            axes = grid[line][column]
            color_map = "viridis" if METRICS[metric] > 0 else "viridis_r"
            image = axes.imshow(values[line], cmap=color_map, vmin=low, vmax=high, aspect="auto")
            _write_numbers(axes, image, matrix, metric, values[line])
            axes.set_title(f"{title}: {TITLES[metric]}" if title else TITLES[metric], fontsize=10)
    _save(figure, path)


def _values(matrix: Matrix, metric: str) -> Any:
    cells = [[matrix.value(stage, task, metric) for task in matrix.tasks] for stage in range(len(matrix.stages))]
    return np.array(cells, dtype=float).reshape(len(matrix.stages), len(matrix.tasks))


def _write_numbers(axes: Axes, image: Any, matrix: Matrix, metric: str, values: Any) -> None:
    axes.set_facecolor(_FREE)
    axes.set_xticks(range(len(matrix.tasks)), matrix.tasks, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(matrix.stages)), [_label(stage) for stage in matrix.stages], fontsize=8)
    for (stage, task), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        red, green, blue, _ = image.cmap(image.norm(value))
        is_light = 0.3 * red + 0.59 * green + 0.11 * blue > 0.5
        is_on = matrix.tasks[task] in matrix.stages[stage].tasks
        text = f"{value:.3g}" if metric == "loss" else f"{100 * value:.1f}%"
        axes.text(
            *(task, stage, text), ha="center", va="center", fontsize=8, color="black" if is_light else "white",
            alpha=1.0 if is_on else 0.55,
        )  # fmt: skip
        if matrix.own(matrix.tasks[task]) == stage:
            axes.add_patch(Rectangle((task - 0.5, stage - 0.5), 1, 1, fill=False, edgecolor="crimson", linewidth=1.6))


def _label(stage: Stage) -> str:
    return f"after {stage.after}" if stage.trained else stage.after


def _save(figure: Figure, path: Path) -> None:
    """In the format of the name's ending."""
    temporary = path.with_name(f".{path.name}.partial{path.suffix}")
    FigureCanvasAgg(figure)
    figure.savefig(temporary)
    os.replace(temporary, path)
