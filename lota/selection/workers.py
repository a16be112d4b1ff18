"""CPU threads that read different parts of a piece, each running torch's operations alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch

from lota.selection.topk import ScorePiece

T = TypeVar("T")
_MIN_PART = 1 << 17  # entries; handing out less costs more than it saves


class Workers:
    """The number of threads that torch uses inside an operation, used across operations instead.

    Selection runs thousands of short operations. Shared among torch's own threads each ends in a barrier, and on a busy
    machine (other ranks, data loaders) the slowest thread holds up every one: five times slower was measured. Parts of
    a piece need no barrier, and bincount, which torch runs on one thread, becomes parallel too.

    Inside the block torch's operations use one thread, also in the caller's thread; `pull` gives them all back while
    the caller's scores are computed. With one thread, or scores on an accelerator, everything runs where it is called.
    """

    def __init__(self) -> None:
        self.size = torch.get_num_threads()
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self.size > 1:
            self._pool = ThreadPoolExecutor(self.size, thread_name_prefix="lota-selection")
            torch.set_num_threads(1)  # the pool's threads, which start later, take this over
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            torch.set_num_threads(self.size)

    def each(self, function: Callable[[ScorePiece], T], piece: ScorePiece) -> list[T]:
        """`function` of every part of the piece, in the order of the parts."""
        if self._pool is None or piece.scores.device.type != "cpu":
            return [function(piece)]
        return list(self._pool.map(function, piece.split(min(self.size, piece.scores.numel() // _MIN_PART))))

    def pull(self, make: Callable[[], Iterable[T]]) -> Iterator[T]:
        """What `make()` iterates over, each item computed with all of torch's threads."""
        with _Threads(self.size):
            items = iter(make())
        while True:
            with _Threads(self.size):
                item = next(items, _END)
            if isinstance(item, _End):
                return
            yield item


class _End:
    pass


_END = _End()


class _Threads:
    """torch's number of threads for the length of a block."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __enter__(self) -> None:
        self._before = torch.get_num_threads()
        if self._before != self._size:
            torch.set_num_threads(self._size)

    def __exit__(self, *raised: object) -> None:
        if self._before != self._size:
            torch.set_num_threads(self._before)
