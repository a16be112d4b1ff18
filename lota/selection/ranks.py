"""What ranks say to each other during selection: sums, agreed errors, and the pieces of one tensor joined."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

_MESSAGE_BYTES = 2048


class Ranks:
    """One process group, or one process alone (asked for, or torch.distributed not initialised).

    Every method is collective: all ranks of the group call it in the same order. Tensors travel on the device that
    the group's backend wants and come back on the CPU, where selection makes its decisions.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, alone: bool = False) -> None:
        self.is_distributed = dist.is_available() and dist.is_initialized() and not alone
        if group is not None and not self.is_distributed:
            raise ValueError("expected an initialised torch.distributed for `group`, got none. Pass group=None.")
        self.group = group
        self.size = dist.get_world_size(group) if self.is_distributed else 1
        self.rank = dist.get_rank(group) if self.is_distributed else 0
        if self.rank < 0:
            raise ValueError("expected a caller inside `group`, got a rank that is not one of its members.")
        self.device = _device_of(group) if self.size > 1 else torch.device("cpu")

    def sum(self, counts: Tensor) -> Tensor:
        """Counts summed over the ranks, on the CPU; or scores of which one rank has each, and the others 0."""
        if self.size == 1:
            return counts.cpu()
        summed = counts.to(self.device, copy=True)
        dist.all_reduce(summed, group=self.group)
        return summed.cpu()

    def same(self, fingerprint: int, what: str) -> None:
        """ValueError on every rank unless all of them passed the same 63-bit integer."""
        if self.size == 1:
            return
        extremes = torch.tensor([fingerprint, -fingerprint], dtype=torch.int64, device=self.device)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self.group)
        if int(extremes[0]) != -int(extremes[1]):
            raise ValueError(f"expected the same {what} on every rank, got different ones.")

    def first_message(self, message: str | None) -> str:
        """The message of the lowest rank that has one; called only where it is known that some rank does."""
        encoded = (message or "").encode()[:_MESSAGE_BYTES]
        mine = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8, device="cpu")
        mine[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8, device="cpu")
        if self.size == 1:
            return encoded.decode(errors="replace")
        everyone = [torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8, device=self.device) for _ in range(self.size)]
        dist.all_gather(everyone, mine.to(self.device), group=self.group)
        texts = [bytes(text.tolist()).rstrip(b"\0").decode(errors="replace") for text in everyone]
        return next((text for text in texts if text), "")

    def join(self, mine: Tensor, limit: int) -> Tensor:
        """All ranks' int64 values below `limit`, ascending, on the CPU. `mine` is ascending and of any length.

        One all-reduce of exactly as many values as there are, each rank filling its own stretch of a zeroed buffer:
        an all-gather would pad every rank to the fullest, and selected masks are uneven over ranks.
        """
        if self.size == 1:
            return mine.cpu()
        table = torch.zeros(self.size, 2, dtype=torch.int64, device="cpu")
        table[self.rank, 0] = mine.numel()
        table[self.rank, 1] = mine[0] if mine.numel() else 0
        counts, firsts = self.sum(table).unbind(1)
        order = sorted(range(self.size), key=lambda rank: (int(firsts[rank]), int(counts[rank])))
        start = sum(int(counts[rank]) for rank in order[: order.index(self.rank)])
        narrow = torch.int32 if limit <= 1 << 31 else torch.int64  # int32 halves the bytes sent
        joined = torch.zeros(int(counts.sum()), dtype=narrow, device=self.device)
        if joined.numel() == 0:
            return joined.cpu().long()
        joined[start : start + mine.numel()] = mine
        dist.all_reduce(joined, group=self.group)
        values = joined.cpu().long()
        is_ascending = bool((values[1:] > values[:-1]).all())
        return values if is_ascending else values.sort().values


def _device_of(group: dist.ProcessGroup | None) -> torch.device:
    backends = str(dist.get_backend_config(group))  # "cpu:gloo,cuda:nccl" or "nccl"
    if "nccl" in backends and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if "gloo" in backends or "mpi" in backends or "cpu" in backends:
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    return accelerator if accelerator is not None else torch.device("cpu")
