"""Counting from outside the library: which tensors are alive, and what collectives carry, whoever issued them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# c10d's operators: which argument is the whole buffer that a collective moves, by the kind of collective.
_COLLECTIVES = {
    "allreduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
    "broadcast_": ("broadcast", 0),
    "send": ("send", 0),
    "recv_": ("receive", 0),
}
_SILENT = {"barrier", "monitored_barrier_"}


class LiveTensors(TorchDispatchMode):
    """Every storage that an operation touched, and how many bytes of them are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def nbytes(self) -> int:
        return sum(self.sizes())

    def sizes(self) -> list[int]:
        """Bytes of every live storage."""
        self._storages = {key: entry for key, entry in self._storages.items() if not entry[0].expired()}
        return [size for _, size in self._storages.values()]


class Peak(LiveTensors):
    """The most bytes of live tensors after any operation since `restart`. What operations allocate inside themselves
    is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._at_most = 0  # the sum of all sizes, those of tensors that ended since the last sweep included

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self._at_most > self.most:
            self._at_most = self.nbytes()
            self.most = max(self.most, self._at_most)
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        _, before = self._storages.get(storage._cdata, (None, 0))
        self._at_most += storage.nbytes() - before
        super()._see(storage)

    def restart(self) -> None:
        self._at_most = self.most = self.nbytes()


class Traffic(Peak):
    """Live tensors, their peak at any operation (`most`) and at collectives, where activations weigh least (`peak`),
    and the bytes of the buffers that collectives moved, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.payload: Counter[str] = Counter()
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if namespace != "c10d" or name in _SILENT:
            result = super().__torch_dispatch__(func, types, args, kwargs)
            self.see_peak()
            return result
        kind, tensors = _moved(name, args)
        self.payload[kind] += sum(tensor.nbytes for tensor in tensors)
        self.see_peak()
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.see_peak()
        return result

    def see_peak(self) -> None:
        self.peak = max(self.peak, self.nbytes())

    def restart(self) -> None:
        super().restart()
        self.payload.clear()
        self.peak = 0


class Collectives(TorchDispatchMode):
    """Bytes of the buffers that collectives moved, by kind, ranks and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.payload: Counter[tuple[str, tuple[int, ...], torch.dtype]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d" and name not in _SILENT:
            kind, tensors = _moved(name, args)
            for tensor in tensors:
                self.payload[kind, _ranks(args), tensor.dtype] += tensor.nbytes
        return func(*args, **(kwargs or {}))


def _moved(name: str, args: tuple[Any, ...]) -> tuple[str, list[torch.Tensor]]:
    """The kind of a collective, and the whole buffer that it moves."""
    kind, position = _COLLECTIVES[name]
    return kind, [leaf for leaf in tree_leaves(args[position]) if isinstance(leaf, torch.Tensor)]


def _ranks(args: tuple[Any, ...]) -> tuple[int, ...]:
    """The world's ranks that take part in a collective."""
    boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and str(arg._type()).endswith("Group"))
    return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(boxed)))
