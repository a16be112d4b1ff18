"""The planner's figures for the configurations: each fits its node of 8 GPUs, and their page says what they need."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen3Config

from lota import plan
from lota.selection import eligible
from tests.recipes.test_configs import FILES, FOLDER, MODELS, ROOT, options

# What the models' own config.json says, as far as shapes depend on it: the hub is not asked.
WIDE = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama31_8b": LlamaConfig(**WIDE, num_hidden_layers=32, intermediate_size=14336, vocab_size=128256),
    "mistral_7b": MistralConfig(**WIDE, num_hidden_layers=32, intermediate_size=14336, vocab_size=32000),
    "qwen3_8b": Qwen3Config(**WIDE, num_hidden_layers=36, intermediate_size=12288, vocab_size=151936),
}
GPU_BYTES = 80 * 10**9


@pytest.fixture(scope="module")
def shapes() -> dict[str, plan.ModelShapes]:
    return {stem: plan.shapes_of_config(config, MODELS[stem]) for stem, config in CONFIGS.items()}


def plans(model: plan.ModelShapes, density: float, score: str, layout: plan.RankLayout) -> list[plan.MethodPlan]:
    """Full fine-tuning, the calibration of `score`, that of gradients, and sparse training."""
    names = eligible(model.shapes)
    return [
        plan.full(model, layout),
        plan.calibration(model, layout, names, score),
        plan.calibration(model, layout, names, "gradient"),
        plan.lota(model, layout, plan.MaskCounts.even(model, names, density, layout.shard_size)),
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_phase_fits_and_sparse_training_holds_the_least(
    path: Path, shapes: dict[str, plan.ModelShapes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    args, config, _ = options(path)
    assert args.density is not None and args.score is not None
    model = shapes[next(stem for stem in MODELS if path.stem.startswith(stem))]
    layout = plan.RankLayout(
        ranks=8,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    full, calibration, _, sparse = plans(model, args.density, args.score, layout)
    # Half of the GPU is left to activations.
    assert sparse.peak < calibration.peak < full.peak < GPU_BYTES / 2


def test_the_page_of_the_configurations_has_the_planners_figures(shapes: dict[str, plan.ModelShapes]) -> None:
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    for model in shapes.values():
        figures = plans(model, 0.1, "task_vector", plan.RankLayout(ranks=8, gradient_checkpointing=True))
        cells = [f"{model.numel() / 1e9:.2f}e9", *(f"{one.peak / 1e9:.1f}" for one in figures)]
        row = " | ".join([f"| {model.name}", *cells, f"{figures[-1].product / 1e9:.1f} |"])
        assert row in page, row
