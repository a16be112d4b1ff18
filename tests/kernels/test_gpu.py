"""On a GPU: steps can be captured in a graph, kernels are clean under the memory checker, and ZeRO-3 runs on them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import lota
from lota.kernels import (
    TILE,
    Pull,
    TileIndex,
    adamw_,
    adamw_scalars,
    gather,
    padded_zeros,
    pull_rate,
    rounding_key,
    using,
)
from lota.optim import MaskedAdamW
from tests.no_sync import NoSync
from tests.zero import cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
ROOT = Path(__file__).resolve().parents[2]


def test_a_step_can_be_captured_in_a_graph():
    """Three replays equal three calls, bit for bit: the step count, all scalars, the key of the stochastic rounding
    and what the pull needs live on the device."""
    count, numel = 3 * TILE + 5, 20_000
    generator = torch.Generator("cuda").manual_seed(0)
    positions = torch.randperm(numel, generator=generator, device="cuda")[:count].sort().values
    index = TileIndex.from_flat(positions, numel)
    start = torch.randn(numel, generator=generator, device="cuda").bfloat16()
    gradient = padded_zeros(index)
    gradient[:count] = torch.randn(count, generator=generator, device="cuda")
    old, importance = (padded_zeros(index, torch.bfloat16) for _ in range(2))
    gather(start, index, out=old[:count])
    importance[:count] = torch.rand(count, generator=generator, device="cuda")
    one, never = torch.ones((), device="cuda"), torch.zeros((), device="cuda")

    def make():
        weights, state = start.clone(), [padded_zeros(index) for _ in range(3)]
        gather(weights, index, out=state[0][:count])
        return weights, *state, torch.zeros((), dtype=torch.float64, device="cuda")

    def step(weights, master, exp_avg, exp_avg_sq, number):
        number.add_(1)
        scalars = adamw_scalars(one, never, number, lr=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.99)
        options = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "rounding": rounding_key(3, number)}
        options["pull"] = Pull(old, importance, pull_rate(weights.device, lr=1e-3, mu=500.0))
        adamw_(weights, gradient, index, master, exp_avg, exp_avg_sq, scalars, **options)

    with using("triton", "cuda"):
        called = make()
        for _ in range(3):
            step(*called)
        replayed = make()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(*replayed)
        for tensor, fresh in zip(replayed, make(), strict=True):
            tensor.copy_(fresh)
        for _ in range(3):
            graph.replay()
    for one_tensor, other in zip(called, replayed, strict=True):
        assert torch.equal(one_tensor, other)


def test_a_step_never_asks_the_device():
    model = cases.make_model(torch.bfloat16).cuda()
    optimizer = MaskedAdamW(model, lota.Mask.from_dense(cases.make_masks()), max_norm=1.0, rounding_seed=5)
    ((x, flags, target),) = cases.micro_batches(1, 1)
    for number in range(2):
        loss = F.cross_entropy(model(x.cuda().bfloat16(), flags.cuda()).float(), target.cuda())
        loss.backward()
        if number == 0:
            optimizer.step()  # makes the state
            continue
        torch.cuda.set_sync_debug_mode("error")
        try:
            with NoSync():
                optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


CHECKED = "(gather_scatter or adamw or rmsprop or pull) and (1025 or 1023)"


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
def test_kernels_are_clean_under_the_memory_checker(tmp_path):
    """torch's allocator hands out pieces of large blocks; without it every access out of bounds is seen."""
    files = [f"tests/kernels/test_{name}.py" for name in ("ops", "step_is_exact", "rounding")]
    command = ["compute-sanitizer", "--error-exitcode", "7", sys.executable, "-m", "pytest", "-q", "-m", "triton"]
    run = subprocess.run(
        [*command, "-k", CHECKED, *files, "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'child'}"],
        cwd=ROOT,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


ZERO3 = """
import sys
import torch
import deepspeed
from torch.nn import functional as F
import lota
from tests.zero import cases

deepspeed.init_distributed("nccl")
after = {}
for kernels in ("triton", "torch"):
    model = cases.make_model(torch.bfloat16).cuda()
    with lota.sparse_zero3(lota.Mask.from_dense(cases.make_masks()), kernels=kernels) as run:
        config = cases.config(1, 1, bf16={"enabled": True})
        engine, *_ = deepspeed.initialize(model=model, optimizer=cases.default_optimizer(model), config=config)
        for step in range(1, 6):
            ((x, flags, target),) = cases.micro_batches(step, 1)
            logits = engine(x.cuda().bfloat16(), flags.cuda())
            engine.backward(F.cross_entropy(logits.float(), target.cuda()))
            engine.step()
        assert run.report()["kernels"] == kernels, run.report()
        after[kernels] = {name: weight.cpu() for name, weight in cases.gathered(engine.module).items()}
        run.save_ticket(f"{sys.argv[1]}/{kernels}")
        engine.destroy()
for name, weight in after["triton"].items():
    assert torch.equal(weight, after["torch"][name]), name
print("same bits")
"""


def test_zero3_with_one_process_on_nccl(tmp_path):
    """Triton and plain torch train the same bits, and the tickets vouch that nothing frozen moved."""
    where = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
    run = subprocess.run(
        [sys.executable, "-c", ZERO3, str(tmp_path)], cwd=ROOT, env=os.environ | where, capture_output=True, text=True
    )
    assert run.returncode == 0 and "same bits" in run.stdout, run.stdout[-3000:] + run.stderr[-5000:]
    assert lota.Ticket.load(tmp_path / "triton").num_active == lota.Mask.from_dense(cases.make_masks()).num_active
