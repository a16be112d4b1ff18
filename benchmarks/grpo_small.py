"""Training on a reward: full fine-tuning, LoRA and a ticket of 10% beside each other, three seeds, on a small model.

    python benchmarks/grpo_small.py --output runs/grpo-small

The base is the tests' random Llama of 18 thousand weights, whose answers are random words. The reward is the share of
an answer's words that name an animal: a program checks it, and every token counts, so that a few steps show whether a
method learns at all. Each method has one learning rate. Rewards before and after are of 32 prompts that are not trained
on, 8 answers each, at temperature 1. One rank, bf16. What is done already is not done again.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks run from the checkout

import deepspeed
import torch
import trl
from accelerate.state import AcceleratorState

import lota
from lota.train.job import main_grpo
from tests.zero.trainers import make_base

ROOT = Path(__file__).resolve().parents[1]
CONFIG_PATH = ROOT / "recipes" / "configs" / "grpo_small.yaml"
NUM_TEST = 32
RATES = {"lota": 1e-2, "full": 3e-3, "lora": 1e-2}
SEEDS = (0, 1, 2)
NAMES = {"full": "full fine-tuning", "lora": "LoRA, rank 16", "lota": "ticket, 10%"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/grpo-small"))
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    base = make_base(output / "base")
    lines = (base / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (output / "test.jsonl").write_text("".join(lines[:NUM_TEST]), encoding="utf-8")
    (output / "train.jsonl").write_text("".join(lines[NUM_TEST:]), encoding="utf-8")
    found: dict[str, list[dict[str, float]]] = {}
    for method, rate in RATES.items():
        runs = [run(output, base, method, rate, seed) for seed in SEEDS]
        found[method] = [{**facts, "rate": rate} for facts in runs]
    print(table(found))


def run(output: Path, base: Path, method: str, rate: float, seed: int) -> dict[str, float]:
    """The figures of one run's summary.json."""
    folder = output / f"{method}-{rate:g}-{seed}"
    if not (folder / "summary.json").is_file():
        files = {
            "config": CONFIG_PATH,
            "method": method,
            "model_name_or_path": base,
            "train_file": output / "train.jsonl",
            "eval_file": output / "test.jsonl",
            "output_dir": folder,
            "seed": seed,
            "learning_rate": f"{rate:g}",
        }
        main_grpo([word for name, value in files.items() for word in (f"--{name}", str(value))])
        AcceleratorState._reset_state(True)  # the next run has a configuration of its own
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    facts = summary["training"]
    held = sum(facts["report"]["bytes_held"].values())
    print(
        f"{method}, rate {rate:g}, seed {seed}: reward {facts['eval_reward_before']:.3f} -> {facts['eval_reward']:.3f}"
        f" ({facts['seconds']:.0f} s)",
        flush=True,
    )
    return {**{name: facts[name] for name in ("eval_reward_before", "eval_reward", "reward_at_end")}, "held": held}


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Mean and range over the seeds."""
    lines = [
        f"lota {lota.__version__}, torch {torch.__version__}, DeepSpeed {deepspeed.__version__}, "
        f"TRL {trl.__version__}, {platform.machine()}",
        "",
        "| method | learning rate | reward before | reward after, mean of three seeds (lowest to highest) | held |",
        "|---|---|---|---|---|",
    ]
    for method, runs in found.items():
        before = statistics.mean(facts["eval_reward_before"] for facts in runs)
        after = [facts["eval_reward"] for facts in runs]
        lines.append(
            f"| {NAMES[method]} | {runs[0]['rate']:g} | {before:.3f} | {statistics.mean(after):.3f} "
            f"({min(after):.3f} to {max(after):.3f}) | {runs[0]['held'] / 2**20:.1f} MiB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
