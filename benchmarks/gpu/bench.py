"""What a stage works with: its device and sizes, the time it has left, and the rows that it leaves behind."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.gpu.device import Device
from benchmarks.gpu.rows import append_row, read_rows
from benchmarks.gpu.sizes import Sizes

T = TypeVar("T")


class Bench:
    """rows: where findings go (see rows.py). until: the stage's limit, of `time.monotonic()`."""

    def __init__(
        self, stage: str, device: Device, sizes: Sizes, options: dict[str, Any], rows: Path, until: float
    ) -> None:
        self.stage, self.device, self.sizes, self.options = stage, device, sizes, options
        self._rows, self._until = rows, until

    def left(self) -> float:
        """Seconds until the stage's limit."""
        return self._until - time.monotonic()

    def check(self, name: str, is_right: bool, detail: str = "") -> bool:
        """Something that is right or wrong."""
        self._write("check", name=name, is_right=bool(is_right), detail=detail)
        return bool(is_right)

    def figure(
        self,
        name: str,
        value: float,
        unit: str,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        beside: str = "",
    ) -> None:
        """Something measured, with the aim where there is one; beside: what it is to be compared with."""
        aims = {"at_least": at_least, "at_most": at_most}
        aims = {key: aim for key, aim in aims.items() if aim is not None}
        self._write("figure", name=name, value=float(f"{value:.5g}"), unit=unit, beside=beside, **aims)

    def note(self, text: str) -> None:
        self._write("note", text=text)

    def machine(self, found: dict[str, Any]) -> None:
        """What the device says of itself."""
        self._write("machine", found=found)

    def leave_out(self, name: str, why: str) -> None:
        self._write("left out", name=name, why=why)

    def attempt(self, name: str, part: Callable[[], T], *, seconds: float) -> T | None:
        """Run a part that takes about `seconds`: left out where fewer are left, and its error recorded and passed over;
        None then."""
        if self.left() < seconds:
            self.leave_out(name, f"{self.left():.0f} s were left, it takes about {seconds:.0f}")
            return None
        try:
            return part()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - recorded, and the next part is worth its time
            self.failed(name, error)
            return None

    def works(self, name: str, call: Callable[[], Any]) -> bool:
        """Whether `call` runs; its error is recorded."""
        try:
            call()
            self.device.synchronize()
        except Exception as error:  # noqa: BLE001 - recorded
            self.failed(name, error)
            return False
        return True

    def failed(self, name: str, error: BaseException) -> None:
        text = "".join(traceback.format_exception(error))
        print(text, flush=True)
        self.check(name, False, f"{type(error).__name__}: {_short(error)}")
        self._write("traceback", name=name, text=text[-4000:])

    def earlier(self, stage: str, name: str) -> float | None:
        """A figure that an earlier stage of this run measured."""
        for row in read_rows(self._rows):
            if row["stage"] == stage and row["kind"] == "figure" and row["name"] == name:
                return float(row["value"])
        return None

    def _write(self, kind: str, **values: Any) -> None:
        append_row(self._rows, {"stage": self.stage, "kind": kind, **values})


def _short(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return " | ".join(lines[:2])[:400]
