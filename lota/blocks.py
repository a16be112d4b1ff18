"""The two blocks that turn a DeepSpeed, transformers or TRL script into LoTA."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lota import choices
from lota.kernels import using
from lota.ranking import save_ranking
from lota.ranks.world import join_world
from lota.retention import load_all
from lota.selection import (
    Candidates,
    Selection,
    candidates,
    check,
    check_unprotected,
    dense_tensors,
    left_out,
    left_out_lines,
    select,
)
from lota.selection.kinds import IN_BLOCKS
from lota.ticket import Mask, Ticket
from lota.zero.calibration import CalibrationRun
from lota.zero.compact.pulling import Retained
from lota.zero.deepspeed.engine import substituted
from lota.zero.deepspeed.saving import WithoutWrongAdvice
from lota.zero.importance import ImportanceRun
from lota.zero.training import SparseRun

_LOG = logging.getLogger("lota")
_WORTH_A_WARNING = 0.01  # of the weights, inside blocks and yet left out


class Calibration:
    """Handle of a `calibration_zero3` block."""

    def __init__(self, run: CalibrationRun, density: float, budget: str, protect: Sequence[Mask], seed: int) -> None:
        self._run, self._density, self._budget, self._protect, self._seed = run, density, budget, protect, seed
        self.selection: Selection | None = None
        self._asked = density, budget
        self._report: dict[str, Any] | None = None
        self._is_released = False

    def mask(self, density: float | None = None, budget: str | None = None, *, keep: bool = False) -> Mask:
        """Select the mask from the scores, the same on every rank, with the base's fingerprints. Collective.

        density, budget: instead of the block's. keep: keep the scores for another call; otherwise they are released.
        """
        density = self._density if density is None else density
        budget = self._budget if budget is None else budget
        choices.check_density(density)
        choices.check_budget(budget)
        if self._is_released:
            raise ValueError("mask() released the scores: call mask(keep=True) where another call follows")
        self._asked = density, budget
        self._report = self._run.report()
        self.selection = select(
            self._run.scores,
            self._run.shapes,
            density=density,
            budget=budget,
            protect=self._protect,
            seed=self._seed,
            group=self._run.groups.reduction.world,
            base={name: self._run.base_identity[name] for name in self._run.names},
            rows=self._run.rows,
        )
        mask = self.selection.mask
        if self._run.dense:
            mask = mask.with_dense(
                self._run.dense, mask.base | {name: self._run.base_identity[name] for name in self._run.dense}
            )
        mask = mask.with_base(mask.base, self._run.frozen())
        if not keep:
            self._is_released = True
            self._run.release()
        return mask

    def save_ranking(self, path: str | Path) -> None:
        """After `mask(keep=True)`: write that mask and the scores of its entries, out of which `lota mask --ranking`
        cuts the mask of every lower density. 4 bytes an active entry. Collective; the scores are released."""
        if self.selection is None:
            raise ValueError("save_ranking keeps the ranking of a mask: call mask(keep=True) first")
        if self._run.dense:
            raise ValueError("a ranking holds chosen entries only: leave `dense` out")
        density, budget = self._asked
        save_ranking(
            path,
            self.selection.mask.with_base(self.selection.mask.base, self._run.frozen()),
            self._run.scores,
            density=density,
            budget=budget,
            seed=self._seed,
            group=self._run.groups.reduction.world,
        )
        self._run.release()

    def report(self) -> dict[str, Any]:
        """Bytes this rank held, by kind; eligible entries; what was left out; steps; after `mask()` also what was
        selected."""
        report = self._report if self._report is not None else self._run.report()
        report["left_out"] = [
            asdict(row) for row in left_out(self._run.model_shapes, {*self._run.names, *self._run.dense})
        ]
        if self.selection is None:
            return report
        chosen = self.selection
        return report | {
            "num_active": chosen.num_active,
            "density": chosen.density,
            "num_tied": chosen.num_tied,
            "num_zero_scored": chosen.num_zero_scored,
            "per_tensor": chosen.per_tensor,
        }


@contextmanager
def calibration_zero3(
    *,
    score: str = choices.SCORE,
    density: float = choices.DENSITY,
    budget: str = choices.BUDGET,
    protect: Sequence[Any] = (),
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    dense: Sequence[str] | None = None,
    seed: int = 0,
    max_skipped_steps: int = choices.MAX_SKIPPED_STEPS,
) -> Iterator[Calibration]:
    """Calibrate with the training script inside the block: `run.mask()` afterwards gives the mask.

    Inside, `deepspeed.initialize` (which Trainers call in `train()`) builds an engine on ZeRO-3 whose weights are
    sharded over all ranks. `task_vector` trains densely (eligible tensors only) and scores |fp32 master - base|;
    `gradient`, `fisher` and `snip` accumulate scores in place of steps and leave the weights alone; `magnitude` and
    `random` look at the weights only. protect: masks, tickets or their paths, whose entries are never chosen. include,
    exclude: patterns over tensor names (see `lota.selection.eligible`); one of `include` may name a range of rows:
    `model.embed_tokens.weight[128256:]`. dense: patterns of tensors (or their rows) to train whole, beside the entries
    that are chosen: what the base does not have (a new head, added rows), which is refused otherwise; they join the
    mask with all of their entries. max_skipped_steps: see `sparse_zero3`.
    ValueError for what is wrong or unsupported, before training.
    """
    choices.check_choice("score", score, choices.SCORES)
    choices.check_density(density)
    choices.check_budget(budget)
    masks = [_as_mask(item) for item in protect]

    def choose(
        trainable: Mapping[str, tuple[int, ...]],
        model: Mapping[str, tuple[int, ...]],
        buffers: Mapping[str, tuple[int, ...]],
    ) -> Candidates:
        chosen = candidates(trainable, include, exclude, dense, buffers)
        check_unprotected(chosen.dense, masks)
        _log_left_out(model, {*chosen.names, *chosen.dense}, include is not None or exclude is not None)
        return chosen

    run = CalibrationRun(
        score,
        choose,
        lambda shapes, rows, base: check(shapes, density=density, budget=budget, protect=masks, base=base, rows=rows),
        max_skipped_steps,
        names_adapters=include is not None,
    )
    with _block(run):
        yield Calibration(run, density, budget, masks, seed)


@contextmanager
def importance_zero3(
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    mask: Any = None,
    max_skipped_steps: int = choices.MAX_SKIPPED_STEPS,
) -> Iterator[ImportanceRun]:
    """Collect how important every eligible weight is to a task, with the task's training script inside the block;
    `run.importance()` afterwards, and `run.importance().save(TICKET)` lets it travel in the task's ticket.

    Nothing is trained: a step squares the gradients of the micro-batches since the last one and leaves the weights as
    they are. A few dozen micro-batches of a few rows are enough (64 of 4 rows), as long as each has a mean loss of its
    own: a Trainer wants `average_tokens_across_devices=False`, and `gradient_accumulation_steps=1` or losses that do
    not count the rows of others. The same micro-batches give the same importance on any number of ranks.
    include, exclude: patterns over tensor names, as of `calibration_zero3`. mask: (a mask, a ticket or the path of one)
    collect the exact importance at its active entries too, in 8 bytes an entry on every rank.
    ValueError for what is wrong or unsupported, before anything runs.
    """
    chosen = None if mask is None else _as_mask(mask)
    run = ImportanceRun(
        lambda trainable, model, buffers: candidates(trainable, include, exclude, None, buffers),
        chosen,
        max_skipped_steps,
        names_adapters=include is not None,
    )
    with _block(run):
        yield run


@contextmanager
def sparse_zero3(
    mask: Any,
    *,
    dense: Sequence[str] | None = None,
    shard_group_size: int | str | None = None,
    gradient_reduction: str = "auto",
    reduce_every: str = "micro_step",
    kernels: str = "auto",
    max_skipped_steps: int = choices.MAX_SKIPPED_STEPS,
    rounding_seed: int | None = None,
    retain: Sequence[Any] = (),
    pull: float | None = None,
    num_steps: int | None = None,
) -> Iterator[SparseRun]:
    """Train only the active entries of `mask` with the training script inside the block; `run.save_ticket(path)`
    afterwards.

    mask: a `Mask`, a `Ticket`, or the path of one. Once the engine is built only rank 0 keeps its indices, and
    `run.mask` of the others has names, shapes and counts only; a mask that the script itself refers to stays in memory.
    Inside, `deepspeed.initialize` builds an engine whose masters,
    moments and gradients exist for active entries only; everything else of the model keeps its bits. The script passes
    `model.parameters()` as usual; tensors that the mask does not name are frozen for the length of the block.
    dense: patterns of tensors (or their rows, `name[a:b]`) to train whole beside the mask's entries, and to store whole
    in the ticket; a mask from a calibration with `dense` has them already. Persistent buffers that training moves
    (BatchNorm's statistics) are stored when named here, and an error when they are not.
    shard_group_size: how many ranks together hold one copy of the weights: a number (1: every rank holds all), `node`
    (the ranks of a node, as the launcher counts them), `world` or None (all).
    gradient_reduction: `compact` sends active entries only, and every rank holds the index of all of them; `dense`
    reduces whole gradients, and a rank holds its own share of the index; `auto` takes compact unless a rank would then
    hold more than 80% of its accelerator's memory and less with dense (lota.plan.reduction). reduce_every: `step` sends
    once per step instead of once per micro step, for 4 bytes per active entry, unsharded, with `compact` only. kernels:
    `auto` takes Triton on GPUs and compiled C on CPUs where they can run, else plain torch; `triton` and `torch` force
    one; all give the same bits. Gradients are sent in fp32 unless the DeepSpeed configuration says
    `communication_data_type: bf16`. rounding_seed: None rounds the fp32 masters into the weights to nearest even; a
    seed rounds them into bf16 weights stochastically, by bits that depend on the seed, the step and the weight's place
    in the model alone, whatever the ranks; with AdamW and RMSprop only.
    retain, pull: keep what earlier tasks need. After every step each active entry moves back towards its value at the
    start, the more the larger its importance to them: w = old + (w - old) / (1 + rate * importance), on the fp32
    masters. retain: `lota.retention.Importance`, or paths of tickets that hold one; several add up. pull: the sum of
    the rates over the whole run, a number without a unit (10; try 3 and 30): the rate of a step is pull times its
    learning rate, divided by the sum of all learning rates that the schedule will set. Learn about three times as fast
    with it. num_steps: how many steps there will be, where the schedule does not tell (transformers' schedules do).
    ValueError for what is wrong or unsupported, before training.
    """
    choices.check_reductions(gradient_reduction, reduce_every)
    choices.check_choice("kernels", kernels, choices.KERNELS)
    choices.check_pull(pull, retain)
    run = SparseRun(
        _as_mask(mask),
        dense=lambda shapes: dense_tensors(shapes, dense),
        shard_group_size=shard_group_size,
        gradient_reduction=gradient_reduction,
        reduce_every=reduce_every,
        max_skipped_steps=max_skipped_steps,
        rounding_seed=rounding_seed,
        retained=None if pull is None else Retained(load_all(retain), float(pull), num_steps),
    )
    del mask  # else this frame would keep its indices on every rank
    with using(kernels, run.device), _block(run):
        yield run


@contextmanager
def _block(run: CalibrationRun | SparseRun) -> Iterator[None]:
    has_failed = True
    join_world()
    advice = WithoutWrongAdvice()
    hook = register_optimizer_step_pre_hook(run.check_step)
    try:
        with substituted(run, run.optimizer_class):
            yield
        has_failed = False
    finally:
        hook.remove()
        advice.restore()
        run.close(has_failed)


def _log_left_out(model: Mapping[str, tuple[int, ...]], taken: Collection[str], is_asked: bool) -> None:
    """What of the model is left out, on rank 0: as a warning where nobody may expect it."""
    if dist.get_rank() > 0:
        return
    rows = left_out(model, taken)
    inside = sum(row.share for row in rows if row.kind in IN_BLOCKS)
    level = logging.INFO if is_asked or inside < _WORTH_A_WARNING else logging.WARNING
    for line in left_out_lines(rows):
        _LOG.log(level, line)


def _as_mask(item: Any) -> Mask:
    if isinstance(item, Mask):
        return item
    if isinstance(item, Ticket):
        return item.mask
    if isinstance(item, (str, Path)):
        return Mask.load(item)
    raise ValueError(f"expected a lota.Mask, a lota.Ticket or the path of one, got {type(item).__name__}")
