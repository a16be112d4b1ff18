"""Tasks in sequence, by options of the recipe: the second ticket is disjoint from the first, pulled to what it needs,
and both are of the plain base, in any subset."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import lota
from lota.cli import main as cli
from lota.data.tokenizer import encode, load_tokenizer
from lota.delivery.apply import apply_to_checkpoint, revert_checkpoint
from lota.retention import Importance
from lota.ticket import Ticket
from tests.delivery.architecture_table import load
from tests.delivery.test_apply import load_checkpoint
from tests.train import jobs
from tests.train.test_merged import save_base


def _rows(path: Path, letter: str) -> str:
    rows = [{"prompt": f"{letter}: {number}", "completion": f" {letter * 3}{number}"} for number in range(24)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return str(path)


def _argv(base: Path, rows: str, run: Path, *options: str) -> list[str]:
    return [
        *("--model_name_or_path", str(base), "--train_file", rows, "--output_dir", str(run), "--bf16", "true"),
        *("--score", "gradient", "--calibration_steps", "2", "--max_steps", "4", "--density", "0.05"),
        *("--per_device_train_batch_size", "4", "--learning_rate", "0.01", "--save_strategy", "no"),
        *("--report_to", "none", "--importance_batches", "6", *options),
    ]


def _summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tasks(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tasks on two ranks; the second one begins with the first one's ticket, and is pulled."""
    folder = tmp_path_factory.mktemp("tasks")
    base = save_base("gpt2", folder / "base")
    a, b, general = (_rows(folder / f"{letter}.jsonl", letter) for letter in "abg")
    found = {"base": base, "a": folder / "run_a", "b": folder / "run_b", "general": Path(general), "rows": Path(b)}
    first = _argv(base, a, found["a"], "--keep_importance", "true", "--importance_batches", "8")
    ranks(2).run(jobs.run_recipe, "train_lota", first)
    ticket = str(found["a"] / "ticket")
    second = ["--tickets", ticket, "--retain", json.dumps([ticket, {"data": general}]), "--pull", "20"]
    ranks(2).run(jobs.run_recipe, "train_lota", _argv(base, b, found["b"], *second, "--merged", "true"))
    return found


def test_the_importance_travels_in_the_ticket(tasks: dict[str, Path]) -> None:
    importance = Importance.load(tasks["a"] / "ticket")
    ticket = Ticket.load(tasks["a"] / "ticket")
    assert set(ticket.names) == set(importance.names)
    assert importance.facts["micro_batches"] == 8 and importance.facts["rows"] == 4
    file = tasks["a"] / "ticket" / "importance.safetensors"
    assert _summary(tasks["a"])["importance"]["bytes"] == file.stat().st_size
    assert not (tasks["a"] / "importance").exists()


def test_the_second_ticket_is_disjoint_and_the_pull_was_reached(tasks: dict[str, Path]) -> None:
    one, two = (Ticket.load(tasks[name] / "ticket") for name in "ab")
    assert one.mask.overlap(two.mask) == 0 and two.num_changed > 0
    report = _summary(tasks["b"])["training"]["report"]["pull"]
    assert report["asked"] == 20 and report["reached"] == pytest.approx([20], rel=1e-3)
    assert len(report["retained"]) == 2 and "g.jsonl" in report["retained"][1]["data"]
    assert (tasks["b"] / "retained" / "1.safetensors").is_file()
    assert two.provenance["tickets"] == [str(tasks["a"] / "ticket")] and two.provenance["pull"] == 20


def test_each_is_applied_and_taken_out_without_the_other(tasks: dict[str, Path], tmp_path: Path) -> None:
    one, two = (Ticket.load(tasks[name] / "ticket") for name in "ab")
    base = load_checkpoint(tasks["base"])
    for name, tickets in {"one": [one], "two": [two], "both": [one, two], "turned": [two, one]}.items():
        apply_to_checkpoint(tasks["base"], tickets, tmp_path / name)
        made = load_checkpoint(tmp_path / name)
        for key, tensor in base.items():
            expected = tensor.clone()
            for ticket in tickets:
                for own in ticket.names:
                    if own.endswith(key) or key.endswith(own):
                        expected.view(-1)[ticket.mask.indices(own)] = ticket.values(own)
            assert torch.equal(made[key], expected), (name, key)
    merged, both = load_checkpoint(tasks["b"] / "merged"), load_checkpoint(tmp_path / "both")
    assert all(torch.equal(tensor, both[key]) for key, tensor in merged.items())
    revert_checkpoint(tmp_path / "both", [one, two], tmp_path / "back")
    assert all(torch.equal(tensor, base[key]) for key, tensor in load_checkpoint(tmp_path / "back").items())


def _divergence(base: Path, ticket: Ticket, rows: Path) -> float:
    """KL(base || base with the ticket) over the answers' tokens, row by row on a plain model."""
    model, tokenizer = load(base), load_tokenizer(str(base), "main", False)
    total = count = 0.0
    for line in rows.read_text(encoding="utf-8").splitlines():
        ids, num_prompt = encode(tokenizer, json.loads(line))
        found = []
        for tickets in ([], [ticket]):
            if tickets:
                applied = lota.apply_(model, tickets)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, num_prompt - 1 : -1]
                found.append(torch.log_softmax(logits.float(), -1))
        applied.revert()
        before, after = found
        total += float((before.exp() * (before - after)).sum())
        count += before.shape[0]
    return total / count


def test_the_dial_delivers_a_point_within_the_budget(ranks: Any, tasks: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    kept = json.dumps([{"name": "a", "data": str(tasks["general"])}])
    options = ("--mask", str(tasks["a"] / "ticket"), "--kept", kept, "--eval_file", str(tasks["rows"]))
    argv = _argv(tasks["base"], str(tasks["rows"]), run, *options, "--alphas", "0.25", "0.5", "1")
    argv += ["--merged", "true"]
    for name in ("--score", "--calibration_steps", "--density", "--importance_batches"):
        place = argv.index(name)
        del argv[place : place + 2]
    ranks(2).run(jobs.run_recipe, "train_lota", argv)
    training = _summary(run)["training"]
    points = training["dial"]["points"]
    assert [point["alpha"] for point in points] == [0, 0.25, 0.5, 1] and training["dial"]["alpha"] == 1
    expected = _divergence(tasks["base"], Ticket.load(run / "ticket"), tasks["rows"])
    assert training["kl_to_base"] == pytest.approx(expected, rel=0.03)  # bf16 forward passes of other batches
    # bf16 weights at alpha 1 are those that were trained, and at 0 the base's
    assert points[-1]["eval_loss"] == training["eval_loss"]
    assert points[0]["eval_loss"] == training["eval_loss_before"]
    rises = [point["kept"]["a"] - points[0]["kept"]["a"] for point in points]
    budget = sorted(rises)[-2] + 1e-9 if max(rises) > 0 else 0.0
    wanted = max(p["alpha"] for p, rise in zip(points, rises, strict=True) if rise <= budget)
    again = tmp_path / "again"
    argv[argv.index("--output_dir") + 1] = str(again)
    packed = ["--forget_budget", str(budget), "--ticket_form", "packed"]
    ranks(2).run(jobs.run_recipe, "train_lota", [*argv, *packed])
    assert _summary(again)["training"]["dial"]["alpha"] == wanted
    assert Ticket.load(again / "ticket").is_packed
    unpack = ["unpack", str(again / "ticket"), "--base", str(tasks["base"]), "--out", str(tmp_path / "plain")]
    assert cli(unpack) == 0
    whole, part = Ticket.load(run / "ticket"), Ticket.load(tmp_path / "plain")
    merged = load_checkpoint(again / "merged")
    for name in part.names:
        key = next(key for key in merged if key.endswith(name) or name.endswith(key))
        assert torch.equal(merged[key].view(-1)[part.mask.indices(name)], part.values(name))
    assert part.provenance["alpha"] == wanted
    if wanted < 1:
        name = max(whole.names, key=whole.mask.active)
        old, new, got = whole.base_values(name).float(), whole.values(name).float(), part.values(name).float()
        # between fp32 masters, of which the whole ticket shows the roundings
        assert ((got - (old + wanted * (new - old))).abs() <= 2**-7 * old.abs().clamp(min=new.abs()) + 1e-6).all()


def _start_again(ranks: Any, tasks: dict[str, Path], run: Path, *options: str) -> None:
    ranks(1).run(jobs.run_recipe, "train_lota", _argv(tasks["base"], str(tasks["rows"]), run, *options))


def test_overlapping_by_choice_is_merged_in_order(ranks: Any, tasks: dict[str, Path], tmp_path: Path) -> None:
    first, run = tasks["a"] / "ticket", tmp_path / "run"
    options = ("--tickets", str(first), "--overlap", "true", "--mask", str(first), "--merged", "true")
    argv = _argv(tasks["base"], str(tasks["rows"]), run, *options)
    for name in ("--score", "--calibration_steps", "--density", "--importance_batches"):
        place = argv.index(name)
        del argv[place : place + 2]
    ranks(1).run(jobs.run_recipe, "train_lota", argv)
    one, two = Ticket.load(first), Ticket.load(run / "ticket")
    assert one.mask.digest == two.mask.digest
    name = two.names[0]
    assert torch.equal(two.base_values(name), one.values(name))  # it began where the first one ended
    merged = load_checkpoint(run / "merged")
    key = next(key for key in merged if key.endswith(name) or name.endswith(key))
    assert torch.equal(merged[key].view(-1)[two.mask.indices(name)], two.values(name))


def test_an_importance_by_sampled_answers_is_the_same_on_any_ranks(
    ranks: Any, tasks: dict[str, Path], tmp_path: Path
) -> None:
    found = {}
    for world, fisher in ((1, "true"), (2, "true"), (1, "empirical")):
        run = tmp_path / f"{world}_{fisher}"
        options = ["--mask", str(tasks["a"] / "ticket"), "--retain", json.dumps([{"data": str(tasks["general"])}])]
        argv = _argv(tasks["base"], str(tasks["rows"]), run, *options, "--fisher", fisher, "--max_steps", "1")
        for name in ("--score", "--calibration_steps", "--density"):
            place = argv.index(name)
            del argv[place : place + 2]
        ranks(world).run(jobs.run_recipe, "train_lota", argv)
        found[world, fisher] = Importance.load(run / "retained" / "0.safetensors")
    one, two, rows = found.values()
    assert one.facts["fisher"] == "true" and rows.facts["fisher"] == "empirical"
    assert one.facts["micro_batches"] == two.facts["micro_batches"] == 6
    positions = {name: torch.arange(math.prod(shape), dtype=torch.int64) for name, shape in one.shapes.items()}
    for name, where in positions.items():
        torch.testing.assert_close(one.at(name, where), two.at(name, where), rtol=1e-4, atol=0)
    assert any(not torch.allclose(one.at(n, where), rows.at(n, where), rtol=0.1) for n, where in positions.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--pull", "10"), "pull needs retain"),
        (("--retain", "nowhere"), "nowhere: expected an importance file"),
        (("--retain", "[{trainfile: x}]"), "retain: unknown option 'trainfile'"),
        (("--tickets", "nowhere"), "nowhere"),
        (("--overlap", "true"), "overlap would be ignored"),
        (("--fisher", "tru"), "Did you mean 'true'"),
        (("--importance_batches", "0"), "importance_batches must be at least 1"),
        (("--method", "full", "--retain", "x"), "retain would be ignored"),
    ],
)
def test_bad_options_are_refused_before_anything(
    ranks: Any, tasks: dict[str, Path], tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    argv = _argv(tasks["base"], str(tasks["rows"]), tmp_path / "run", *options)
    if "--importance_batches" not in options:
        place = argv.index("--importance_batches")
        del argv[place : place + 2]
    if "full" in options:
        for name in ("--score", "--calibration_steps", "--density"):
            place = argv.index(name)
            del argv[place : place + 2]
    with pytest.raises(Exception, match=message):
        ranks(1).run(jobs.run_recipe, "train_lota", argv)
    assert not (tmp_path / "run").exists()


def test_a_mask_that_shares_entries_is_refused(ranks: Any, tasks: dict[str, Path], tmp_path: Path) -> None:
    ticket = str(tasks["a"] / "ticket")
    options = ("--tickets", ticket, "--mask", ticket)
    argv = _argv(tasks["base"], str(tasks["rows"]), tmp_path / "run", *options)
    for name in ("--score", "--calibration_steps", "--density", "--importance_batches"):
        place = argv.index(name)
        del argv[place : place + 2]
    with pytest.raises(Exception, match=r"shares .* entries with .*overlap: true"):
        ranks(1).run(jobs.run_recipe, "train_lota", argv)
