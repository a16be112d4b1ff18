"""The first lines of a run count what the recipe will really hold: DPO's reference, and the adapters that were asked
for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig

from lota.run.options import Config, PolicyConfig, PreferenceConfig, RecipeConfig, parse
from lota.run.resolve import resolve
from lota.train.print_plan import layout_of, plans_of

NUM_LAYERS, WIDTH, HIDDEN = 2, 32, 56


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    LlamaConfig(
        hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=NUM_LAYERS, num_attention_heads=2, vocab_size=64
    ).save_pretrained(folder)
    return folder


def planned(base: Path, config_class: type[Config], *argv: str, ranks: int = 1):
    words = ["--model_name_or_path", str(base), *argv]
    args, config = parse(words, config_class)
    options = resolve(args, config, argv=words)
    return plans_of(options, config, replace(layout_of(options, config), ranks=ranks))


def test_what_a_reference_holds(base: Path) -> None:
    """One more copy of the weights, where it is a model of its own."""
    for score in ("gradient", "task_vector"):
        words = ("--score", score, "--reference")
        alone = planned(base, PreferenceConfig, *words, "precompute")
        model = planned(base, PreferenceConfig, *words, "model")
        ticket = planned(base, PreferenceConfig, *words, "ticket")
        assert [plan.held for plan in alone] == [plan.held for plan in planned(base, RecipeConfig, *words[:2])]
        assert [two.held - one.held for one, two in zip(alone, model)] == [one.device["weights"] for one in alone]
        # a task vector moves every weight: the reference is a model after all while it is made
        expected = model[0] if score == "task_vector" else alone[0]
        assert [plan.held for plan in ticket] == [expected.held, alone[1].held]


@pytest.mark.parametrize(
    ("targets", "outputs"),
    [
        (["q_proj", "down_proj"], (WIDTH + WIDTH) + (HIDDEN + WIDTH)),
        ([r".*\.(gate|up)_proj"], 2 * (WIDTH + HIDDEN)),
        (["all-linear"], 4 * (WIDTH + WIDTH) + 3 * (WIDTH + HIDDEN)),
    ],
)
def test_adapters_are_those_that_were_asked_for(base: Path, targets: list[str], outputs: int) -> None:
    (plan,) = planned(base, RecipeConfig, "--method", "lora", "--lora_r", "4", "--lora_target_modules", *targets)
    assert plan.trained == NUM_LAYERS * 4 * outputs


def test_generation_gathers_the_model_once_a_step(base: Path) -> None:
    """And a server spares that."""
    words = ("--score", "gradient", "--reward", "rewards.py:function")
    alone = planned(base, PolicyConfig, *words, ranks=2)
    served = planned(base, PolicyConfig, *words, "--server", "http://127.0.0.1:8000", ranks=2)
    for here, there in zip(alone, served, strict=True):
        assert here.held == there.held and here.peak >= there.peak
        (gathered,) = [one for one in here.transfers if one.what == "generation"]
        assert gathered.payload == 2 * here.at_moments["generation"].device  # the other half
        assert "generation" not in there.at_moments
