"""Process groups of a block: who shards the weights with whom, and groups that carry only gradients."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lota.zero.compact.reduction import ReductionGroups

# torchrun's name and that of DeepSpeed's launcher.
# DeepSpeed's launcher, torchrun. In this order: on CPUs transformers sets torchrun's to 1 where it is not set.
_LOCAL_SIZES = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE")


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


def check_shard_group_size(shard_group_size: int | str | None, world_size: int) -> int:
    """The number of ranks in a shard group. `world` (or None) is all ranks, `node` those of a node, an integer (or its
    text) itself. Does not communicate.

    ValueError for anything else, and where groups of that size do not divide the ranks.
    """
    size = _size_asked_for(shard_group_size, world_size)
    if world_size % size:
        fitting = [size for size in range(1, world_size + 1) if world_size % size == 0]
        raise ValueError(
            f"shard_group_size {shard_group_size} does not divide the {world_size} ranks"
            + (f" ({size} on this node); every node needs the same number" if shard_group_size == "node" else "")
            + f"; use one of {fitting}"
        )
    return size


def _size_asked_for(shard_group_size: int | str | None, world_size: int) -> int:
    if shard_group_size in (None, "world"):
        return world_size
    if shard_group_size == "node":
        return _ranks_of_node(world_size)
    is_text = isinstance(shard_group_size, str) and shard_group_size.isdecimal()
    size = int(shard_group_size) if is_text else shard_group_size  # type: ignore[arg-type]
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"shard_group_size must be a positive integer, node or world, got {shard_group_size!r}")
    return size


def _ranks_of_node(world_size: int) -> int:
    """ValueError where the launcher did not say it, or where the ranks of a node do not follow each other."""
    if world_size == 1:
        return 1
    num_local = local_size()
    rank, local_rank = os.environ.get("RANK", ""), os.environ.get("LOCAL_RANK", "")
    if num_local is None or not (rank.isdecimal() and local_rank.isdecimal()):
        raise ValueError(
            "shard_group_size node needs to know which ranks share a node: expected RANK, LOCAL_RANK and "
            f"LOCAL_WORLD_SIZE in the environment, got {rank!r}, {local_rank!r} and {num_local}. deepspeed, torchrun, "
            "accelerate and recipes/slurm set them; or give the number of ranks of a node"
        )
    if int(rank) % num_local != int(local_rank):
        raise ValueError(
            f"shard_group_size node needs the ranks of a node to follow each other and every node to have the same "
            f"number; rank {rank} is number {local_rank} of {num_local} on its node. Give the launcher the same number "
            "of slots on every host, or give shard_group_size a number"
        )
    return num_local


def local_size() -> int | None:
    """How many ranks the launcher started on this node; None where it does not say so."""
    num_local = next((os.environ[name] for name in _LOCAL_SIZES if name in os.environ), "")
    return int(num_local) if num_local.isdecimal() and int(num_local) > 0 else None


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


def connect(groups: ReductionGroups, device: torch.device) -> None:
    """Make the communicators that reductions will use, with one tiny collective of every kind on every group.
    Collective over the world, before training; `device` is the rank's own.

    NCCL makes them at the first use, which waits for all ranks of a group. Inside a backward, where ranks may need each
    other's weights first, that could wait forever.
    """
    word = torch.zeros(1, dtype=torch.int32, device=device)
    if groups.shard is not None:
        # A word for and from every rank: point-to-point connections are made at the first use, too.
        words = torch.zeros(groups.shard_size, dtype=torch.int32, device=device)
        ones = [1] * groups.shard_size
        dist.all_to_all_single(torch.empty_like(words), words, ones, ones, group=groups.shard)
        dist.all_reduce(word, group=groups.shard)
    if groups.replica is not None:
        dist.all_reduce(word, group=groups.replica)
    if groups.world is not None and groups.world is not groups.shard:
        dist.all_reduce(word, group=groups.world)
    if device.type != "cpu":
        word.cpu()  # the communicators are there when this returns


def _own_group(rank_lists: list[list[int]]) -> dist.ProcessGroup:
    """Create all groups, as every rank must, and return the one that holds this rank."""
    rank = dist.get_rank()
    groups = [dist.new_group(ranks) for ranks in rank_lists]
    return next(group for ranks, group in zip(rank_lists, groups, strict=True) if rank in ranks)
