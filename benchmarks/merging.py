"""lota merge beside mergekit on the same fine-tunes: differing entries, peak memory, seconds.

    python -m venv mk && mk/bin/pip install "torch<2.14" mergekit==0.1.5
    python -m benchmarks.merging --mergekit mk/bin/mergekit-yaml --output FOLDER [--hidden 512] [--layers 8]
    python -m benchmarks.merging --output FOLDER --tickets 10 --density 0.01 --hidden 2048 --layers 16   # ours alone

mergekit merges whole fp32 models, into each of which one ticket was applied; lota merges the tickets and applies the
result. Both write a model, and the two models are compared entry by entry.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from lota.algebra import ModelTensors
from lota.algebra.models import identity
from lota.delivery.rewrite import changed_positions
from lota.ticket import Mask, Ticket

METHODS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "sum": (["--method", "sum"], {"merge_method": "task_arithmetic", "parameters": {"normalize": False}}),
    "linear": (["--method", "linear"], {"merge_method": "linear"}),
    "ties": (["--method", "ties", "--density", "0.02"], {"merge_method": "ties", "parameters": {"density": 0.02}}),
}


def make(folder: Path, args: argparse.Namespace) -> None:
    """A base, and tickets on it as fine-tunes at a small rate leave them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    dtype = torch.float32 if args.mergekit else torch.bfloat16
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=args.hidden,
        intermediate_size=int(args.hidden * 2.75) // 16 * 16,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder / "base")
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    names = [name for name in parameters if "proj" in name]
    known = {name: found for name, parameter in parameters.items() if (found := identity(parameter))}
    for number in range(args.tickets):
        generator = torch.Generator().manual_seed(number)
        chosen, values, before = {}, {}, {}
        for name in names:
            flat = parameters[name].reshape(-1)
            where = (torch.rand(flat.shape, generator=generator) < args.density).nonzero().squeeze(1)
            chosen[name] = tuple(parameters[name].shape), where
            before[name] = flat[where]
            values[name] = (before[name].float() + 1e-3 * torch.randn(where.shape, generator=generator)).to(dtype)
        mask = Mask.from_indices(chosen).with_base(
            {name: known[name] for name in names}, {n: base for n, base in known.items() if n not in names}
        )
        Ticket(mask, values, before).save(folder / f"ticket{number}")


def measured(command: list[str]) -> tuple[float, float]:
    """Seconds and peak memory (GB) of a command, which must end well."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[3:6])} ended with {process.returncode}: {output[-1500:]}")
    return time.monotonic() - started, float(output.rsplit("PEAK ", 1)[1].split()[0]) / 2**20


def timed(command: list[str]) -> list[str]:
    """The command, under a Python that says its children's peak memory at the end."""
    code = (
        "import resource, subprocess, sys; status = subprocess.run(sys.argv[1:]).returncode; "
        "print('PEAK', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(status)"
    )
    return [sys.executable, "-c", code, *command]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--mergekit", type=Path, help="mergekit-yaml of another environment")
    parser.add_argument("--tickets", type=int, default=3)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    args = parser.parse_args(argv)
    folder = args.output
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make(folder, args)
    lota = [sys.executable, "-m", "lota"]
    tickets = [str(folder / f"ticket{number}") for number in range(args.tickets)]
    rows = []
    for method, (words, recipe) in METHODS.items() if args.mergekit else (("sum", METHODS["sum"]),):
        seconds, peak = measured(timed([*lota, "merge", *tickets, *words, "--out", str(folder / f"{method}-ticket")]))
        row: dict[str, Any] = {"method": method, "lota merge, s": seconds, "lota merge, GB": peak}
        if args.mergekit:
            seconds, peak = measured(
                timed([*lota, "apply", "--base", str(folder / "base"), str(folder / f"{method}-ticket"), "--out",
                       str(folder / f"{method}-lota")])
            )  # fmt: skip
            row |= {"lota apply, s": seconds, "lota apply, GB": peak}
            row |= mergekit(args, folder, method, recipe, tickets, lota)
        rows.append(row)
        print({key: f"{v:.4g}" if isinstance(v, float) else v for key, v in row.items()}, flush=True)
    (folder / "merging.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


def mergekit(
    args: argparse.Namespace, folder: Path, method: str, recipe: dict[str, Any], tickets: list[str], lota: list[str]
) -> dict[str, Any]:
    """mergekit's model of the same fine-tunes, and how it differs from ours."""
    models = []
    for number, ticket in enumerate(tickets):
        applied = folder / f"applied{number}"
        if not applied.exists():
            subprocess.run([*lota, "apply", "--base", str(folder / "base"), ticket, "--out", str(applied)], check=True,
                           capture_output=True)  # fmt: skip
        models.append({"model": str(applied), "parameters": {"weight": 1.0}})
    content = {**recipe, "models": models, "dtype": "float32"}
    if method != "linear":
        content["base_model"] = str(folder / "base")
    (folder / f"{method}.yaml").write_text(json.dumps(content), encoding="utf-8")
    command = [str(args.mergekit), str(folder / f"{method}.yaml"), str(folder / f"{method}-mergekit")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    os.environ.clear()
    os.environ.update(environment)
    seconds, peak = measured(timed(command))
    ours, theirs = (ModelTensors(folder / f"{method}-{who}") for who in ("lota", "mergekit"))
    differing = numel = 0
    largest = 0.0
    for name in ours.names:
        one, other = ours.read(name), theirs.read(name)
        where = changed_positions(one, other)
        numel, differing = numel + one.numel(), differing + where.numel()
        if where.numel():
            largest = max(largest, float((one.reshape(-1)[where] - other.reshape(-1)[where]).abs().max()))
    return {
        "mergekit, s": seconds, "mergekit, GB": peak, "entries": numel, "differing": differing, "largest": largest,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
