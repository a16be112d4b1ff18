"""What 64 ranks of a 70B Llama trained at 1% hold and send, on an uneven mask: integers, and no tensor of that size.

    python -m benchmarks.layout_70b

The mask is drawn, not selected: every tensor and every 64th of a tensor gets a density from a log-normal-like spread
(1.25 to the power of a count of random bits; a generator of integers with a fixed seed). The pieces of the matrices
that write into the residual stream (o_proj, down_proj) have theirs in common over all layers, for their rows are the
same dimensions in each. Spread and seed were chosen so that the fullest rank is about as full as that of the most
uneven selected mask that was measured (docs/planning.md): 152% of an even share on 8 ranks (139%), 236% on 64 (231%).

Owners, buckets and bytes come from the code that trains: `build_layout`, `GradientReducer`, the planner's formulas.
Prints the tables of docs/planning_70b.md, which tests/zero/compact/test_layout_70b.py holds against it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from lota import plan
from lota.plan import format_bytes
from lota.plan.layout import Transfer
from lota.selection import eligible
from lota.zero.block import BUCKET_NUMEL
from lota.zero.compact.layout import CompactLayout, build_layout
from lota.zero.compact.reduction import GradientReducer, ReductionGroups

RANKS, NODE, SIZES, PERCENT, SEED = 64, 8, (8, 16, 64), 1, 70
NARROW, WIDE = 16, 32
"""Random bits that make the powers of a tensor and its pieces, and of the pieces that all layers have in common."""
LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
INTO_THE_STREAM = ("o_proj", "down_proj")

Counts = Mapping[str, tuple[int, ...]]
"""Active entries of each tensor in each of its equal pieces."""


@dataclass(frozen=True)
class View:
    """One rank's share. payloads: bytes of the buffers that it hands to collectives in a reduction, in its shard group
    and across groups; the others: bytes that leave and reach it there, and what it holds."""

    rank: int
    owned: int
    payloads: tuple[int, int]
    sent_inside: int
    received_inside: int
    sent_across: int
    state: int
    index: int
    buffers: int


def shapes() -> plan.ModelShapes:
    from transformers import LlamaConfig

    return plan.shapes_of_config(LlamaConfig(**LLAMA_70B), "70B")


def draw_counts(numels: Mapping[str, int], total: int, pieces: int, seed: int = SEED) -> Counts:
    """Exactly `total` active entries on uneven pieces (see above). ValueError where one cannot hold its own."""
    generator = random.Random(seed)

    def bits(count: int) -> int:
        return generator.getrandbits(count).bit_count()

    shared: dict[str, list[int]] = {}
    for end in INTO_THE_STREAM:
        eighths = [bits(WIDE) for _ in range(8)]
        shared[end] = [bits(WIDE) + eighths[8 * piece // pieces] for piece in range(pieces)]
    weights = []
    for name, numel in numels.items():
        tensor = bits(NARROW)
        stream = next((shared[end] for end in INTO_THE_STREAM if end in name), None)
        for piece in range(pieces):
            power = tensor + (2 * bits(NARROW) if stream is None else stream[piece])
            weights.append(numel * 5**power * 4 ** (NARROW + 2 * WIDE - power))
    whole = sum(weights)
    bounds = [0] + [total * seen // whole for seen in accumulate(weights)]
    counts = [stop - start for start, stop in pairwise(bounds)]
    drawn = {name: tuple(counts[i * pieces : (i + 1) * pieces]) for i, name in enumerate(numels)}
    for name, row in drawn.items():
        if max(row) > numels[name] // pieces:
            raise ValueError(f"{max(row)} active entries were drawn for a piece of {name}, of {numels[name] // pieces}")
    return drawn


def regroup(counts: Counts, size: int) -> Counts:
    """The same entries owned by `size` ranks, which divides the number of pieces."""
    step = len(next(iter(counts.values()))) // size
    return {name: tuple(sum(row[i : i + step]) for i in range(0, len(row), step)) for name, row in counts.items()}


def layout_of(counts: Counts, numels: Mapping[str, int], rank: int) -> CompactLayout:
    return build_layout([(name, numels[name], row) for name, row in counts.items()], rank)


def reducer_of(layout: CompactLayout, world: int, bucket_numel: int) -> GradientReducer:
    """The reducer that a run would make on this rank; it has no process groups, so it only counts."""
    return GradientReducer(
        [slot.counts for slot in layout.slots],
        bucket_numel=bucket_numel,
        groups=ReductionGroups(None, None, None, layout.size, world, layout.rank),
        deliver=lambda slots, values: None,
        device=torch.device("cpu"),
    )


def see(model: plan.ModelShapes, counts: Counts, numels: Mapping[str, int], rank: int) -> View:
    """What a rank of the first shard group holds and sends in a step of one micro step."""
    layout = layout_of(counts, numels, rank)
    size, owned = layout.size, layout.local_active
    reducer = reducer_of(layout, RANKS, min(model.hidden**2, BUCKET_NUMEL))
    inside, across = reducer.payloads
    cluster = plan.RankLayout(ranks=RANKS, node_size=NODE, shard_group_size=size)
    # 1024 neighbouring entries span 102400 positions on average, more than two bytes can tell.
    totals = {name: sum(row) for name, row in counts.items()}
    received = size * max(row[rank] for row in counts.values())
    spread = plan.Spread(totals, owned, owned, 4, 4, received)
    made = plan.lota(model, cluster, plan.MaskCounts(numels, spread, is_even=False)).device
    return View(
        rank,
        owned,
        (inside, across),
        inside - 4 * owned,
        4 * owned * (size - 1),
        sum(Transfer("gradients", "all_reduce", across, cluster.replica_group()).sent(NODE)),
        made["masters"] + made["moments"] + made["gradients"],
        made["index, whole"] + made["index, own share"],
        reducer.buffer_bytes,
    )


def padded_bytes(splits: list[list[int]]) -> int:
    """Bytes of the buffers of the same buckets, had every rank's part the width of the widest one."""
    return 4 * sum(len(split) * max(split) for split in splits)


def tables() -> str:
    model = shapes()
    numels = {name: math.prod(model.shapes[name]) for name in eligible(model.shapes)}
    total = sum(numels.values()) * PERCENT // 100
    drawn = draw_counts(numels, total, RANKS)
    ranks = [
        "| shard group | rank | owns | of an even share | sends in the group | receives there | sends across groups "
        "| masters, moments, gradients | index, whole and own | buffers |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    padding = [
        "| shard group | all-to-all, exact | reduce-scatter, equal widths | more | all-reduce across, fullest "
        "| emptiest |",
        "|---|---|---|---|---|---|",
    ]
    for size in SIZES:
        counts = regroup(drawn, size)
        active = layout_of(counts, numels, 0).active_of_rank
        views = [see(model, counts, numels, pick(range(size), key=active)) for pick in (max, min)]
        for what, view in zip(("fullest", "emptiest"), views, strict=True):
            sizes = (view.sent_inside, view.received_inside, view.sent_across, view.state, view.index, view.buffers)
            cells = [f"{view.owned:,}", f"{100 * view.owned * size // total}%", *map(format_bytes, sizes)]
            ranks.append(f"| {size} | {what}, {view.rank} | " + " | ".join(cells) + " |")
        (exact, most), (_, least) = (view.payloads for view in views)
        padded = padded_bytes(reducer_of(layout_of(counts, numels, 0), RANKS, BUCKET_NUMEL).splits)
        cells = [f"{exact:,}", f"{padded:,}", f"{100 * (padded - exact) // exact}%", f"{most:,}", f"{least:,}"]
        padding.append(f"| {size} | " + " | ".join(cells) + " |")
    return "\n".join([f"{total:,} of {sum(numels.values()):,} entries\n", *ranks, "", *padding])


if __name__ == "__main__":
    print(tables())
