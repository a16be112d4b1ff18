"""Between start and outcome a model is moved in place: both ends have exact bits, movement is that of the whole way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lota.algebra import ModelTensors, extract
from lota.study.measure import Dial


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """A start, and a run's folder with the tuned model merged/ and as ticket/."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        weight[3, 4] += 3.0
        weight[5, 6] -= 4.0
    run = tmp_path / "run"
    model.save_pretrained(run / "merged")
    extract(ModelTensors(tmp_path / "start"), ModelTensors(run / "merged"), tmp_path / "as-ticket" / "ticket")
    return tmp_path / "start", run


@pytest.mark.parametrize("form", ["merged", "ticket"])
def test_the_dial(models: tuple[Path, Path], tmp_path: Path, form: str) -> None:
    start, run = models
    model = LlamaForCausalLM.from_pretrained(start)
    tuned = LlamaForCausalLM.from_pretrained(run / "merged").state_dict()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dial = Dial(model, run if form == "merged" else tmp_path / "as-ticket")
    dial.to(1)
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in model.state_dict().items())
    dial.to(0.5)
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(model.state_dict()[name], (before[name] + tuned[name]) / 2)
    dial.to(0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    found = dial.movement()
    assert found["num_changed"] == 2
    assert found["moved"] == pytest.approx(5.0, rel=1e-6)  # 3, 4, 5; fp32 differences
