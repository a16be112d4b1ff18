"""Progress of long work, in lines that suit a terminal and a log file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

Say = Callable[[str], None]
EVERY_SECONDS = 5.0


def silent(_: str) -> None:
    """For those who want to hear nothing."""


class Progress:
    """`what: 40% of 3,200 MiB, 2 min left`, at most every five seconds; nothing where the work takes less.

    total: of all the work, in `unit`s. say: takes the lines.
    """

    def __init__(self, what: str, total: float, unit: str, say: Say) -> None:
        self._what, self._total, self._unit, self._say = what, total, unit, say
        self._done = 0.0
        self._begun = self._said = time.monotonic()

    def add(self, done: float = 1.0) -> None:
        """So much more is done."""
        self._done += done
        now = time.monotonic()
        if now - self._said < EVERY_SECONDS or not 0 < self._done < self._total:
            return
        self._said = now
        left = (now - self._begun) * (self._total - self._done) / self._done
        share = self._done / self._total
        self._say(f"{self._what}: {share:.0%} of {self._total:,.0f} {self._unit}, {_duration(left)} left")


def tracked(names: Sequence[str], what: str, say: Say) -> Iterator[str]:
    """The names of tensors, one after another, with lines about how many are done."""
    progress = Progress(what, len(names), "tensors", say)
    for name in names:
        yield name
        progress.add()


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
