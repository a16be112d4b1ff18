"""Draws docs/overview.svg, the README's picture, from the planner's figures: python docs/make_overview.py"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from transformers import LlamaConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout that this file belongs to

from lota import plan  # noqa: E402
from lota.selection import eligible  # noqa: E402

PATH = ROOT / "docs" / "overview.svg"
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
STEPS = (
    ("base model", "as published"),
    ("calibrate", "which weights\ndoes the task move?"),
    ("mask", "the top 10% or 1%,\nan exact number"),
    ("rewind, train", "only these weights;\nthe rest stays frozen"),
    ("ticket", "a small file: apply,\nrevert, bit for bit"),
)
COLORS = {"weights": "#9aa5b1", "training state": "#d1495b", "index": "#edae49"}


def memory() -> dict[str, dict[str, float]]:
    """GiB that one GPU holds for an 8B model, by method and kind, without activations."""
    model = plan.shapes_of_config(LlamaConfig(**LLAMA_8B), "Llama 8B")
    layout, names = plan.RankLayout(ranks=1), eligible(model.shapes)
    lora = plan.lora(model, layout, plan.LoraSettings(16, tuple(names)))
    plans = {"full fine-tuning": plan.full(model, layout), "LoRA, rank 16": lora}
    for density in (0.1, 0.01):
        counts = plan.MaskCounts.even(model, names, density, layout.shard_size)
        plans[f"lota at {density:.0%}"] = plan.lota(model, layout, counts)
    held = {}
    for name, one in plans.items():
        weights = one.device.get("weights", 0)
        index = sum(size for kind, size in one.device.items() if "index" in kind)
        held[name] = {
            "weights": weights / 2**30,
            "training state": (one.held - weights - index) / 2**30,
            "index": index / 2**30,
        }
    return held


def draw() -> None:
    """The flow above, the memory below."""
    plt.rcParams.update({"svg.hashsalt": "lota", "font.family": "DejaVu Sans", "svg.fonttype": "path"})
    figure, (flow, bars) = plt.subplots(2, 1, figsize=(10, 5.2), height_ratios=(1, 1.25))
    flow.set(xlim=(0, 10), ylim=(0, 2))
    flow.axis("off")
    for number, (title, text) in enumerate(STEPS):
        left = 0.1 + 2 * number
        color = "#edae49" if title in ("mask", "ticket") else "#e4e7eb"
        flow.add_patch(FancyBboxPatch((left, 0.35), 1.5, 1.3, boxstyle="round,pad=0.06", fc=color, ec="#52606d"))
        flow.text(left + 0.75, 1.35, title, ha="center", va="center", fontsize=11, fontweight="bold")
        flow.text(left + 0.75, 0.8, text, ha="center", va="center", fontsize=8.5)
        if number:
            arrow = FancyArrowPatch((left - 0.42, 1), (left - 0.08, 1), arrowstyle="-|>", mutation_scale=14)
            flow.add_patch(arrow)
    held = memory()
    for row, kinds in enumerate(reversed(held.values())):
        left = 0.0
        for kind, size in kinds.items():
            bars.barh(row, size, left=left, color=COLORS[kind], label=kind if row == 0 else None)
            left += size
        bars.text(left + 1, row, f"{left:.0f} GiB", va="center", fontsize=10)
    bars.set_yticks(range(len(held)), list(reversed(held)))
    bars.set_xlabel("memory of one GPU for an 8B model, bf16, without activations (GiB, planned: lota plan)")
    bars.axvline(80e9 / 2**30, color="#52606d", linestyle="--", linewidth=1)
    bars.text(80e9 / 2**30 + 0.8, len(held) - 0.45, "80 GB card", fontsize=9, va="bottom")
    bars.spines[["top", "right"]].set_visible(False)
    bars.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(PATH, metadata={"Date": None})


if __name__ == "__main__":
    draw()
    print(PATH.relative_to(ROOT))
