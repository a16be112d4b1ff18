"""Seconds and peak memory of the command line on a made-up checkpoint: apply, revert, PEFT export, inspect --verify.

    OMP_NUM_THREADS=1 python benchmarks/delivery.py --output /tmp/delivery --density 0.1

Each command is a process of its own, so its peak includes Python and torch (about 0.25 GB). Reverting is held against
the base's files byte for byte.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SIZES = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8,
    "num_attention_heads": 16, "num_key_value_heads": 4, "dtype": "bfloat16",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--only_make", action="store_true", help="stop when base and ticket are there")
    args = parser.parse_args()
    if args.only_make:
        make(args.output, args.density)
        return
    # A child's peak counts what its parent held when it was started: this process stays small.
    args.output.mkdir(parents=True)
    subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only_make"], check=True)
    base, ticket = str(args.output / "base"), str(args.output / "ticket")
    out = {name: str(args.output / name) for name in ("merged", "again", "adapter")}
    run("apply", "--base", base, ticket, "--out", out["merged"])
    run("revert", "--tuned", out["merged"], ticket, "--out", out["again"])
    run("export", ticket, "--base", base, "--format", "peft", "--out", out["adapter"])
    run("inspect", ticket, "--verify")
    for folder in ("base", "ticket", *out):
        size = sum(file.stat().st_size for file in (args.output / folder).iterdir())
        print(f"{folder:<10}{size / 1e9:.3f} GB")
    names = [file.name for file in Path(base).glob("*.safetensors")]
    same, *_ = filecmp.cmpfiles(base, out["again"], names, shallow=False)
    print(f"{len(same)} of {len(names)} reverted files equal the base's byte for byte")


def make(folder: Path, density: float) -> None:
    """A base in files of at most 400 MB, and a ticket of random entries of its projections."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from lota.ticket import BaseTensor, Mask, Ticket, fingerprint, to_hex

    def positions(size: int) -> torch.Tensor:
        return (torch.rand(size) < density).nonzero().flatten()

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), dtype=torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size="400MB")
    weights = {name: p.detach().flatten() for name, p in model.named_parameters() if "_proj" in name}
    shapes = {name: tuple(model.get_parameter(name).shape) for name in weights}
    mask = Mask.from_indices(
        ((name, shapes[name], positions(flat.numel())) for name, flat in weights.items()),
        {name: BaseTensor("bfloat16", to_hex(fingerprint(flat))) for name, flat in weights.items()},
    )
    base_values = {name: flat[mask.indices(name)] for name, flat in weights.items()}
    values = {name: (b.float() + 2e-3 * torch.randn(b.shape)).bfloat16() for name, b in base_values.items()}
    Ticket(mask, values, base_values, {"model": "made up"}).save(folder / "ticket")
    print(f"{sum(p.numel() for p in model.parameters()):,} weights, {mask.num_active:,} active entries")


def run(*argv: str) -> None:
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "lota", *argv], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        assert process.stderr is not None
        raise SystemExit(process.stderr.read().decode())
    print(f"lota {argv[0]:<10}{time.monotonic() - started:6.1f} s{usage.ru_maxrss / 1e6:7.2f} GB at most")


if __name__ == "__main__":
    main()
