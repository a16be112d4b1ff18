"""Bytes per rank of dense ZeRO-3, LoRA, LoTA's calibration and sparse training, as in docs/planning_formulas.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lota.kernels import TILE
from lota.plan import moments
from lota.plan.counts import LoraSettings, MaskCounts, excess_percent
from lota.plan.layout import RankLayout, Transfer
from lota.plan.model import ModelShapes
from lota.plan.moments import Moment

FINGERPRINT_TABLE = 8 << 16
MOST_BUCKET = 1 << 22
SUB_GROUP = 1_000_000_000
ENCODED_MASK = "encoded mask, rank 0"
TENSOR_RECORD = 600
"""Bytes of names and checksums that a tensor adds to a ticket, about."""
_ADAMW = 12
# Buckets in flight, packed and received, beside the fp32 one being filled (lota.zero.compact.reduction).
_ON_THEIR_WAY = 3


@dataclass(frozen=True)
class MethodPlan:
    """What one rank holds and sends. device, host: between steps, in the accelerator's and in host memory, of rank 0,
    which alone keeps the mask's indices and gathers the ticket. work: what backward adds; step: what the update adds;
    moments: what others add, by name ("build", "checkpoint", ...). trained: entries that are.
    """

    name: str
    device: Mapping[str, int]
    host: Mapping[str, int]
    work: Mapping[str, int]
    step: int
    transfers: Sequence[Transfer]
    checkpoint: int
    product: int
    trained: int
    moments: Mapping[str, Moment] = field(default_factory=dict)
    uneven: int = 0
    note: str = ""

    @property
    def held(self) -> int:
        """Bytes on the device between steps."""
        return sum(self.device.values())

    @property
    def at_moments(self) -> dict[str, Moment]:
        """What every moment adds, "step" among them: backward, or the update where that takes more."""
        return {"step": Moment(max(sum(self.work.values()), self.step)), **self.moments}

    @property
    def peak_moment(self) -> str:
        """When the device holds most."""
        return max(self.at_moments, key=lambda name: self.at_moments[name].device)

    @property
    def peak(self) -> int:
        """The most on the device besides activations, at whatever moment, on an uneven mask's fullest rank."""
        return self.held + self.uneven + self.at_moments[self.peak_moment].device

    @property
    def host_held(self) -> int:
        """Bytes in host memory between steps."""
        return sum(self.host.values())

    @property
    def host_peak_moment(self) -> str:
        return max(self.at_moments, key=lambda name: self.at_moments[name].host)

    @property
    def host_peak(self) -> int:
        """The most in host memory."""
        return self.host_held + self.at_moments[self.host_peak_moment].host

    def sent(self, layout: RankLayout) -> tuple[int, int]:
        """Bytes a rank sends per step inside its node, and over the network."""
        pairs = [transfer.sent(layout.ranks_per_node) for transfer in self.transfers]
        return sum(inside for inside, _ in pairs), sum(across for _, across in pairs)

    def payload(self, kind: str) -> int:
        """Bytes of the buffers that collectives of a kind move per step."""
        return sum(t.payload for t in self.transfers if t.kind == kind and len(t.group) > 1)


def full(model: ModelShapes, layout: RankLayout) -> MethodPlan:
    """Stock ZeRO-3 with AdamW on every weight."""
    plan = _dense("dense ZeRO-3", model, layout, list(model.shapes))
    size = model.numel()
    return replace(plan, checkpoint=(model.item_bytes + _ADAMW) * size, product=model.item_bytes * size)


def lora(model: ModelShapes, layout: RankLayout, settings: LoraSettings) -> MethodPlan:
    """Stock ZeRO-3 with AdamW on adapters; the gathers include the frozen weights (an upper bound: what comes before
    the first adapter needs none in backward)."""
    added = settings.shapes(model)
    grown = replace(model, shapes={**model.shapes, **added})
    plan = _dense(f"LoRA, rank {settings.rank}", grown, layout, list(added), has_frozen_bottom=False)
    size = grown.numel(added)
    return replace(plan, checkpoint=(model.item_bytes + _ADAMW) * size, product=model.item_bytes * size)


def calibration(model: ModelShapes, layout: RankLayout, eligible: Sequence[str], score: str) -> MethodPlan:
    """LoTA's first phase, sharded over all ranks: `task_vector` trains densely; `gradient`, `fisher` and `snip` keep a
    score; `magnitude` and `random` nothing."""
    numel, pieces = model.numel(eligible), model.pieces(layout.ranks, eligible)
    name = f"calibration, {score}"
    if score == "task_vector":
        plan = _dense(name, model, layout, eligible)
        host = {**plan.host, "base values": model.item_bytes * pieces, "fingerprints": FINGERPRINT_TABLE}
        at = _calibration_moments(model, layout, eligible, score, has_state=True, base_values=host["base values"])
        return replace(plan, host=host, checkpoint=_ADAMW * numel, moments=at)
    device = _weights(model, layout, layout.ranks)
    work = _at_work(model, layout, layout.ranks > 1, eligible)
    step = 0
    transfers = _gathers(model, layout, layout.world(), eligible)
    if score in ("gradient", "fisher", "snip"):
        device["scores"] = 4 * pieces
        if layout.gradient_accumulation_steps > 1:
            device["gradients"] = 4 * pieces
        bucket = min(_bucket(model, layout, MOST_BUCKET), numel)
        work["reduction buffers"] = _buffers(bucket, bucket if layout.ranks > 1 else 0, layout)
        step = 8 * min(pieces, MOST_BUCKET)  # squares in float64
        payload = layout.communication_bytes * numel * layout.gradient_accumulation_steps
        transfers.append(Transfer("gradients", "all_to_all", payload, layout.world()))
    checkpoint = device.get("scores", 0) and 4 * numel
    at = _calibration_moments(model, layout, eligible, score, has_state=bool(checkpoint))
    host = {"fingerprints": FINGERPRINT_TABLE}
    return MethodPlan(name, device, host, work, step, transfers, checkpoint, 0, numel, at)


def _calibration_moments(
    model: ModelShapes,
    layout: RankLayout,
    eligible: Sequence[str],
    score: str,
    *,
    has_state: bool,
    base_values: int = 0,
) -> dict[str, Moment]:
    at = {"build": moments.build(model, layout.ranks, eligible, base_values=base_values)}
    if has_state:
        own = model.largest_piece(layout.ranks, eligible)
        at |= {"checkpoint": moments.checkpoint(own), "resume": moments.resume(own)}
    return at | {"selection": moments.selection(model, layout.ranks, eligible, score)}


def lota(
    model: ModelShapes,
    layout: RankLayout,
    mask: MaskCounts,
    *,
    reduction: str = "compact",
    reduce_every: str = "micro_step",
    is_pulled: bool = False,
) -> MethodPlan:
    """Sparse training. reduction: `compact` or `dense`; reduce_every: `micro_step` or `step`. is_pulled: to what
    earlier tasks need, with old values and importance beside the masters."""
    size, spread = layout.shard_size, mask.spread
    accumulation = layout.gradient_accumulation_steps
    names = [name for name in mask.numels if spread.counts.get(name, 0)]
    whole = _index(spread.active, spread.offset_bytes)
    share = _index(spread.local, spread.local_offset_bytes)
    padded = _padded(spread.local)
    device = _weights(model, layout, size)
    if reduction == "compact":
        device["index, whole"] = whole
    if reduction == "dense" or size > 1 or layout.offload_param:
        device["index, own share"] = share
    device |= {"masters": 4 * padded, "moments": 8 * padded, "gradients": 4 * padded}
    if is_pulled:
        device |= {"old values": model.item_bytes * padded, "importance": 2 * padded}
    host = {"base values": model.item_bytes * spread.local, ENCODED_MASK: mask.encoded()}
    host["fingerprints"] = FINGERPRINT_TABLE
    if layout.offload_param:
        moved = [kind for kind in device if kind not in ("index, whole", "gathered, kept")]
        host |= {kind: device.pop(kind) for kind in moved}
    entries = spread.active if reduction == "compact" else mask.eligible
    per_reduction = layout.communication_bytes * entries
    own = layout.communication_bytes * (spread.local if reduction == "compact" else -(-mask.eligible // size))
    largest = max(spread.counts.values(), default=0) if reduction == "compact" else 0
    bucket = max(min(_bucket(model, layout, MOST_BUCKET), entries), largest)
    work = _at_work(model, layout, size > 1 or layout.offload_param, names)
    if reduce_every == "step" and layout.ranks > 1:
        work["sums of micro steps"] = 4 * entries
    work["reduction buffers"] = _buffers(bucket, max(bucket, spread.received) if size > 1 else 0, layout)
    reductions = 1 if reduce_every == "step" else accumulation
    transfers = [
        *_gathers(model, layout, layout.shard_group(), names),
        Transfer("gradients", "all_to_all", per_reduction * reductions, layout.shard_group()),
        Transfer("gradients", "all_reduce", own * reductions, layout.replica_group()),
    ]
    values = model.item_bytes * spread.active
    ticket = mask.encoded() + 2 * values + TENSOR_RECORD * len(mask.numels)
    excess, received = spread.fullest - spread.local, 0
    if mask.is_even:
        percent = excess_percent(size)
        excess, received = spread.local * percent // 100, bucket * percent // 100 if reduction == "compact" else 0
    uneven = _buffers(0, received, layout)
    if not layout.offload_param:
        uneven += excess * (16 + spread.local_offset_bytes + ((model.item_bytes + 2) if is_pulled else 0))
    return MethodPlan(
        f"LoTA, {100 * spread.active / max(1, mask.eligible):.3g}%",
        device,
        host,
        work,
        0,
        transfers,
        _ADAMW * spread.active,
        ticket,
        spread.active,
        _lota_moments(model, layout, mask, names, device),
        uneven,
        f"gradient_reduction {reduction}",
    )


def _lota_moments(
    model: ModelShapes, layout: RankLayout, mask: MaskCounts, names: Sequence[str], device: Mapping[str, int]
) -> dict[str, Moment]:
    size, spread = layout.shard_size, mask.spread
    own = -(-max(spread.counts.values(), default=0) // size)
    own = own * (100 + excess_percent(size)) // 100 if mask.is_even else -(-spread.received // size)
    build = moments.build(
        model,
        size,
        names,
        is_regrouped=size < layout.ranks,
        chunk=moments.chunk_of(spread.counts),
        index=sum(held for kind, held in device.items() if kind.startswith("index")),
        state=sum(device.get(kind, 0) for kind in ("masters", "moments", "gradients")),
        base_values=model.item_bytes * spread.local,
    )
    return {
        "build": build,
        "checkpoint": moments.checkpoint(own),
        "resume": moments.resume(own),
        "ticket": moments.ticket(model, mask, size, own),
    }


def _dense(
    name: str, model: ModelShapes, layout: RankLayout, trained: Sequence[str], has_frozen_bottom: bool = True
) -> MethodPlan:
    """Stock ZeRO-3: fp32 masters and two moments, gradients in the weights' dtype, one bucket."""
    ranks, item = layout.ranks, model.item_bytes
    pieces, numel = model.pieces(ranks, trained), model.numel(trained)
    device = _weights(model, layout, ranks)
    states = {"masters": 4 * pieces, "moments": 8 * pieces, "gradients": item * pieces}
    host: dict[str, int] = {}
    if layout.offload_optimizer:
        host |= states
    else:
        device |= states
    device["reduction bucket"] = item * _bucket(model, layout, None)
    transfers = _gathers(model, layout, layout.world(), trained if has_frozen_bottom else ())
    payload = item * numel * layout.gradient_accumulation_steps
    transfers.append(Transfer("gradients", "reduce_scatter", payload, layout.world()))
    # An fp32 copy of the gradients and one more in the weights' dtype, a sub-group at a time.
    step = 0 if layout.offload_optimizer else (4 + item) * min(pieces, SUB_GROUP)
    work = _at_work(model, layout, ranks > 1, trained)
    at = {"build": Moment(host=item * pieces)}  # DeepSpeed moves the trained pieces through host memory
    return MethodPlan(name, device, host, work, step, transfers, 0, 0, numel, at)


def _weights(model: ModelShapes, layout: RankLayout, size: int) -> dict[str, int]:
    held = {"weights": model.item_bytes * model.pieces(size)}
    kept = model.item_bytes * model.persistent(_threshold(model, layout))
    if size > 1 and kept:
        held["gathered, kept"] = kept
    return held


def _at_work(model: ModelShapes, layout: RankLayout, is_gathered: bool, trained: Sequence[str]) -> dict[str, int]:
    work = {"largest gradient": model.item_bytes * model.largest_gradient(trained)}
    if is_gathered:
        passing = model.numel() - model.persistent(_threshold(model, layout))
        work["gathered weights"] = model.item_bytes * max(
            min(passing, model.largest_gathered()), min(passing, layout.live_parameters)
        )
    return work


def _gathers(model: ModelShapes, layout: RankLayout, group: range, trained: Sequence[str]) -> list[Transfer]:
    """Weights for forward, backward and, with activation checkpointing, the second forward.

    Small tensors stay gathered from one step to the next. What all fits under DeepSpeed's limits is gathered once per
    micro step; beyond that an upper bound: up to `live_parameters` of it need not be gathered again. trained: backward
    ends at the first of these, so that what comes before is not gathered for it; () where it continues to the inputs.
    """
    kept = model.persistent(_threshold(model, layout))
    passing = model.numel() - kept
    fits = passing <= layout.live_parameters
    elements = passing if fits else 2 * (passing + model.tied) - _before(model, layout, trained)
    if layout.gradient_checkpointing and not fits and layout.live_parameters < model.largest_gathered():
        elements += model.in_blocks()
    total = kept + elements * layout.gradient_accumulation_steps
    return [Transfer("weights", "all_gather", model.item_bytes * total, group)]


def _before(model: ModelShapes, layout: RankLayout, trained: Sequence[str]) -> int:
    """Elements that come and go and lie before the first trained tensor; with activation checkpointing, which may be
    reentrant and then runs backward through all blocks, before the first block at least."""
    first = set(trained)
    if not first:
        return 0
    threshold, count = _threshold(model, layout), 0
    for name, shape in model.shapes.items():
        if name in first or (layout.gradient_checkpointing and model.is_in_block(name)):
            break
        numel = math.prod(shape)
        count += numel if numel >= threshold else 0
    return count


def _bucket(model: ModelShapes, layout: RankLayout, most: int | None) -> int:
    bucket = model.hidden**2 if layout.bucket is None else layout.bucket
    return bucket if most is None else min(bucket, most)


def _threshold(model: ModelShapes, layout: RankLayout) -> int:
    return 10 * model.hidden if layout.persistence_threshold is None else layout.persistence_threshold


def _padded(active: int) -> int:
    return -(-active // TILE) * TILE


def _index(active: int, offset_bytes: int) -> int:
    return -(-active // TILE) * 8 + _padded(active) * offset_bytes


def _buffers(bucket: int, received: int, layout: RankLayout) -> int:
    """Bytes of a bucket that is filled, and of those on their way: packed (or all-reduced in place), and received. One
    rank has none: gradients go straight to where they are summed."""
    if layout.ranks == 1:
        return 0
    return 4 * bucket + layout.communication_bytes * _ON_THEIR_WAY * (bucket + received)
