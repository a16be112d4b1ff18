"""Every kernel test runs once per backend: plain torch, what `auto` takes on this CPU, and Triton."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lota.kernels import using


@pytest.fixture(params=["torch", "auto", pytest.param("triton", marks=pytest.mark.triton)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where the test's tensors go: a GPU for Triton, if there is one, else the CPU (for Triton, its interpreter)."""
    on_gpu = request.param == "triton" and torch.cuda.is_available()
    place = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    with using(request.param, place):
        yield place
