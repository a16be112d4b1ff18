"""A script's own saves inside a block write the trained model, bit for bit base plus ticket, where the DeepSpeed
configuration asks for 16-bit weights; where it does not, they say so in the log and by a note, and write no shards."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lota
from tests.zero import trainers

NOTE = "NO_WEIGHTS_HERE.txt"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return trainers.make_base(tmp_path_factory.mktemp("base"))


def _mask(base: Path) -> lota.Mask:
    generator = torch.Generator().manual_seed(1)
    weights = load_file(base / "model.safetensors")
    return lota.Mask.from_dense(
        {name: torch.rand(w.shape, generator=generator) < 0.1 for name, w in weights.items() if "mlp" in name}
    )


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _save(folder: str, out: str, gathers: bool, shards: int | None) -> dict[str, Any]:
    """A Trainer with a checkpoint, and every way to save by hand."""
    base, log = Path(folder), _Lines()
    config = trainers._deepspeed_config()
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = gathers
    saving = {"save_strategy": "steps", "save_steps": 2, "output_dir": f"{out}/run", "deepspeed": config}
    trainer = trainers._trainer("trainer", base, 2, None, **saving)
    logging.getLogger("lota").addHandler(log)
    error = ""
    with lota.sparse_zero3(_mask(base), shard_group_size=shards) as run:
        trainer.train()
        trainer.save_model(f"{out}/model")
        has_saved = run.engine.save_16bit_model(f"{out}/engine")
        try:
            trainer.model.save_pretrained(f"{out}/shards")
        except ValueError as caught:
            error = str(caught)
        run.save_ticket(f"{out}/ticket")
    run.release()
    logging.getLogger("lota").removeHandler(log)
    is_undone = "save_pretrained" not in vars(trainer.model)
    trainer.model_wrapped.destroy()
    del trainer
    gc.collect()
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    return {"error": error, "log": log.lines, "has_saved": has_saved, "is_undone": is_undone}


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("shards", [None, 1])
def test_the_trained_model_where_it_is_asked_for(ranks, base, tmp_path, shards):
    results = ranks(2).run(_save, str(base), str(tmp_path), True, shards)
    expected = load_file(base / "model.safetensors")
    ticket = lota.Ticket.load(tmp_path / "ticket")
    assert ticket.num_changed > 0
    for name in ticket.names:
        expected[name].view(-1)[ticket.mask.indices(name)] = ticket.values(name)
    saved = load_file(tmp_path / "model" / "model.safetensors")
    by_engine = torch.load(tmp_path / "engine" / "pytorch_model.bin", weights_only=True)
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(saved[name], tensor) and torch.equal(by_engine[name], tensor), name
    assert all(result["has_saved"] and result["is_undone"] for result in results)
    assert NOTE not in _names(tmp_path)
    assert not {name for name in _names(tmp_path / "run") if name.endswith(("model.safetensors", "model.bin"))}
    assert all("would write empty tensors" in result["error"] for result in results)


def test_a_note_where_it_is_not(ranks, base, tmp_path):
    results = ranks(2).run(_save, str(base), str(tmp_path), False, None)
    for folder in ("model", "engine"):
        text = (tmp_path / folder / NOTE).read_text()
        assert "no weights" in text and "save_ticket" in text and "lota apply" in text
    assert not {name for name in _names(tmp_path) if name.endswith(("model.safetensors", "model.bin"))}
    assert NOTE not in _names(tmp_path / "run") and not (tmp_path / "shards").exists()
    assert any("save_model() writes no weights" in line and "lota apply" in line for line in results[0]["log"])
    assert not results[1]["log"], "rank 0 says it"
    assert not any(result["has_saved"] for result in results)
