"""Training on a reward: full fine-tuning, LoRA and a ticket of 10% beside each other, three seeds, on a small model.

    python benchmarks/grpo_small.py --output runs/grpo-small

The base is a Llama of 0.2M weights, pretrained on the demo's world for so few steps that it often answers in the wrong
language. The reward is the share of an answer's words that are in the dictionary of the language that was asked for: a
program checks it. Each method has one learning rate. Rewards before and after are of 32 prompts that are not trained
on, 8 answers each, at temperature 1. One rank, bf16. What is done already is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks run from the checkout

import deepspeed
import torch
import trl

import lota
from lota.demo.base import prepare
from lota.demo.small_model import SmallModelConfig
from lota.demo.world import EARLIER_TEMPLATES, World, WorldConfig, fill

ROOT = Path(__file__).resolve().parents[1]
CONFIG_PATH = ROOT / "recipes" / "configs" / "grpo_small.yaml"
BASE = SmallModelConfig(hidden_size=96, num_layers=2, steps=40)
NUM_ROWS = {"train": 1024, "test": 32}
RATES = {"full": (1e-4,), "lora": (1e-3,), "lota": (1e-3,)}
SEEDS = (0, 1, 2)
NAMES = {"full": "full fine-tuning", "lora": "LoRA, rank 16", "lota": "ticket, 10%"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/grpo-small"))
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    folder = prepare(WorldConfig(), BASE, lambda text: print(text, flush=True))
    for name, count in NUM_ROWS.items():
        write_rows(output / f"{name}.jsonl", name, count)
    found: dict[str, list[dict[str, float]]] = {}
    for method, rates in RATES.items():
        tried = {rate: run(output, folder / "model", method, rate, SEEDS[0]) for rate in rates}
        best = max(tried, key=lambda rate: tried[rate]["reward_at_end"])
        rest = [run(output, folder / "model", method, best, seed) for seed in SEEDS[1:]]
        found[method] = [{**facts, "rate": best} for facts in (tried[best], *rest)]
    print(table(found))


def write_rows(path: Path, stream: str, count: int) -> None:
    """The prompt, and beside it all words of the language, which only the reward sees."""
    world = World(WorldConfig())
    dictionary = " ".join(world.selan.values())
    rows = fill(EARLIER_TEMPLATES, world.earlier_rows(f"reward {stream}", count))
    made = [{"prompt": row["prompt"], "dictionary": dictionary} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")


def run(output: Path, base: Path, method: str, rate: float, seed: int) -> dict[str, float]:
    """The figures of one run's summary.json."""
    folder = output / f"{method}-{rate:g}-{seed}"
    if not (folder / "summary.json").is_file():
        command = [
            *(sys.executable, "-m", "lota", "grpo", "--config", str(CONFIG_PATH), "--method", method),
            *("--model_name_or_path", str(base), "--train_file", str(output / "train.jsonl")),
            *("--eval_file", str(output / "test.jsonl"), "--output_dir", str(folder), "--seed", str(seed)),
            *("--learning_rate", f"{rate:g}"),
        ]
        with open(output / f"{folder.name}.log", "w", encoding="utf-8") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment)
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
