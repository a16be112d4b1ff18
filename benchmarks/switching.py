"""Switching tickets on a live weight beside PEFT's LoRA and SHiRA: milliseconds, and what is left of the base.

    OMP_NUM_THREADS=1 python -m benchmarks.switching

1% of a 4096x4096 bf16 weight. Rivals merge and unmerge into the same linear module; the drift is the share of all
entries whose bits are no longer the base's after `--rounds` rounds of on and off.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import lota
from lota.ticket import BaseTensor, Mask, Ticket, fingerprint, to_hex

SIZE = 4096


def make_ticket(weight: torch.Tensor, density: float, seed: int) -> Ticket:
    generator = torch.Generator().manual_seed(seed)
    flat = weight.detach().view(-1)
    where = (torch.rand(flat.shape, generator=generator) < density).nonzero().squeeze(1)
    mask = Mask.from_indices(
        {"weight": (tuple(weight.shape), where)}, {"weight": BaseTensor("bfloat16", to_hex(fingerprint(flat)))}
    )
    before = flat[where]
    values = (before.float() + 1e-3 * torch.randn(where.shape, generator=generator)).bfloat16()
    return Ticket(mask, {"weight": values}, {"weight": before})


def median_ms(work: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def rival(kind: str, base: torch.Tensor, rounds: int) -> tuple[float, float]:
    """Milliseconds of a merge and an unmerge, and the share of entries that differ from the base afterwards."""
    from peft import LoraConfig, ShiraConfig, get_peft_model

    holder = nn.Module()
    holder.layer = nn.Linear(SIZE, SIZE, bias=False, dtype=torch.bfloat16)
    holder.layer.weight.data.copy_(base)
    config = (
        LoraConfig(r=16, target_modules=["layer"]) if kind == "LoRA" else ShiraConfig(r=82, target_modules=["layer"])
    )
    model = get_peft_model(holder, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "shira" in name:
                parameter.normal_(0, 1e-3)
    layer: Any = model.base_model.model.layer

    def switch() -> None:
        layer.merge()
        layer.unmerge()

    taken = median_ms(switch, rounds) / 2
    now = layer.get_base_layer().weight.detach()
    return taken, float((now.view(torch.int16) != base.view(torch.int16)).float().mean())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--density", type=float, default=0.01)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    model = nn.Linear(SIZE, SIZE, bias=False, dtype=torch.bfloat16)
    base = model.weight.detach().clone()
    a, b = (make_ticket(model.weight, args.density, seed) for seed in (1, 2))
    switcher = lota.TicketSwitcher(model, {"a": a, "b": b}, rule="last")
    rows = []
    names = iter("ab" * 1000)
    rows.append(("TicketSwitcher, one ticket for another", median_ms(lambda: switcher.to(next(names)), args.rounds)))
    rows.append(
        ("TicketSwitcher, off and on", median_ms(lambda: (switcher.to(None), switcher.to("a")), args.rounds) / 2)
    )
    switcher.to(None)
    drift = float((model.weight.detach().view(torch.int16) != base.view(torch.int16)).float().mean())
    applied = lota.apply_(model, a)
    held = [applied]

    def exchange(verify: bool) -> None:
        held[0] = lota.exchange_(model, held[0], b if len(held) % 2 else a, verify=verify)

    rows.append(("exchange_, not verified", median_ms(lambda: exchange(False), args.rounds)))
    rows.append(("exchange_, verified", median_ms(lambda: exchange(True), max(3, args.rounds // 4))))
    held[0].revert()
    for what, taken in rows:
        print(f"{what:42}{taken:9.2f} ms")
    print(f"{'':42}drift after all of it {drift:.1%}, exact {bool(torch.equal(model.weight.detach(), base))}")
    for kind in ("LoRA", "SHiRA"):
        taken, drift = rival(kind, base, args.rounds)
        print(
            f"{'PEFT ' + kind + ', merge or unmerge':42}{taken:9.2f} ms, drift after {args.rounds} rounds {drift:.1%}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
