"""What the kernel benchmarks share: rounds of interleaved calls, and CSV rows that name the machine."""

from __future__ import annotations

import csv
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def rounds(calls: Mapping[str, Callable[[], Any]], count: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every call in each of `count` rounds, after one to warm up.

    Calls take turns, so that a busy moment of the machine hits all of them and the large ones clear the caches for the
    next. On a GPU the L2 cache is cleared by writing 256 MiB between two calls, and the device is kept busy while the
    host prepares the call: what counts is the device's time, from an idle start of its kernels on.
    """
    took: dict[str, list[float]] = {name: [] for name in calls}
    flush = torch.empty(1 << 26, device=device) if device.type == "cuda" else None
    for number in range(count + 1):
        for name, call in calls.items():
            seconds = _seconds_on_gpu(call, flush) if flush is not None else _seconds(call)
            if number:
                took[name].append(seconds)
    return took


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


_BUSY_CYCLES = 4_000_000
"""About 2 ms, which the host does not need for any call that is timed here."""


def _seconds_on_gpu(call: Callable[[], Any], flush: torch.Tensor) -> float:
    flush.zero_()
    torch.cuda._sleep(_BUSY_CYCLES)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def machine(device: torch.device) -> dict[str, str]:
    """Hardware and versions, as columns of a CSV row."""
    from lota.kernels import backend_name

    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{_processor()}, {torch.get_num_threads()} threads"
    return {
        "hardware": hardware,
        "kernels": backend_name(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "deepspeed": _version("deepspeed"),
        "python": platform.python_version(),
    }


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
