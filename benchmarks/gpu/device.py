"""The little that differs between a GPU and the CPU on which CI runs the stages: time, memory, names."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch


class Device:
    """kind: cuda or cpu; torch: where tensors go; backend: of process groups."""

    kind: str
    backend: str

    def __init__(self) -> None:
        self.torch = torch.device(self.kind, 0) if self.kind == "cuda" else torch.device(self.kind)

    def synchronize(self) -> None:
        """Wait until all that was asked for is done."""

    def reset_peak(self) -> None:
        raise NotImplementedError

    def peak_bytes(self) -> int:
        """Most that was held since `reset_peak`."""
        raise NotImplementedError

    def held_bytes(self) -> int:
        raise NotImplementedError

    def memory_bytes(self) -> int:
        """All that the device has."""
        raise NotImplementedError

    def stopwatch(self) -> Stopwatch:
        return Stopwatch()

    def host_seconds(self, call: Callable[[], Any]) -> tuple[float, float]:
        """Seconds until `call` returns, and until the device is done with it."""
        self.synchronize()
        start = time.perf_counter()
        call()
        returned = time.perf_counter() - start
        self.synchronize()
        return returned, time.perf_counter() - start

    def collect(self) -> None:
        """Give back what nobody refers to any more."""
        gc.collect()


class Stopwatch:
    """Adds up the time of calls on the device's stream; of calls inside each other only the outermost counts."""

    def __init__(self) -> None:
        self._depth = 0
        self._marks: list[tuple[Any, Any]] = []

    def mark(self) -> Any:
        return time.perf_counter()

    def between(self, start: Any, stop: Any) -> float:
        return stop - start

    @contextmanager
    def running(self) -> Iterator[None]:
        self._depth += 1
        start = self.mark() if self._depth == 1 else None
        try:
            yield
        finally:
            self._depth -= 1
            if start is not None:
                self._marks.append((start, self.mark()))

    def watch(self, owner: Any, *names: str) -> None:
        """Count calls of these methods of `owner` from now on."""
        for name in names:
            setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.running():
                return function(*args, **kwargs)

        return call

    def seconds(self) -> float:
        """The sum so far, once the device is done; starts again at 0."""
        total = sum(self.between(*pair) for pair in self._marks)
        self._marks.clear()
        return total


class _EventStopwatch(Stopwatch):
    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, stop: Any) -> float:
        return start.elapsed_time(stop) / 1e3

    def seconds(self) -> float:
        torch.cuda.synchronize()
        return super().seconds()


class Cuda(Device):
    kind, backend = "cuda", "nccl"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ValueError("--device cuda needs a GPU, and torch sees none; --device cpu runs tiny sizes on the CPU")
        super().__init__()
        torch.cuda.set_device(self.torch)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated()

    def held_bytes(self) -> int:
        return torch.cuda.memory_allocated()

    def memory_bytes(self) -> int:
        return torch.cuda.get_device_properties(self.torch).total_memory

    def stopwatch(self) -> Stopwatch:
        return _EventStopwatch()

    def collect(self) -> None:
        super().collect()
        torch.cuda.empty_cache()


class Cpu(Device):
    """Memory is this process's."""

    kind, backend = "cpu", "gloo"

    def reset_peak(self) -> None:
        with suppress(OSError):  # some containers do not offer it; the peak is the process's then
            Path("/proc/self/clear_refs").write_text("5")

    def peak_bytes(self) -> int:
        return _status("VmHWM")

    def held_bytes(self) -> int:
        return _status("VmRSS")

    def memory_bytes(self) -> int:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device_of(kind: str) -> Device:
    return Cuda() if kind == "cuda" else Cpu()


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0
