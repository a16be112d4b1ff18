"""The planner's integers on real shapes: the project's own targets, rings counted by hand, advice, and bad input."""

from __future__ import annotations

import functools
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lota import plan
from lota.cli import main
from lota.kernels import TileIndex
from lota.plan.advice import Choice
from lota.plan.layout import Transfer
from lota.selection import candidates, eligible
from lota.ticket import Mask
from lota.zero.compact.layout import owned_range, owner_counts
from lota.zero.compact.mask_counts import mask_counts

GIB = 1 << 30
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}


def _shapes(config):
    from transformers import LlamaConfig

    return plan.shapes_of_config(LlamaConfig(**{k: v for k, v in config.items() if k != "model_type"}), "llama")


@pytest.fixture(scope="module")
def llama_8b():
    return _shapes(LLAMA_8B)


@pytest.fixture(scope="module")
def llama_70b():
    return _shapes(LLAMA_70B)


def _lota(model, layout, density, **options):
    counts = plan.MaskCounts.even(model, eligible(model.shapes), density, layout.shard_size)
    return plan.lota(model, layout, counts, **options)


def test_parameters_of_published_models(llama_8b, llama_70b):
    assert llama_8b.numel() == 8_030_261_248
    assert llama_70b.numel() == 70_553_706_496


def test_index_of_70b(llama_70b):
    """14 GB whole at 10%, 2.8 GB at 1%; with dense only this rank's share."""
    layout = plan.RankLayout(ranks=64)
    for density, whole in ((0.1, 13.7e9), (0.01, 2.74e9)):
        made = _lota(llama_70b, layout, density)
        assert made.device["index, whole"] == pytest.approx(whole, rel=0.01)
        assert made.device["index, own share"] == pytest.approx(whole / 64, rel=0.01)
        assert "index, whole" not in _lota(llama_70b, layout, density, reduction="dense").device


def test_states_of_8b(llama_8b):
    layout, names = plan.RankLayout(ranks=8, persistence_threshold=0, bucket=0), eligible(llama_8b.shapes)
    numel, trained = llama_8b.numel(), llama_8b.numel(names)
    assert plan.full(llama_8b, layout).held == 16 * numel // 8
    assert plan.calibration(llama_8b, layout, names, "gradient").held == 2 * numel // 8 + 4 * trained // 8
    sparse = _lota(llama_8b, layout, 0.01)
    states = sum(sparse.device[kind] for kind in ("masters", "moments", "gradients"))
    assert states == pytest.approx(16 * 0.01 * trained / 8, rel=1e-4)


def test_checkpoint_and_ticket_of_8b(llama_8b):
    layout = plan.RankLayout(ranks=8)
    trained = llama_8b.numel(eligible(llama_8b.shapes))
    assert plan.full(llama_8b, layout).checkpoint == 14 * llama_8b.numel()
    for density, bits in ((0.1, 2.15), (0.01, 0.25)):
        made = _lota(llama_8b, layout, density)
        assert made.checkpoint == 12 * round(density * trained)
        index_and_values = made.product - 2 * made.trained  # the base values are for undoing
        assert 0.9 * bits < 8 * index_and_values / trained <= bits
    assert _lota(llama_8b, layout, 0.01).checkpoint < 1.2e9


def test_gradients_sent_shrink_with_the_density(llama_8b):
    layout = plan.RankLayout(ranks=16, node_size=8, shard_group_size=8)
    names = eligible(llama_8b.shapes)
    for density in (0.1, 0.01):
        made = _lota(llama_8b, layout, density)
        active = round(density * llama_8b.numel(names))
        assert made.payload("all_to_all") == 4 * active
        assert made.payload("all_reduce") == pytest.approx(4 * active / 8, rel=1e-6)
        weights_over_the_network = [t.sent(8)[1] for t in made.transfers if t.what == "weights"]
        assert weights_over_the_network == [0]


@pytest.mark.parametrize(
    ("kind", "group", "node", "expected"),
    [
        ("all_gather", range(8), 8, (700, 0)),
        ("all_gather", range(8), 4, (600, 100)),  # half of 800 crosses, once per node and shared by its 4 ranks
        ("all_to_all", range(8), 4, (300, 400)),
        ("all_reduce", range(0, 16, 8), 8, (0, 800)),
        ("all_reduce", range(0, 4, 2), 4, (800, 0)),
        ("all_gather", range(1), 4, (0, 0)),
    ],
)
def test_what_leaves_a_rank(kind, group, node, expected):
    inside, across = Transfer("x", kind, 800, group).sent(node)
    assert (inside, across) == expected


def test_auto_takes_compact_unless_only_dense_fits(llama_70b):
    layout = plan.RankLayout(ranks=8)
    plans = {kind: _lota(llama_70b, layout, 0.1, reduction=kind) for kind in ("compact", "dense")}
    options = {"shard_size": 8, "reduce_every": "micro_step"}
    assert plans["dense"].peak < plans["compact"].peak
    enough = plans["compact"].peak * 100 // 80 + 1
    for memory, expected, reason in (
        (None, "compact", "not known"),
        (enough, "compact", "at most 80%"),
        (enough - 2, "dense", "its own share only"),
    ):
        choice, why = plan.choose_reduction(plans.__getitem__, memory, **options)
        assert choice == expected and reason in why, why
    assert plan.choose_reduction(plans.__getitem__, 1, shard_size=1, reduce_every="micro_step")[0] == "compact"
    assert plan.choose_reduction(plans.__getitem__, 1, shard_size=8, reduce_every="step")[0] == "compact"
    worse = {"compact": plans["dense"], "dense": plans["compact"]}
    choice, why = plan.choose_reduction(worse.__getitem__, 1, **options)
    assert choice == "compact" and "dense would need" in why


def test_advice_names_single_changes_that_fit(llama_70b):
    names = eligible(llama_70b.shapes)

    def sparse(choice):
        counts = plan.MaskCounts.even(llama_70b, names, choice.density, choice.layout.shard_size)
        return plan.lota(llama_70b, choice.layout, counts, reduction=choice.reduction)

    choice = Choice(plan.RankLayout(ranks=8), sparse, density=0.1, reduction="compact")
    memory = 40 * GIB
    assert sparse(choice).peak > memory
    lines = plan.advise(choice, memory)
    assert "does not fit" in lines[0]
    text = "\n".join(lines)
    for change in ("16 ranks", "density 0.05", "gradient_reduction dense"):
        assert change in text, text
    assert sparse(replace(choice, density=0.05)).peak <= memory
    assert "fits" in plan.advise(replace(choice, density=0.01), memory)[0]

    def scored(choice):
        return plan.calibration(llama_70b, choice.layout, names, choice.score)

    lines = plan.advise(Choice(plan.RankLayout(ranks=8), scored, score="task_vector"), 80 * GIB)
    assert any("score gradient" in line for line in lines) and any("16 ranks" in line for line in lines)
    assert "no single change" in plan.advise(Choice(plan.RankLayout(), scored, score="gradient"), 1 << 20)[-1]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_given_mask_is_counted_exactly(size):
    """Counts and widths against the index that a run would build, narrow and wide, whole and per rank."""
    generator = torch.Generator().manual_seed(0)
    for density, gap in ((0.3, 0), (0.1, 200_000), (0.001, 0)):
        dense = {"a": torch.rand(700, 501, generator=generator) < density, "empty": torch.zeros(5, 5, dtype=torch.bool)}
        dense["b"] = torch.rand(301, 403, generator=generator) < density
        dense["b"].view(-1)[:gap] = False
        mask = Mask.from_dense(dense)
        numels = {name: mask.numel(name) for name in mask.names if mask.active(name)}
        for rank in range(size):
            pieces, origin = [], 0
            for name, numel in numels.items():
                start, stop = owned_range(numel, size, rank)
                positions = mask.indices(name)
                pieces.append(positions[(positions >= start) & (positions < stop)] - start + origin)
                origin += -(-numel // size)
            counts = mask_counts(mask, size, rank)
            local = TileIndex.from_flat(torch.cat(pieces), origin)
            assert counts.spread.local == local.num_active
            assert counts.spread.local_offset_bytes == local.offset.element_size()
        offsets = [0, *torch.tensor(list(numels.values())).cumsum(0).tolist()]
        whole = [mask.indices(name) + offset for name, offset in zip(numels, offsets, strict=False)]
        index = TileIndex.from_flat(torch.cat(whole), offsets[-1])
        assert counts.spread.offset_bytes == index.offset.element_size()
        assert counts.encoded() == mask.nbytes
        per_rank = [sum(owner_counts(mask.indices(n), k, size)[r] for n, k in numels.items()) for r in range(size)]
        assert counts.spread.fullest == max(per_rank) and mask_counts(mask, size).spread.local == max(per_rank)


def test_the_pages_show_what_commands_print(tmp_path, monkeypatch, capsys):
    """`...` stands for lines left out."""
    pages = [Path(__file__).resolve().parents[2] / "docs" / name for name in ("planning.md", "planning_70b.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    blocks = re.findall(r"```text\n\$ lota (plan .*)\n([^`]*)```", text)
    assert len(blocks) == 6
    (tmp_path / "llama-70b").mkdir()
    (tmp_path / "llama-70b" / "config.json").write_text(json.dumps(LLAMA_70B))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "read_model", functools.cache(plan.read_model))
    for command, shown in blocks:
        assert main(command.split()) == 0
        printed = capsys.readouterr().out
        for part in shown.split("...\n"):
            assert part in printed, command


@pytest.fixture
def folder(tmp_path):
    small = LLAMA_8B | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 1000}
    (tmp_path / "config.json").write_text(json.dumps(small | {"num_attention_heads": 4, "num_key_value_heads": 2}))
    return tmp_path


def test_command_prints_a_table_and_json(folder, capsys):
    assert main(["plan", str(folder), "--ranks", "16", "--node_size", "8", "--memory", "4MiB"]) == 0
    text = capsys.readouterr().out
    for part in ("dense ZeRO-3", "LoRA, rank 16", "calibration, task_vector", "calibration, gradient", "LoTA, 10%"):
        assert part in text
    for row in ("peak, without activations", "weights, across nodes", "fits 4 MiB", "a checkpoint"):
        assert row in text
    assert main(["plan", str(folder / "config.json"), "--ranks", "2", "--json", "--method", "lota"]) == 0
    facts = json.loads(capsys.readouterr().out)
    (made,) = facts["plans"]
    assert made["held"] == sum(made["device"].values()) and made["trained"] > 0


def test_command_counts_a_mask(folder, capsys):
    name = "model.layers.0.mlp.up_proj.weight"
    dense = torch.zeros(512, 256, dtype=torch.bool)
    dense[:100] = True  # all in the first partition
    Mask.from_dense({name: dense}).save(folder / "mask")
    arguments = ["plan", str(folder), "--ranks", "2", "--json", "--method", "lota", "--mask", str(folder / "mask")]
    assert main(arguments) == 0
    (made,) = json.loads(capsys.readouterr().out)["plans"]
    assert made["device"]["masters"] == 4 * math.ceil(25600 / 1024) * 1024
    assert made["host"]["base values"] == 2 * 25600 and made["uneven"] == 0
    Mask.from_dense({name: dense.view(256, 512)}).save(folder / "other")
    assert main([*arguments[:-1], str(folder / "other")]) == 2
    assert "has shape (256, 512)" in capsys.readouterr().err


@pytest.mark.parametrize(("ranks", "expected"), [("8", 4), ("2", 2)])
def test_command_knows_a_nodes_ranks(folder, capsys, ranks, expected):
    def held(size):
        arguments = ["plan", str(folder), "--ranks", ranks, "--node_size", "4", "--method", "lota", "--json"]
        assert main([*arguments, "--shard_group_size", size]) == 0
        return json.loads(capsys.readouterr().out)["plans"]

    assert held("node") == held(str(expected))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "lots"], "expected a size like 80GiB"),
        (["--ranks", "8", "--shard_group_size", "3"], "shard_group_size 3 does not divide the 8 ranks"),
        (["--ranks", "0"], "ranks must be a positive integer, got 0"),
        (["--density", "90"], "Did you mean 0.9?"),
        (["--include", "*.q_prj*"], "matches none"),
        (["--reduce_every", "step", "--gradient_reduction", "dense"], "would keep whole gradients on every rank"),
    ],
)
def test_bad_options_end_in_one_line(folder, capsys, arguments, message):
    assert main(["plan", str(folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_missing_model(capsys):
    assert main(["plan", "/nowhere/model"]) == 2
    assert "/nowhere/model: no such folder" in capsys.readouterr().err


def test_rows_and_dense_tensors_are_planned_as_the_mask_that_they_make() -> None:
    """Counts by tensor are those of a real mask; a range of rows may lie on one rank."""
    shapes = {"embed": (64, 8), "mlp.up": (32, 8), "head": (3, 8)}
    model = plan.ModelShapes("tiny", shapes, 8)
    chosen = candidates(shapes, ["mlp.up[16:]"], None, ["head", "embed[60:]"])
    counts = plan.MaskCounts.even(model, chosen.names, 0.25, 4, rows=chosen.rows, dense=chosen.dense)
    assert dict(counts.spread.counts) == {"mlp.up": 32, "head": 24, "embed": 32}
    mask = Mask.from_indices({"mlp.up": (shapes["mlp.up"], torch.arange(128, 256, 4))}, rows=chosen.rows)
    mask = mask.with_dense({name: (shapes[name], rows) for name, rows in chosen.dense.items()}, {})
    real = mask_counts(mask, 4)
    assert dict(real.spread.counts) == dict(counts.spread.counts)
    assert real.spread.fullest <= counts.spread.fullest + 16  # the rows of `mlp.up` lie on two of four ranks
    assert counts.spread.fullest == 8 + 6 + 32
