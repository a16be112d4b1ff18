"""New tensors and rows: chosen from and trained whole in one tensor, inside other modules, frozen, protected, from a
configuration alone, beside a base that cannot be read, and planned."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lota
from lota.cli import main
from tests.zero import cases
from tests.zero.test_dense_tensors import CONFIG, ROWS, VOCAB, _classifier, _initialize, _resized, _step

EMBED = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / "llama"
    LlamaForCausalLM(LlamaConfig(**CONFIG)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def _old_and_new_rows(base: Path, folder: Path) -> dict[str, Any]:
    options: dict[str, Any] = {"include": ["default", f"{EMBED}[:{VOCAB}]"], "dense": ROWS}
    with lota.calibration_zero3(score="task_vector", density=0.2, **options) as run:
        engine = _initialize(_resized(base, 1))
        for step in range(2):
            _step(engine, "rows", step)
        mask = run.mask()
        engine.destroy()
    with lota.sparse_zero3(mask) as run:
        engine = _initialize(_resized(base, 2))
        for step in range(3):
            _step(engine, "rows", step)
        run.save_ticket(folder / "ticket")
        trained = cases.gathered(engine.module)
        engine.destroy()
    return {"mask": mask, "trained": trained}


@pytest.mark.parametrize("size", [1, 2])
def test_old_rows_are_chosen_from_and_new_rows_trained_whole(ranks, base, tmp_path, size):
    """One tensor may have both: some entries of the rows that the base has, and all of those it lacks."""
    got = ranks(size).run(_old_and_new_rows, base, tmp_path)[0]
    mask, before = got["mask"], _resized(base, 2).state_dict()
    active = mask.dense(EMBED)
    assert active[VOCAB:].all() and 0 < active[:VOCAB].sum() < active[:VOCAB].numel()
    assert mask.has_all(EMBED, (VOCAB, VOCAB + 3)) and not mask.has_all(EMBED, (0, VOCAB + 3))
    for name, tensor in got["trained"].items():
        frozen = ~mask.dense(name) if name in mask.names else torch.ones_like(tensor, dtype=torch.bool)
        assert torch.equal(tensor[frozen], before[name][frozen]), name
    other = _resized(base, 9)
    lota.apply_(other, lota.Ticket.load(tmp_path / "ticket"))
    assert all(torch.equal(tensor, got["trained"][name]) for name, tensor in other.state_dict().items())


def test_rows_that_include_and_dense_share_are_refused() -> None:
    from lota.selection import candidates

    shapes = {EMBED: (35, 16), "model.layers.0.mlp.up_proj.weight": (24, 16)}
    with pytest.raises(ValueError, match=r"include names rows 0:33 of .*, and dense rows 32:35"):
        candidates(shapes, [f"{EMBED}[:33]"], None, [f"{EMBED}[32:]"])
    chosen = candidates(shapes, ["default", f"{EMBED}[:32]"], None, [f"{EMBED}[32:]"])
    assert chosen.rows == {EMBED: (0, 32)} and chosen.dense == {EMBED: (32, 35)} and EMBED in chosen.names
    assert candidates(shapes, None, None, [f"{EMBED}[32:]"]).names == ("model.layers.0.mlp.up_proj.weight",)


class Wrapped(nn.Module):
    """A transformers model inside another module, with a head of the wrapper's own."""

    def __init__(self, base: Path, has_head: bool) -> None:
        super().__init__()
        self.inner = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        self.value = nn.Linear(16, 1, bias=False, dtype=torch.bfloat16) if has_head else None

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        return self.inner(input_ids=input_ids, labels=labels)


def _calibrating(model: nn.Module, **options: Any) -> tuple[str, list[str]]:
    """The refusal of a calibration of `model`, or "", and the warnings that it logged."""
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lota").addHandler(handler)
    try:
        with lota.calibration_zero3(score="magnitude", density=0.1, **options) as run:
            _initialize(model)
            run.mask()
    except ValueError as error:
        return str(error), records
    finally:
        logging.getLogger("lota").removeHandler(handler)
    return "", records


def _wrapped(base: Path, has_head: bool) -> tuple[str, list[str]]:
    return _calibrating(Wrapped(base, has_head))


def test_a_model_inside_another_module_is_compared(ranks, base):
    message, warnings = ranks(1).run(_wrapped, base, False)[0]
    assert message == "" and not any("compared" in line for line in warnings)
    message, _ = ranks(1).run(_wrapped, base, True)[0]
    assert "value.weight is not in the checkpoint" in message and "dense=['value.weight']" in message


def _unreadable(base: Path, folder: Path) -> tuple[str, list[str]]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    folder.mkdir(exist_ok=True)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    model.config.save_pretrained(folder)
    return _calibrating(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))


def test_a_base_that_cannot_be_read_is_named_in_a_warning(ranks, base, tmp_path):
    message, warnings = ranks(1).run(_unreadable, base, tmp_path / "bin")[0]
    assert message == ""
    (line,) = [line for line in warnings if "not compared" in line]
    assert str(tmp_path / "bin") in line and "must be named in dense" in line


def _made_anew(base: Path) -> tuple[str, list[str]]:
    torch.manual_seed(3)
    return _calibrating(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base), dtype=torch.bfloat16))


def test_a_model_made_from_a_bases_configuration_is_a_new_model(ranks, base):
    """Its norms are ones as the base's are, which says nothing."""
    message, warnings = ranks(1).run(_made_anew, base)[0]
    assert message == "" and any("taken for a new model" in line for line in warnings)


def _frozen(base: Path) -> tuple[str, list[str]]:
    model = _classifier(base, 1)
    model.get_parameter("score.weight").requires_grad_(False)
    return _calibrating(model)


def test_a_frozen_new_head_is_refused_with_both_cures(ranks, base):
    message, _ = ranks(1).run(_frozen, base)[0]
    assert "requires_grad to True on score.weight" in message and "dense=['score.weight']" in message


def _ticket_with_head(base: Path, folder: Path) -> tuple[str, list[str]]:
    with lota.calibration_zero3(score="magnitude", density=0.1, dense=["score.weight"]) as run:
        engine = _initialize(_classifier(base, 1))
        mask = run.mask()
        engine.destroy()
    with lota.sparse_zero3(mask) as run:
        engine = _initialize(_classifier(base, 2))
        _step(engine, "head", 0)
        run.save_ticket(folder / "ticket")
        engine.destroy()
    return _calibrating(_classifier(base, 3), dense=["score.weight"], protect=[str(folder / "ticket")])


def test_a_head_of_a_protected_ticket_may_be_trained_anew_and_is_planned(ranks, base, tmp_path, capsys):
    assert ranks(1).run(_ticket_with_head, base, tmp_path)[0][0] == ""
    assert main(["plan", str(base), "--mask", str(tmp_path / "ticket"), "--method", "lota", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["plans"][0]["trained"] == lota.Mask.load(tmp_path / "ticket").num_active


def test_a_new_head_and_new_rows_are_planned(base, capsys):
    words = ["plan", str(base), "--method", "lota", "--density", "0.1"]
    assert main([*words, "--dense", "score.weight"]) == 2
    assert "matches none" in capsys.readouterr().err
    head = [*words, "--architecture", "LlamaForSequenceClassification", "--set", "num_labels=3"]
    assert main([*head, "--dense", "score.weight", "--json"]) == 0
    with_head = json.loads(capsys.readouterr().out)["plans"][0]["trained"]
    assert main([*head, "--json"]) == 0
    assert with_head - json.loads(capsys.readouterr().out)["plans"][0]["trained"] == 3 * 16
    rows = [word for row in ROWS for word in ("--dense", row)]
    assert main([*words, "--set", f"vocab_size={VOCAB + 3}", *rows, "--json"]) == 0
    with_rows = json.loads(capsys.readouterr().out)["plans"][0]["trained"]
    assert main([*words, "--json"]) == 0
    assert with_rows - json.loads(capsys.readouterr().out)["plans"][0]["trained"] == 2 * 3 * 16
    assert main([*words, "--architecture", "BertModel"]) == 2
    assert "needs a BertConfig" in capsys.readouterr().err
    assert main([*words, "--set", "num_labels"]) == 2
    assert "ENTRY=VALUE" in capsys.readouterr().err
