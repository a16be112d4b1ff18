"""A run in one picture: losses, learning rate, gradient norm, and where in the model the trained entries lie.

    python lota/run/report.py runs/gsm8k            draws runs/gsm8k/report.png

Reads metrics.jsonl, summary.json and ticket/ (or mask/) of a run's folder and nothing else, so that it can be drawn
again, anywhere; what is not there is left out. train_lota.py draws it at the end.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # recipes run from the checkout, under any launcher

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from lota.ticket import read_manifest
from lota.ticket.density_grid import DensityGrid, density_grid

REPORT_NAME = "report.png"
COLORS = {"calibrate": "tab:orange", "train": "tab:blue"}
LABELS = {"calibrate": "calibration", "train": "training"}
_MAX_LAYERS = 100  # columns of the heat map; neighbouring layers share one beyond
_MAX_ANNOTATED = 16  # columns that leave room for a figure in every cell


def draw_report(folder: Path, summary: Mapping[str, Any]) -> Path:
    """Draw `folder`/report.png, by one rename. ValueError where the folder holds nothing to draw."""
    series = read_series(folder)
    grid = read_grid(folder)
    if not series and grid is None:
        raise ValueError(f"{folder} holds neither metrics.jsonl nor a ticket: there is nothing to draw")
    dial = (summary.get("training", {}).get("dial") or {}).get("points", [])
    figure = picture(series, grid, headline(summary), dial)
    temporary = folder / f".{REPORT_NAME}.partial"
    FigureCanvasAgg(figure).print_png(str(temporary))
    os.replace(temporary, folder / REPORT_NAME)
    return folder / REPORT_NAME


Series = dict[str, dict[str, list[tuple[int, float]]]]
"""Phase -> what was logged -> (step, value), in the order of the steps."""


def read_series(folder: Path) -> Series:
    """The curves of metrics.jsonl. Of a step that was logged twice (a resumed run's), the later line counts."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return {}
    points: dict[str, dict[str, dict[int, float]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["phase"] == "importance":
            continue  # a few dozen micro-batches of a model that does not change
        phase = points.setdefault(row["phase"], {})
        for name in ("loss", "eval_loss", "reward", "eval_reward", "learning_rate", "grad_norm"):
            value = row.get(name)
            if isinstance(value, (int, float)) and math.isfinite(value):
                phase.setdefault(name, {})[row["step"]] = float(value)
    return {phase: {name: sorted(found.items()) for name, found in names.items()} for phase, names in points.items()}


def read_grid(folder: Path) -> DensityGrid | None:
    """Density per layer and kind of the run's ticket or mask, None where it has none."""
    for name in ("ticket", "mask"):
        if (folder / name).is_dir():
            manifest = read_manifest(folder / name)
            return density_grid({r.name: (r.num_active, r.numel) for r in manifest.tensors}, _MAX_LAYERS)
    return None


def headline(summary: Mapping[str, Any]) -> str:
    """What was run, and what came out, in one or two lines."""
    model = Path(str(summary.get("model", "a run"))).name
    lines = [f"{summary.get('method', 'calibration' if 'calibration' in summary else 'lota')} on {model}"]
    mask, training = summary.get("mask"), summary.get("training", {})
    if mask:
        lines[0] += f", density {mask['density']:.4g} ({mask['num_active']:,} of {mask['eligible']:,} eligible weights)"
    facts = []
    if "steps" in training:
        facts.append(f"{training['steps']:,} steps")
    if "eval_loss" in training and "eval_loss_before" in training and "eval_reward" not in training:
        facts.append(f"eval loss {training['eval_loss_before']:.4g} before, {training['eval_loss']:.4g} after")
    for after, before in (("eval_reward", "eval_reward_before"), ("reward_at_end", "reward_at_start")):
        if training.get(after) is not None and training.get(before) is not None:
            facts.append(f"{after.replace('_', ' ')} {training[after]:.4g}, {training[before]:.4g} before")
            break
    if facts:
        lines.append(", ".join(facts))
    return "\n".join(lines)


def picture(
    series: Series, grid: DensityGrid | None, title: str, dial: Sequence[Mapping[str, Any]] = ()
) -> Figure:
    """Curves above, heat map below. dial: points between old and new values, for a frontier beside the curves."""
    curves_inches = 3.6 if series else 0
    map_inches = 0 if grid is None else 1.6 + 0.3 * len(grid.columns)
    figure = Figure(figsize=(13, 0.6 + curves_inches + map_inches), dpi=110)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)
    figure.suptitle(title, fontsize=12)
    heights = [inches for inches in (curves_inches, map_inches) if inches]
    parts = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).flat)
    if series:
        has_reward = any("reward" in curves for curves in series.values())
        widths = [2, *([1] * (2 + has_reward + bool(dial)))]
        first, *more, rate, norm = parts[0].subplots(1, len(widths), width_ratios=widths)
        _draw_values(first, series, "reward" if has_reward else "loss")
        if has_reward:
            _draw_curve(more[0], series, "loss", "loss")
        if dial:
            _draw_dial(more[-1], dial)
        _draw_curve(rate, series, "learning_rate", "learning rate", is_schedule=True)
        _draw_curve(norm, series, "grad_norm", "gradient norm")
    if grid is not None:
        _draw_density(parts[-1].subplots(), grid)
    return figure


def _draw_values(axes: Axes, series: Series, name: str) -> None:
    """Losses or rewards, in training and on the evaluation rows."""
    every = []
    for phase, curves in series.items():
        color, label = COLORS.get(phase, "tab:green"), LABELS.get(phase, phase)
        _draw_line(axes, curves.get(name, []), color, label)
        steps, values = _columns(curves.get(f"eval_{name}", []))
        line = "--" if len(values) > 2 else "none"  # between before and after nothing is known
        if values:
            axes.plot(
                *(steps, values), color=color, label=f"{label}, evaluation", linestyle=line, linewidth=1.2,
                marker="o", markersize=6, markerfacecolor="white",
            )  # fmt: skip
        every += values + _columns(curves.get(name, []))[1]
    _finish(axes, name, every, may_be_log=name == "loss")
    if every:
        axes.legend(frameon=False, fontsize=9)


def _draw_dial(axes: Axes, points: Sequence[Mapping[str, Any]]) -> None:
    """What is kept against what is learnt: every kept loss's rise over the new task's loss, a dot for each alpha."""
    has_loss = all("eval_loss" in point for point in points)
    across = [point["eval_loss"] if has_loss else point["alpha"] for point in points]
    for name, start in points[0]["kept"].items():
        axes.plot(across, [point["kept"][name] - start for point in points], marker=".", linewidth=1.2, label=name)
    for x, point in zip(across, points):
        if has_loss:
            highest = max(loss - points[0]["kept"][name] for name, loss in point["kept"].items())
            axes.text(x, highest, f" {point['alpha']:g}", fontsize=7, va="bottom")
    axes.set_title("rise of kept losses", fontsize=11)
    axes.set_xlabel("new task's evaluation loss" if has_loss else "alpha", fontsize=9)
    axes.tick_params(labelsize=9)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_curve(axes: Axes, series: Series, name: str, title: str, is_schedule: bool = False) -> None:
    """is_schedule: drawn as it is, neither averaged nor on a logarithmic axis."""
    every = []
    for phase, curves in series.items():
        _draw_line(axes, curves.get(name, []), COLORS.get(phase, "tab:green"), None, may_average=not is_schedule)
        every += _columns(curves.get(name, []))[1]
    _finish(axes, title, every, may_be_log=not is_schedule)


def _draw_line(
    axes: Axes, points: list[tuple[int, float]], color: str, label: str | None, may_average: bool = True
) -> None:
    """A curve; a long one pale, with its average over it; a dot where it is no curve yet."""
    if not points:
        return
    steps, values = _columns(points)
    if may_average and len(values) > 60:
        axes.plot(steps, values, color=color, linewidth=1, alpha=0.25)
        values = smoothed(values)
    axes.plot(steps, values, color=color, linewidth=1.6, label=label, marker="." if len(values) == 1 else None)


def _finish(axes: Axes, title: str, values: list[float], may_be_log: bool = True) -> None:
    """Title, grid, whole steps, and a logarithmic axis where the values ask for one."""
    if not values:
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color="0.5")
        axes.set(xticks=[], yticks=[])
    if may_be_log and values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 2000 * min(values) else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=9)
    if values:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_density(axes: Axes, grid: DensityGrid) -> None:
    """Kinds down, layers across; the figure behind a kind is its density over all layers."""
    values = np.array(grid.cells, dtype=float).T  # None becomes NaN
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    axes.set_facecolor("0.92")  # where there is no such tensor
    kinds = [f"{kind}  {density:.2%}" for kind, density in zip(grid.columns, grid.column_density)]
    axes.set_yticks(range(len(kinds)), kinds, fontsize=9)
    axes.set_xticks(*_layer_ticks(grid.rows), fontsize=9)
    axes.set_xlabel("layer", fontsize=9)
    axes.set_title("density per layer and kind of tensor", fontsize=11)
    if "outside" in grid.rows:
        axes.axvline(len(grid.rows) - 1.5, color="white", linewidth=3)
    if len(grid.rows) <= _MAX_ANNOTATED:
        for (kind, layer), value in np.ndenumerate(values):
            if not math.isnan(value):
                color = "black" if value > 0.6 * np.nanmax(values) else "white"
                axes.text(layer, kind, f"{100 * value:.3g}", ha="center", va="center", color=color, fontsize=8)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01, aspect=12)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1))
    bar.ax.tick_params(labelsize=9)


def _layer_ticks(rows: tuple[str, ...]) -> tuple[list[int], list[str]]:
    """Positions and labels of the layers, thinned until they can be read; `outside` always."""
    layers = [number for number, row in enumerate(rows) if row != "outside"]
    longest = max((len(row) for row in rows), default=1)
    positions = layers[:: max(1, math.ceil(len(rows) * (longest + 2) / 130))]
    if len(layers) < len(rows):
        if positions and len(rows) - 1 - positions[-1] < len(rows) / 20:
            positions.pop()
        positions.append(len(rows) - 1)
    return positions, [rows[number] for number in positions]


def smoothed(values: list[float]) -> list[float]:
    """An exponential average over about a fortieth of the curve, without the bias of its start."""
    keep, total, weight, out = 1 - 1 / max(4.0, len(values) / 40), 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(total / weight)
    return out


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]
