"""Errors that one rank meets are raised on all of them: a rank that never heard would wait in the next collective."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


@contextmanager
def together() -> Iterator[None]:
    """Run the block, which must not communicate, on every rank; an error of any rank is raised on all. Collective.

    A rank without an error of its own raises that of the lowest rank that has one. Anything but a ValueError, TypeError
    or OSError travels as a RuntimeError that quotes it.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # noqa: BLE001 (raised on every rank)
        error = caught
    raise_together(error)


def raise_together(error: Exception | None) -> None:
    """Raise on every rank what any rank brings; returns where none brings anything. Collective."""
    shown: Any = None if error is None else (error if _can_travel(error) else RuntimeError(repr(error)))
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, shown)
    if error is not None:
        raise error
    for other in errors:
        if other is not None:
            raise other


def _can_travel(error: Exception) -> bool:
    return isinstance(error, (ValueError, TypeError, OSError)) and type(error).__module__ == "builtins"
