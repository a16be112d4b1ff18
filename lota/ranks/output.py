"""A rank that was asked to stop saves its checkpoint, though its launcher, which read its output, is gone.

A launcher over ssh that is asked to stop ends first, and then its ranks are. Their first line after that would fail.
"""

from __future__ import annotations

import os
import sys
from typing import Any


class _Outliving:
    """A text stream that goes quiet when nobody reads it any more."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except BrokenPipeError:
            self._go_quiet()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._go_quiet()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _go_quiet(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def outlive_readers() -> None:
    """From here on writing to stdout and stderr does not fail when the other end of the pipe is closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, _Outliving):
            setattr(sys, name, _Outliving(stream))
