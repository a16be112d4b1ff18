"""Plans as people read them: sizes, a table side by side, and a few lines for the top of a run's log."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lota.plan.layout import RankLayout
from lota.plan.methods import MethodPlan

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def format_bytes(size: int) -> str:
    """Three digits and a binary unit: 13.7 GiB."""
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1000 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"


def parse_bytes(text: str) -> int:
    """`80GiB`, `80 GB`, `1.5TiB` or a plain number of bytes; ValueError otherwise."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    unit = match[2].lower() if match else ""
    if not match or (unit or "b") not in _UNITS:
        raise ValueError(f"expected a size like 80GiB, 80GB or a number of bytes, got {text!r}")
    return int(float(match[1]) * _UNITS[unit or "b"])


def table(plans: Sequence[MethodPlan], layout: RankLayout, memory: int | None = None) -> str:
    """All plans side by side: one column a plan, one row a kind of byte."""
    rows: list[tuple[str, list[str]]] = [("bytes per rank", [plan.name for plan in plans]), ("", [])]
    rows += _rows("on the device", [plan.device for plan in plans])
    rows.append(("  held between steps", [format_bytes(plan.held) for plan in plans]))
    rows += _rows("while a step runs, in addition", [plan.work for plan in plans])
    rows.append(("  the update's own", [_size(plan.step) for plan in plans]))
    rows.append(("  an uneven mask's fullest rank", [_size(plan.uneven) for plan in plans]))
    rows += _rows("at another moment instead", [_device_at(plan) for plan in plans])
    rows.append(("peak, without activations", [format_bytes(plan.peak) for plan in plans]))
    rows.append(("  reached in", [plan.peak_moment for plan in plans]))
    if memory is not None:
        rows.append((f"  fits {format_bytes(memory)}", ["yes" if plan.peak <= memory else "NO" for plan in plans]))
    rows += _rows("in host memory", [plan.host for plan in plans])
    rows.append(("  peak", [format_bytes(plan.host_peak) for plan in plans]))
    rows.append(("  reached in", [plan.host_peak_moment for plan in plans]))
    sent = [plan.sent(layout) for plan in plans]
    rows.append(("sent per step", []))
    for what in dict.fromkeys(t.what for plan in plans for t in plan.transfers):
        parts = [[t.sent(layout.ranks_per_node) for t in plan.transfers if t.what == what] for plan in plans]
        for place, where in enumerate(("inside the node", "across nodes")):
            if place == 0 or layout.num_nodes > 1:
                rows.append((f"  {what}, {where}", [_size(sum(pair[place] for pair in part)) for part in parts]))
    rows.append(("  all", [format_bytes(inside + across) for inside, across in sent]))
    rows.append(("on disk, all ranks together", []))
    rows.append(("  a checkpoint", [_size(plan.checkpoint) for plan in plans]))
    rows.append(("  the outcome (model, adapter, ticket)", [_size(plan.product) for plan in plans]))
    return _aligned(rows)


def short_lines(plans: Sequence[MethodPlan], layout: RankLayout) -> list[str]:
    """For a run's log: per plan what a rank holds, needs at most, and sends."""
    lines = []
    for plan in plans:
        inside, across = plan.sent(layout)
        network = f", {format_bytes(across)} of it over the network" if layout.num_nodes > 1 else ""
        sent = f", and sends up to {format_bytes(inside + across)} a step{network}" if layout.ranks > 1 else ""
        lines.append(
            f"plan, {plan.name}: a rank holds {format_bytes(plan.held)}, needs {format_bytes(plan.peak)} at most "
            f"besides activations (in the {plan.peak_moment}){sent}"
        )
    return lines


def _device_at(plan: MethodPlan) -> dict[str, int]:
    return {name: moment.device for name, moment in plan.moments.items() if moment.device}


def _rows(title: str, parts: Sequence[object]) -> list[tuple[str, list[str]]]:
    kinds = dict.fromkeys(kind for part in parts for kind in part)  # type: ignore[attr-defined]
    sizes = [(f"  {kind}", [_size(part.get(kind, 0)) for part in parts]) for kind in kinds]  # type: ignore[attr-defined]
    return [(title, []), *sizes] if sizes else []


def _size(size: int) -> str:
    return format_bytes(size) if size else "-"


def _aligned(rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    first = max(len(title) for title, _ in rows)
    count = max(len(cells) for _, cells in rows)
    widths = [max(len(cells[i]) for _, cells in rows if len(cells) > i) for i in range(count)]
    lines = []
    for title, cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[: len(cells)], strict=True)]
        lines.append("   ".join([title.ljust(first), *padded]).rstrip())
    return "\n".join(lines)
