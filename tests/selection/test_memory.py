"""Beside the scores a rank holds histograms, a chunk, one tensor's positions and the encoded mask, never more."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lota.selection import select, topk
from lota.ticket import Mask

NUM_TENSORS, NUMEL = 100, 60_000
BINS = 8 * (topk.NUM_HIGH_BINS + (1 << topk.LOW_BITS))  # bytes of one histogram of each pass


class LiveBytes(TorchDispatchMode):
    """Peak of the bytes of all tensors that were made under this mode and are still alive, storages counted once."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self._known = known  # storages that were there before
        self._holders: dict[int, int] = {}  # storage -> how many living tensors share it
        self._live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else [result]
        for tensor in made:
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor)
        return result

    def _hold(self, tensor: torch.Tensor) -> None:
        storage, num_bytes = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if storage in self._known or num_bytes == 0:
            return
        if storage not in self._holders:
            self._live += num_bytes
            self.peak = max(self.peak, self._live)
        self._holders[storage] = self._holders.get(storage, 0) + 1
        weakref.finalize(tensor, self._release, storage, num_bytes)

    def _release(self, storage: int, num_bytes: int) -> None:
        self._holders[storage] -= 1
        if self._holders[storage] == 0:
            del self._holders[storage]
            self._live -= num_bytes


@pytest.fixture
def one_thread():
    """A dispatch mode sees its own thread only."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("has_ties", [False, True])
@pytest.mark.parametrize("budget", ["global", "per_tensor"])
def test_nothing_as_large_as_the_model(one_thread, budget, has_ties):
    scores = torch.randn(NUM_TENSORS, NUMEL, generator=torch.Generator().manual_seed(0))
    scores = scores.sign() if has_ties else scores
    shapes = {f"layer{number}": (200, 300) for number in range(NUM_TENSORS)}
    protected = Mask.from_indices({name: (shape, torch.arange(0, NUMEL, 10)) for name, shape in shapes.items()})
    with LiveBytes({scores.untyped_storage().data_ptr()}) as live:
        selection = select(
            lambda: ((name, 0, scores[number]) for number, name in enumerate(shapes)),
            shapes,
            density=0.5,
            budget=budget,
            protect=[protected],
        )
    assert selection.num_active == NUM_TENSORS * NUMEL // 2
    encoded = selection.mask.nbytes
    if has_ties and budget == "global":  # the first radix pass over hashes has left about 82 of 5.4M to gather
        encoded += BINS
    # A histogram is alive three times (chunk, sum, all-reduced), a tensor's int64 positions and its keys a few times.
    assert live.peak < encoded + 3 * BINS + 10 * 8 * NUMEL
    assert live.peak < NUM_TENSORS * NUMEL  # a bool per entry
    assert live.peak < selection.num_active * 8 / 4  # an int64 per active entry
