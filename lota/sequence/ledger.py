"""The ledger: which task owns how much of each tensor and layer, what is free, what tasks share. From tickets alone.

An entry belongs to the last task that has it in its mask: that task's value is what the model holds there. So for every
tensor owned entries of all tasks and free ones add up to the eligible ones, whether masks are disjoint or overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lota.messages import did_you_mean
from lota.progress import Say, silent, tracked
from lota.ticket import Mask, Ticket
from lota.ticket.density_grid import place


@dataclass(frozen=True)
class Share:
    """How some entries are divided up: those that may be active, those that belong to nobody, and the tasks' own."""

    eligible: int
    free: int
    owned: tuple[int, ...]


@dataclass(frozen=True)
class TaskRow:
    """One task: its active entries, those of them whose value is not the base's (None: not known), those that earlier
    tasks have, too, and those that no later task took over."""

    name: str
    num_active: int
    num_changed: int | None
    num_shared: int
    num_owned: int


@dataclass(frozen=True)
class Ledger:
    """tasks, in their order; tensors and layers by name: `whole` is all of them."""

    tasks: tuple[TaskRow, ...]
    tensors: dict[str, Share]

    @property
    def whole(self) -> Share:
        return _sum(list(self.tensors.values()), len(self.tasks))

    @property
    def layers(self) -> dict[str, Share]:
        """By layer of the model, in order; `outside` for tensors that are in none."""
        return self._grouped(lambda where: "outside" if where.layer is None else f"{where.stack}.{where.layer}")

    @property
    def kinds(self) -> dict[str, Share]:
        """By kind of tensor, over all layers."""
        return self._grouped(lambda where: where.kind)

    def _grouped(self, label: Any) -> dict[str, Share]:
        found: dict[str, list[Share]] = {}
        for name, share in self.tensors.items():
            found.setdefault(label(place(name)), []).append(share)
        return {name: _sum(shares, len(self.tasks)) for name, shares in found.items()}

    def content(self) -> dict[str, Any]:
        """As JSON has it."""
        names = [task.name for task in self.tasks]

        def told(share: Share) -> dict[str, Any]:
            return {"eligible": share.eligible, "free": share.free, "owned": dict(zip(names, share.owned))}

        whole = self.whole
        return {
            "eligible": whole.eligible,
            "free": whole.free,
            "tasks": [
                {**task.__dict__, "density": task.num_active / whole.eligible if whole.eligible else 0.0}
                for task in self.tasks
            ],
            "layers": {name: told(share) for name, share in self.layers.items()},
            "tensors": {name: told(share) for name, share in self.tensors.items()},
        }


def make_ledger(names: Sequence[str], tickets: Sequence[Ticket | Mask], say: Say = silent) -> Ledger:
    """The ledger of tasks in their order. Holds 2 bytes an entry of the largest tensor. ValueError where a tensor has
    different shapes in two of them."""
    masks = [ticket if isinstance(ticket, Mask) else ticket.mask for ticket in tickets]
    shared = [0] * len(masks)
    tensors: dict[str, Share] = {}
    for name in tracked(list(dict.fromkeys(name for mask in masks for name in mask.names)), "ledger", say):
        tensors[name], counts = _tensor(name, names, masks)
        shared = [total + count for total, count in zip(shared, counts)]
    owned = _sum(list(tensors.values()), len(masks)).owned
    rows = [
        TaskRow(name, mask.num_active, _num_changed(ticket), shared[number], owned[number])
        for number, (name, mask, ticket) in enumerate(zip(names, masks, tickets, strict=True))
    ]
    return Ledger(tuple(rows), tensors)


def _tensor(name: str, names: Sequence[str], masks: Sequence[Mask]) -> tuple[Share, list[int]]:
    """How a tensor is divided up, and how many entries each task shares with earlier ones."""
    having = [number for number, mask in enumerate(masks) if name in mask.names]
    first = masks[having[0]]
    owner = torch.zeros(first.numel(name), dtype=torch.int16)  # 0: nobody's; else the task's number, from 1
    owned, shared = [0] * (len(masks) + 1), [0] * len(masks)
    for number in having:
        mask = masks[number]
        if mask.shape(name) != first.shape(name):
            raise ValueError(
                f"{name} has shape {first.shape(name)} in {names[having[0]]} and {mask.shape(name)} in "
                f"{names[number]}: they are of different models"
            )
        for chunk in mask.chunks(name):
            before = torch.bincount(owner[chunk].long(), minlength=len(owned)).tolist()
            owned = [count - taken for count, taken in zip(owned, [0, *before[1:]])]
            shared[number] += sum(before[1:])
            owner[chunk] = number + 1
            owned[number + 1] += chunk.numel()
    eligible = _num_eligible(name, [masks[number] for number in having])
    return Share(eligible, eligible - sum(owned[1:]), tuple(owned[1:])), shared


def _num_eligible(name: str, masks: Sequence[Mask]) -> int:
    """Entries of a tensor that may be active in any of the masks: the union of their rows."""
    shape = masks[0].shape(name)
    per_row = masks[0].numel(name) // max(shape[0] if shape else 1, 1)
    num_rows, reached = 0, 0
    for start, stop in sorted(mask.rows(name) for mask in masks):
        num_rows += max(0, stop - max(start, reached))
        reached = max(reached, stop)
    return num_rows * per_row


def _sum(shares: Sequence[Share], num_tasks: int) -> Share:
    owned = tuple(sum(share.owned[number] for share in shares) for number in range(num_tasks))
    return Share(sum(share.eligible for share in shares), sum(share.free for share in shares), owned)


def _num_changed(ticket: Ticket | Mask) -> int | None:
    return ticket.num_changed if isinstance(ticket, Ticket) and ticket.has_base_values else None


def table(ledger: Ledger, kept: dict[str, dict[str, dict[str, float | None]]] | None = None) -> list[list[str]]:
    """Rows of text: a line a task, the free entries, all. kept: of every task what it scored, by metric and moment."""
    whole = ledger.whole

    def share(count: int) -> str:
        return f"{count:,} ({count / whole.eligible:.2%})" if whole.eligible else f"{count:,}"

    metrics = list(next(iter(kept.values()))) if kept else []
    rows = [
        ["task", "active", "changed", "shared with earlier", "owned", *(f"{name}: base, own, now" for name in metrics)]
    ]
    for task in ledger.tasks:
        changed = "-" if task.num_changed is None else f"{task.num_changed:,}"
        figures = [_moments((kept or {}).get(task.name, {}).get(metric, {})) for metric in metrics]
        rows.append(
            [task.name, share(task.num_active), changed, f"{task.num_shared:,}", share(task.num_owned), *figures]
        )
    rows.append(["free", "", "", "", share(whole.free), *([""] * len(metrics))])
    rows.append(["eligible", "", "", "", f"{whole.eligible:,}", *([""] * len(metrics))])
    return rows


def layer_table(ledger: Ledger, shares: dict[str, Share]) -> list[list[str]]:
    """Rows of text: per cent of the eligible entries, by task, of layers or tensors."""
    rows = [["", *(task.name for task in ledger.tasks), "free", "eligible"]]
    for name, share in shares.items():
        cells = [
            f"{100 * count / share.eligible:.1f}%" if share.eligible else "." for count in (*share.owned, share.free)
        ]
        rows.append([name, *cells, f"{share.eligible:,}"])
    return rows


def _moments(found: dict[str, float | None]) -> str:
    return ", ".join("-" if value is None else f"{value:.3f}" for value in found.values()) or "-"


def find_task(name: str, known: Sequence[str]) -> int:
    """The place of a task; ValueError with the nearest for a name that is none."""
    if name not in known:
        raise ValueError(
            f"no task {name!r} here: there are {', '.join(known) or 'none yet'}" + did_you_mean(name, known)
        )
    return list(known).index(name)
