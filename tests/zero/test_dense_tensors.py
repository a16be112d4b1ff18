"""What the base does not have is refused, or trained and stored whole: base + ticket is the trained model, whatever the
new head, rows or buffers were before, on any number of ranks, after a resume, as a folder and as an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

import lota
from lota.cli import main
from lota.delivery.apply import apply_to_checkpoint, revert_checkpoint
from lota.delivery.card import ticket_card
from lota.delivery.peft import export_peft
from lota.ticket import read_manifest
from tests.zero import cases

VOCAB, ADDED = 32, 3
CONFIG = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
ROWS = [f"{name}[{VOCAB}:]" for name in ("model.embed_tokens.weight", "lm_head.weight")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / "llama"
    LlamaForCausalLM(LlamaConfig(**CONFIG)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def _classifier(base: Path, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, dtype=torch.bfloat16)


def _resized(base: Path, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.resize_token_embeddings(VOCAB + ADDED, mean_resizing=False)
    return model


MAKE = {"head": _classifier, "rows": _resized}
DENSE = {"head": ["score.weight"], "rows": ROWS}


def _initialize(model: nn.Module) -> Any:
    import deepspeed

    config = cases.config(1, torch.distributed.get_world_size(), bf16={"enabled": True})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def _step(engine: Any, kind: str, step: int) -> None:
    rank = torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(10 * step + rank)
    ids = torch.randint(1, VOCAB + (ADDED if kind == "rows" else 0), (2, 6), generator=generator)
    ids[:, -1] = VOCAB + ADDED - 1 if kind == "rows" else 1
    labels = ids if kind == "rows" else torch.randint(0, 3, (2,), generator=generator)
    engine.backward(engine(input_ids=ids, labels=labels).loss)
    engine.step()


def _calibrated(base: Path, kind: str, score: str) -> lota.Mask:
    with lota.calibration_zero3(score=score, density=0.2, dense=DENSE[kind]) as run:
        engine = _initialize(MAKE[kind](base, 1))
        for step in range(2):
            _step(engine, kind, step)
        mask = run.mask()
        engine.destroy()
    return mask


def _train(base: Path, kind: str, folder: Path, score: str = "gradient") -> dict[str, Any]:
    """Calibrate, train four steps, save; then once more with a stop after two, from another random start."""
    mask = _calibrated(base, kind, score)
    with lota.sparse_zero3(mask) as run:
        engine = _initialize(MAKE[kind](base, 2))
        for step in range(4):
            _step(engine, kind, step)
        facts = run.save_ticket(folder / "ticket")
        report, trained = run.report(), cases.gathered(engine.module)
        engine.destroy()
    run.release()
    with lota.sparse_zero3(mask) as run:
        engine = _initialize(MAKE[kind](base, 2))
        for step in range(2):
            _step(engine, kind, step)
        engine.save_checkpoint(str(folder / "checkpoint"))
        engine.destroy()
    run.release()
    with lota.sparse_zero3(mask) as run:
        engine = _initialize(MAKE[kind](base, 7))
        engine.load_checkpoint(str(folder / "checkpoint"))
        for step in range(2, 4):
            _step(engine, kind, step)
        resumed = cases.gathered(engine.module)
        engine.destroy()
    run.release()
    return {"mask": mask, "trained": trained, "resumed": resumed, "report": report, "facts": facts}


@pytest.fixture(
    scope="module", params=[("head", 1), ("head", 2), ("rows", 1), ("rows", 2)], ids=lambda p: f"{p[0]}-{p[1]}"
)
def run(request, ranks, base, tmp_path_factory) -> dict[str, Any]:
    kind, size = request.param
    folder = tmp_path_factory.mktemp("run")
    return ranks(size).run(_train, base, kind, folder)[0] | {"kind": kind, "folder": folder}


def test_new_entries_are_trained_whole_and_the_rest_keeps_its_bits(run, base):
    mask, trained = run["mask"], run["trained"]
    before = {name: param.detach() for name, param in MAKE[run["kind"]](base, 2).named_parameters()}
    names = ["score.weight"] if run["kind"] == "head" else [pattern.split("[")[0] for pattern in ROWS]
    for name in names:
        first = 0 if run["kind"] == "head" else VOCAB
        assert mask.is_dense(name)
        assert mask.base[name].rows == first
        assert (trained[name][first:] != before[name][first:]).any()
    for name, weight in before.items():
        frozen = ~mask.dense(name) if name in mask.names else torch.ones_like(weight, dtype=torch.bool)
        assert torch.equal(trained[name][frozen], weight[frozen]), name
    assert run["report"]["num_dense"] == sum(mask.active(name) for name in names)


def test_resuming_gives_the_same_model(run):
    for name, weight in run["trained"].items():
        assert torch.equal(run["resumed"][name], weight), name


def test_the_ticket_on_any_new_model_is_the_trained_one(run, base):
    ticket = lota.Ticket.load(run["folder"] / "ticket")
    for seed in (5, 6):
        model = MAKE[run["kind"]](base, seed)
        before = {name: param.detach().clone() for name, param in model.named_parameters()}
        applied = lota.apply_(model, ticket)
        assert all(torch.equal(param, run["trained"][name]) for name, param in model.named_parameters())
        applied.revert()
        assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())


def test_folders_load_as_the_trained_model_and_revert_to_the_base(run, base, tmp_path):
    ticket = lota.Ticket.load(run["folder"] / "ticket")
    apply_to_checkpoint(base, [ticket], tmp_path / "merged")
    load = AutoModelForSequenceClassification if run["kind"] == "head" else AutoModelForCausalLM
    model, info = load.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(torch.equal(param, run["trained"][name]) for name, param in model.named_parameters())
    revert_checkpoint(tmp_path / "merged", [ticket], tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    expected = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in expected.named_parameters()}
    assert all(torch.equal(param, again.get_parameter(name)) for name, param in expected.named_parameters())
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "again")]
    assert configs[0] == configs[1]


def test_the_card_and_inspect_name_what_the_ticket_brings(run, capsys):
    path = run["folder"] / "ticket"
    text = ticket_card(read_manifest(path))
    loader = "LlamaForSequenceClassification" if run["kind"] == "head" else "LlamaForCausalLM"
    assert f"model = {loader}.from_pretrained(" in text
    assert ("resize_token_embeddings(35)" in text) == (run["kind"] == "rows")
    assert main(["inspect", str(path), "--verify"]) == 0
    name = "score.weight" if run["kind"] == "head" else "model.embed_tokens.weight, lm_head.weight"
    assert f"brings      {name}, for a {loader}" in capsys.readouterr().out


def test_the_adapter_gives_the_trained_logits(run, base, tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra peft")
    export_peft(lota.Ticket.load(run["folder"] / "ticket"), base, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(config["modules_to_save"]) >= ({"score"} if run["kind"] == "head" else {"lm_head", "model.embed_tokens"})
    assert config["task_type"] == ("SEQ_CLS" if run["kind"] == "head" else "CAUSAL_LM")
    trained, ids = MAKE[run["kind"]](base, 8), torch.arange(1, 9)[None]
    with torch.no_grad():
        for name, param in trained.named_parameters():
            param.copy_(run["trained"][name])
        expected = trained(input_ids=ids).logits
        adapted = peft.PeftModel.from_pretrained(MAKE[run["kind"]](base, 9), tmp_path / "adapter")
        assert torch.equal(adapted(input_ids=ids).logits, expected)


def _dense_calibration(base: Path, folder: Path) -> dict[str, Any]:
    """Task vectors with a head that trains beside them, at once and with a stop in between."""
    found = {}
    for stop in (False, True):
        with lota.calibration_zero3(density=0.2, dense=DENSE["head"]) as run:
            engine = _initialize(_classifier(base, 1))
            for step in range(4):
                if stop and step == 2:
                    engine.save_checkpoint(str(folder))
                    engine.destroy()
                    break
                _step(engine, "head", step)
        if stop:
            run._run.release()
            with lota.calibration_zero3(density=0.2, dense=DENSE["head"]) as run:
                engine = _initialize(_classifier(base, 9))
                engine.load_checkpoint(str(folder))
                for step in range(2, 4):
                    _step(engine, "head", step)
        found[stop] = cases.gathered(engine.module)["score.weight"], run.mask()
        engine.destroy()
    return {"head": [found[False][0], found[True][0]], "masks": [found[False][1], found[True][1]]}


def test_a_calibration_trains_the_head_too_and_resumes_it(ranks, base, tmp_path):
    for got in ranks(2).run(_dense_calibration, base, tmp_path / "checkpoint"):
        assert torch.equal(*got["head"])
        assert not torch.equal(got["head"][0], _classifier(base, 1).score.weight)
        assert got["masks"][0] == got["masks"][1]
        assert got["masks"][0].is_dense("score.weight")


def _refusal(base: Path, kind: str, phase: str, options: dict[str, Any]) -> str:
    model = MAKE[kind](base, 1)
    try:
        if phase == "calibration":
            with lota.calibration_zero3(density=0.1, **options):
                _initialize(model)
        else:
            dense = torch.zeros(24, 16, dtype=torch.bool)
            dense[0] = True
            with lota.sparse_zero3(lota.Mask.from_dense({"model.layers.0.mlp.up_proj.weight": dense}), **options):
                _initialize(model)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("phase", ["calibration", "sparse"])
@pytest.mark.parametrize(
    ("kind", "options", "cure"),
    [
        ("head", {}, "dense=['score.weight']"),
        ("rows", {}, f"dense=['model.embed_tokens.weight[{VOCAB}:]', 'lm_head.weight[{VOCAB}:]']"),
        ("rows", {"dense": [f"model.embed_tokens.weight[{VOCAB + 1}:]", ROWS[1]]}, ROWS[0]),
        ("head", {"dense": ["scores.weight"]}, "score.weight"),
    ],
)
def test_what_the_base_lacks_is_refused_with_the_cure(ranks, base, phase, kind, options, cure):
    (message,) = ranks(1).run(_refusal, base, kind, phase, options)
    assert cure in message


def _reinitialized(base: Path) -> str:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.weight)
    try:
        with lota.calibration_zero3(density=0.1):
            _initialize(model)
    except ValueError as error:
        return str(error)
    return ""


def test_weights_made_anew_under_a_name_of_the_base_are_refused(ranks, base):
    (message,) = ranks(1).run(_reinitialized, base)
    assert "model.layers.0.mlp.up_proj.weight is not in the checkpoint" in message


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.mlp = nn.Linear(5, 8, bias=False)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.mlp(x))))


BUFFERS = ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]


def _with_buffers(folder: str, dense: list[str] | None, train_norm: bool = True) -> tuple[dict[str, Any], str]:
    """Train in two parts, with a checkpoint between them; state and the error of saving."""
    import deepspeed

    generator = torch.Generator().manual_seed(1)
    mask = lota.Mask.from_dense({"mlp.weight": torch.rand(8, 5, generator=generator) < 0.4})

    def engine_of() -> Any:
        model = Normed()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        config = cases.config(1, torch.distributed.get_world_size())
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        engine.module.norm.train(train_norm)
        return engine

    def train(engine: Any, steps: range) -> None:
        for step in steps:
            rows = torch.Generator().manual_seed(10 * step + torch.distributed.get_rank())
            x, target = torch.randn(8, 5, generator=rows) * 3 + 2, torch.randint(0, 3, (8,), generator=rows)
            engine.backward(F.cross_entropy(engine(x), target))
            engine.step()

    with lota.sparse_zero3(mask, dense=dense) as run:
        engine = engine_of()
        train(engine, range(2))
        engine.save_checkpoint(f"{folder}/checkpoint")
        engine.destroy()
    run.release()
    with lota.sparse_zero3(mask, dense=dense) as run:
        engine = engine_of()
        engine.load_checkpoint(f"{folder}/checkpoint")
        train(engine, range(2, 4))
        state = cases.gathered(engine.module) | {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
        error = ""
        try:
            run.save_ticket(f"{folder}/ticket")
        except RuntimeError as caught:
            error = str(caught)
        engine.destroy()
    run.release()
    return state, error


@pytest.mark.parametrize("size", [1, 2])
def test_buffers_that_moved_are_stored_when_named(ranks, tmp_path, size):
    state, error = ranks(size).run(_with_buffers, str(tmp_path), ["norm.*_*"])[0]
    assert error == ""
    model, ticket = Normed(), lota.Ticket.load(tmp_path / "ticket")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    applied = lota.apply_(model, ticket)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert int(model.norm.num_batches_tracked) == 4
    applied.revert()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_buffers_that_moved_are_refused_by_name(ranks, tmp_path):
    _, error = ranks(1).run(_with_buffers, str(tmp_path), None)[0]
    assert "norm.running_mean" in error
    assert not (tmp_path / "ticket").exists()


def test_buffers_that_stayed_need_nothing(ranks, tmp_path):
    _, error = ranks(1).run(_with_buffers, str(tmp_path), None, False)[0]
    assert error == ""
