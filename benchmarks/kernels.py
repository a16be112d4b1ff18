"""Every operation at densities 50, 10, 1 and 0.1% against torch, with the byte floor, in one run.

    python -m benchmarks.kernels                      # CPU: 50M weights (make bench)
    python -m benchmarks.kernels --device cuda        # GPU: a layer of an 8B model, and an eighth of the model

The floor of an operation is its bytes over the copy bandwidth measured in the same run: compact values once each way,
plus every cache line (64 bytes; sectors of 32 on a GPU) that an active entry lies in, counted on the positions at hand.
Results are compared with plain torch first, at the same shapes; a wrong one ends the run without a figure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import machine, median, rounds, write_csv
from lota.kernels import (
    Pull,
    TileIndex,
    adamw_,
    exchange_,
    gather,
    gather_add_,
    mask_op,
    padded_zeros,
    popcount,
    pull_,
    rmsprop_,
    rounding_key,
    scatter_,
    scatter_add_,
    using,
)

# Weights of one layer of Llama 3.1 8B (attention and MLP), and an eighth of all 32 of them: one partition of 8.
LAYER, PARTITION = 218_103_808, 872_415_232
COPIED = 1 << 28  # bytes of the copy that measures the bandwidth, among the other calls
DENSITIES = (0.5, 0.1, 0.01, 0.001)
ADAMW = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
LR, WEIGHT_DECAY = 1e-3, 0.01


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--numel", type=int, nargs="*", help="weights; default 50 million, on a GPU a layer, a partition"
    )
    parser.add_argument("--rounds", type=int, default=0, help="default 15, on a GPU 50")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="time operations whose name begins so, beside torch's fused AdamW")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/kernels.csv"))
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a GPU, and torch sees none")
    torch.set_num_threads(options.threads)
    is_cpu = device.type == "cpu"
    where = machine(device)
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    rows: list[dict[str, Any]] = []
    for numel in options.numel or ([50_000_000] if is_cpu else [LAYER, PARTITION]):
        count = options.rounds or (15 if is_cpu else 50)
        for row in measure(numel, count, device, options.only):
            rows.append(row | where)
            _show(row)
    write_csv(options.out, rows)
    print(f"\nwritten: {options.out}")
    _show_summary(rows)
    return 0


def measure(numel: int, count: int, device: torch.device, only: str) -> Iterator[dict[str, Any]]:
    source = torch.ones(COPIED // 4, device=device)
    dense = {"copy": partial(torch.empty_like(source).copy_, source), **dict(dense_steps(numel, device))}
    for density in DENSITIES:
        case = Case(numel, density, device)
        case.check()
        kept = ("copy", "dense torch.optim.AdamW(fused)")
        calls = {name: call for name, call in {**dense, **case.calls()}.items() if name.startswith((only, *kept))}
        took = rounds(calls, count, device)
        base = min(took["dense torch.optim.AdamW(fused)"])
        bandwidth = 2 * COPIED / min(took["copy"])
        for name, values in took.items():
            floor = case.floor_bytes(name) / bandwidth
            yield {
                "numel": numel,
                "density": density,
                "operation": name,
                "min_ms": round(min(values) * 1e3, 4),
                "median_ms": round(median(values) * 1e3, 4),
                "of_dense_fused": round(min(values) / base, 4),
                "median_of_dense_fused": round(median(values) / median(took["dense torch.optim.AdamW(fused)"]), 4),
                "floor_ms": round(floor * 1e3, 4),
                "of_floor": round(floor / min(values), 3) if floor else "",
                "copy_gb_per_s": round(bandwidth / 1e9, 1),
                "index_bits": 8 * case.index.offset.element_size(),
                "rounds": count,
            }


def dense_steps(numel: int, device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Rivals that train every weight: fp32 weights, gradients and moments."""
    for kind in ("fused", "foreach"):
        parameter = torch.nn.Parameter(torch.randn(numel, device=device))
        parameter.grad = torch.randn(numel, device=device)
        optimizer = torch.optim.AdamW([parameter], lr=LR, weight_decay=WEIGHT_DECAY, **{kind: True})
        yield f"dense torch.optim.AdamW({kind})", optimizer.step
    deepspeed_step = _deepspeed_adam(numel, device)
    if deepspeed_step is not None:
        yield deepspeed_step


def _deepspeed_adam(numel: int, device: torch.device) -> tuple[str, Callable[[], Any]] | None:
    name = "FusedAdam" if device.type == "cuda" else "DeepSpeedCPUAdam"
    try:
        from deepspeed.ops import adam

        parameter = torch.nn.Parameter(torch.randn(numel, device=device))
        parameter.grad = torch.randn(numel, device=device)
        optimizer = getattr(adam, name)([parameter], lr=LR, weight_decay=WEIGHT_DECAY)
        optimizer.step()
    except (ImportError, RuntimeError, AttributeError, OSError, AssertionError) as error:
        print(f"{name} is left out: it does not build here ({str(error).splitlines()[0][:100]})")
        return None
    return f"dense deepspeed {name}", optimizer.step


class Case:
    """Tensors of one density, and calls on them."""

    def __init__(self, numel: int, density: float, device: torch.device) -> None:
        self.device, self.density = device, density
        generator = torch.Generator(device).manual_seed(0)
        pieces = [
            torch.rand(min(1 << 24, numel - start), generator=generator, device=device).lt(density).nonzero().flatten()
            + start
            for start in range(0, numel, 1 << 24)
        ]
        self.positions = torch.cat(pieces)
        self.index = TileIndex.from_flat(self.positions, numel)
        self.weights = torch.randn(numel, generator=generator, device=device).bfloat16()
        self.gradient = torch.randn(numel, generator=generator, device=device).bfloat16()
        self.state = [padded_zeros(self.index) for _ in range(3)]
        self.values = padded_zeros(self.index, torch.bfloat16)
        self.compact = padded_zeros(self.index)
        gather(self.weights, self.index, out=self._active(self.state[0]))
        gather(self.gradient, self.index, out=self._active(self.compact))
        old, importance = (padded_zeros(self.index, torch.bfloat16) for _ in range(2))
        gather(self.weights, self.index, out=self._active(old))
        self._active(importance).uniform_(0, 2, generator=generator)
        self.pull = Pull(old, importance, torch.full((), 1e-2, device=device))
        decay, root = 1 - LR * WEIGHT_DECAY, (1 - ADAMW["beta2"]) ** 0.5
        self.scalars = torch.tensor([1.0, decay, LR / (1 - ADAMW["beta1"]), root, 0.0], device=device)
        self.words = [
            torch.randint(-(2**31), 2**31, (numel // 32,), generator=generator, device=device, dtype=torch.int64).int()
            for _ in range(2)
        ]

    def _active(self, compact: Tensor) -> Tensor:
        return compact[: self.index.num_active]

    def check(self) -> None:
        """The step, gather and exchange at these shapes give plain torch's bits; SystemExit otherwise."""
        results = []
        for choice in ("torch", "auto"):
            weights, state, values = self.weights.clone(), [t.clone() for t in self.state], self.values.clone()
            with using(choice):
                for gradient, is_compact in ((self.compact, True), (self.gradient, False)):
                    adamw_(weights, gradient, self.index, *state, self.scalars, **ADAMW, compact=is_compact)
                key = rounding_key(0, torch.ones((), device=self.device))
                adamw_(weights, self.compact, self.index, *state, self.scalars, **ADAMW, rounding=key)
                adamw_(weights, self.compact, self.index, *state, self.scalars, **ADAMW, pull=self.pull)
                pull_(state[0], self.pull)
                summed = gather_add_(self._active(self.compact.clone()), self.gradient, self.index)
                exchange_(weights, self.index, values)
            results.append([weights, *state, values, summed])
        if not all(torch.equal(one, other) for one, other in zip(*results, strict=True)):
            raise SystemExit("results differ from plain torch's: no figures while they are wrong")

    def calls(self) -> dict[str, Callable[[], Any]]:
        index, weights, gradient, compact = self.index, self.weights, self.gradient, self.compact
        active, values = self._active(compact), self._active(self.values)
        rms = torch.tensor([1.0, WEIGHT_DECAY, LR, 0.0], device=self.device)
        step = partial(adamw_, weights, index=index, scalars=self.scalars, **ADAMW)
        state = dict(zip(("master", "exp_avg", "exp_avg_sq"), self.state, strict=True))
        alpha = torch.zeros((), device=self.device)
        key = rounding_key(0, torch.ones((), device=self.device))
        squares = torch.empty(index.base.numel(), device=self.device)
        return {
            "adamw_": partial(step, compact, **state),
            "adamw_, dense gradient": partial(step, gradient, **state, compact=False),
            "adamw_, stochastic rounding": partial(step, compact, **state, rounding=key),
            "adamw_, pull": partial(step, compact, **state, pull=self.pull),
            "pull_": partial(pull_, self.state[0], self.pull),
            "three launches": self.three_launches,
            "rmsprop_": partial(
                rmsprop_, weights, compact, index, self.state[0], self.state[2], rms, alpha=0.99, eps=1e-8
            ),
            "gather": partial(gather, gradient, index, out=active),
            "torch index_select": partial(torch.index_select, gradient, 0, self.positions),
            "gather_add_": partial(gather_add_, active, gradient, index),
            "gather_add_, squares": partial(gather_add_, active, gradient, index, squares=squares),
            "scatter_": partial(scatter_, weights, index, values),
            "torch index_copy_": partial(weights.index_copy_, 0, self.positions, values),
            "exchange_": partial(exchange_, weights, index, values),
            "scatter_add_": partial(scatter_add_, weights, index, active, alpha=alpha, saved=values),
            "mask_op": partial(mask_op, *self.words, "andnot"),
            "popcount": partial(popcount, self.words[0]),
        }

    def three_launches(self) -> None:
        """What torch alone offers: read, torch's fused AdamW on compact tensors, write."""
        master, exp_avg, exp_avg_sq = map(self._active, self.state)
        gradient = self.gradient.index_select(0, self.positions).float()
        step = torch.ones((), device=self.device)
        torch._fused_adamw_(
            [master],
            [gradient],
            [exp_avg],
            [exp_avg_sq],
            [],
            [step],
            amsgrad=False,
            lr=LR,
            beta1=ADAMW["beta1"],
            beta2=ADAMW["beta2"],
            weight_decay=WEIGHT_DECAY,
            eps=ADAMW["eps"],
            maximize=False,
        )
        self.weights.index_copy_(0, self.positions, master.bfloat16())

    def floor_bytes(self, name: str) -> float:
        """Bytes that `name` has to move; 0 where that is not counted."""
        line = 32 if self.device.type == "cuda" else 64
        lines = (self.positions * 2 // line).unique_consecutive().numel() * line
        active, index, numel = self.index.num_active, self.index.nbytes, self.index.numel
        if name == "copy":
            return 2.0 * COPIED
        if name.startswith("dense"):
            return 28.0 * numel
        return {
            "adamw_": active * (4 + 24) + index + 2 * lines,
            "adamw_, dense gradient": active * 24 + index + 3 * lines,
            "adamw_, stochastic rounding": active * (4 + 24) + index + 2 * lines,
            "adamw_, pull": active * (4 + 24 + 4) + index + 2 * lines,
            "pull_": active * (8 + 4),
            "rmsprop_": active * (4 + 16) + index + 2 * lines,
            "gather": active * 4 + index + lines,
            "gather_add_": active * 8 + index + lines,
            "gather_add_, squares": active * 8 + 4 * self.index.base.numel() + index + lines,
            "scatter_": active * 2 + index + 2 * lines,
            "exchange_": active * 4 + index + 2 * lines,
            "scatter_add_": active * 6 + index + 2 * lines,
            "mask_op": 3 * numel / 8,
            "popcount": numel / 8,
        }.get(name, 0.0)


def _show(row: dict[str, Any]) -> None:
    case = f"{row['numel']:>11} {row['density']:>6.1%}  {row['operation']:<34}"
    took = f"{row['min_ms']:>9.3f} ms{row['median_ms']:>9.3f} median"
    print(f"{case}{took}{row['of_dense_fused']:>8.3f} of dense fused{row['of_floor']:>7} of the floor", flush=True)


def _show_summary(rows: list[dict[str, Any]]) -> None:
    print("\nOne optimizer step, of torch's dense fused AdamW (fastest, and median, of the rounds), and of adamw_")
    plain = {(row["numel"], row["density"]): row["min_ms"] for row in rows if row["operation"] == "adamw_"}
    for row in rows:
        if row["operation"].startswith(("adamw_", "three", "dense deepspeed")):
            base = plain.get((row["numel"], row["density"]))
            print(
                f"  {row['numel']:>11} weights {row['density']:>6.1%}  {row['operation']:<28}{row['min_ms']:>9.2f} ms"
                f"{row['of_dense_fused']:>8.3f}{row['median_of_dense_fused']:>8.3f}"
                + (f"{row['min_ms'] / base:>8.3f}" if base else "")
            )


if __name__ == "__main__":
    sys.exit(main())
