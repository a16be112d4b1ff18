"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.rank_pool import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """`ranks(n)`: a pool of n real ranks, kept for the session."""
    pools: dict[int, RankPool] = {}

    def pool(size: int) -> RankPool:
        if size not in pools or not pools[size].is_alive():
            pools[size] = RankPool(size)
        return pools[size]

    yield pool
    for made in pools.values():
        made.close()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton's tests need an accelerator, except in a process whose Triton is the interpreter."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    without_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
    for item in items:
        if "triton" in item.keywords and item.get_closest_marker("triton"):
            item.add_marker(pytest.mark.gpu)
            item.add_marker(without_gpu)
