"""Process groups of a block: who shards the weights with whom, and groups that carry only gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from lota.zero.reduction import ReductionGroups


@dataclass(frozen=True)
class BlockGroups:
    """weights: the ranks that hold one copy of the weights together, None where that is the world."""

    weights: dist.ProcessGroup | None
    reduction: ReductionGroups

    def destroy(self) -> None:
        """Give up the groups that carried gradients; the weights stay sharded over theirs. Collective."""
        reduction = self.reduction
        for group in dict.fromkeys((reduction.shard, reduction.replica, reduction.world)):
            if group is not None:
                dist.destroy_process_group(group)


def check_shard_group_size(shard_group_size: int | None, world_size: int) -> int:
    """The size to use (None: the world); ValueError where groups of that size do not divide the ranks."""
    if shard_group_size is None:
        return world_size
    if isinstance(shard_group_size, bool) or not isinstance(shard_group_size, int) or shard_group_size < 1:
        raise ValueError(f"shard_group_size must be a positive integer, got {shard_group_size!r}")
    if world_size % shard_group_size:
        fitting = [size for size in range(1, world_size + 1) if world_size % size == 0]
        raise ValueError(
            f"shard_group_size {shard_group_size} does not divide the {world_size} ranks; use one of {fitting}"
        )
    return shard_group_size


def make_groups(shard_size: int) -> BlockGroups:
    """Consecutive ranks shard together; ranks at the same place in their groups are replicas. Collective over the
    world.

    Gradients get groups of their own, so that they never queue behind the gathering of weights.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    shards = [list(range(first, first + shard_size)) for first in range(0, world_size, shard_size)]
    replicas = [list(range(first, world_size, shard_size)) for first in range(shard_size)]
    weights = _own_group(shards) if shard_size < world_size else None
    shard = _own_group(shards) if shard_size > 1 else None
    everyone = _own_group([list(range(world_size))]) if 1 < world_size != shard_size else shard
    reduction = ReductionGroups(
        shard=shard,
        replica=_own_group(replicas) if shard_size < world_size else None,
        world=everyone,
        shard_size=shard_size,
        world_size=world_size,
        shard_rank=rank % shard_size,
    )
    return BlockGroups(weights, reduction)


def _own_group(rank_lists: list[list[int]]) -> dist.ProcessGroup:
    """Create all groups, as every rank must, and return the one that holds this rank."""
    rank = dist.get_rank()
    groups = [dist.new_group(ranks) for ranks in rank_lists]
    return next(group for ranks, group in zip(rank_lists, groups, strict=True) if rank in ranks)
