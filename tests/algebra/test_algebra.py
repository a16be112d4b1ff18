"""Any two checkpoints become a ticket and are proved; tickets merge, scale, trim and combine as their formulas say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lota.algebra import Merge, ModelTensors, diff, extract, masks, merge, overlap, scale, trim, verify
from lota.cli import main as cli
from lota.delivery.apply import apply_to_checkpoint, revert_checkpoint
from lota.delivery.rewrite import same_bits
from lota.selection import cut
from lota.ticket import Mask, Ticket
from tests import architectures
from tests.delivery.architecture_table import load, logits, make_ticket
from tests.delivery.test_apply import load_checkpoint
from tests.delivery.test_folders import save_base, tensors_of


def same_folders(one: Path, other: Path) -> bool:
    a, b = load_checkpoint(one), load_checkpoint(other)
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def tune(folder: Path, out: Path, share: float, rate: float) -> None:
    """A fine-tune of all tensors, head and norms too: a share of the entries moves."""
    generator = torch.Generator().manual_seed(1)
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            moved = torch.rand(tensor.shape, generator=generator) < share
            step = rate * torch.randn(tensor.shape, generator=generator)
            tensors[name] = torch.where(moved, tensor.float() + step, tensor.float()).to(tensor.dtype)
        save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "gpt2", "gemma2"])
def test_a_lossless_extract_is_the_tuned_model(tmp_path: Path, kind: str) -> None:
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    architectures.make_model(kind).save_pretrained(base, max_shard_size="40KB")
    tune(base, tuned, share=0.3, rate=0.05)
    made = extract(ModelTensors(base), ModelTensors(tuned), tmp_path / "ticket")
    ticket = Ticket.load(tmp_path / "ticket")
    assert made.num_lost == 0 and made.num_active == made.num_changed == ticket.num_changed
    apply_to_checkpoint(base, [ticket], tmp_path / "applied")
    assert same_folders(tmp_path / "applied", tuned)
    revert_checkpoint(tuned, [ticket], tmp_path / "reverted")
    assert same_folders(tmp_path / "reverted", base)
    for options in ({"base": ModelTensors(base), "tuned": ModelTensors(tuned)}, {"tuned": ModelTensors(tuned)}):
        verdict = verify([ticket], **options)
        assert verdict.is_proved and not verdict.not_compared, verdict.problems


def test_an_extract_with_a_density_keeps_what_moved_most(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    tune(tmp_path / "base", tmp_path / "tuned", share=0.5, rate=0.05)
    base, tuned = (ModelTensors(tmp_path / name) for name in ("base", "tuned"))
    for score in ("magnitude", "relative"):
        made = extract(base, tuned, tmp_path / score, density=0.05, score=score)
        ticket = Ticket.load(tmp_path / score)
        before, after = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "tuned")
        sizes = {name: (after[name].float() - before[name].float()).abs() for name in ticket.names}
        if score == "relative":
            sizes = {name: torch.where(s > 0, s / before[name].float().abs(), s) for name, s in sizes.items()}
        ranked = torch.cat([size.flatten() for size in sizes.values()]).sort(descending=True).values
        assert ticket.num_active == round(0.05 * ranked.numel()) and all("proj" in name for name in ticket.names)
        least = min(
            float(sizes[name][ticket.mask.dense(name)].min()) for name in ticket.names if ticket.mask.active(name)
        )
        assert least == float(ranked[ticket.num_active - 1])
        assert made.num_lost == made.num_changed - ticket.num_changed and 0 < made.lost_norm < 1


def test_a_lora_becomes_a_ticket(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    save_base(tmp_path / "base")
    torch.manual_seed(0)
    adapted = get_peft_model(load(tmp_path / "base"), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    words = ["extract", "--base", str(tmp_path / "base"), "--lora", str(tmp_path / "adapter")]
    assert cli([*words, "--out", str(tmp_path / "ticket")]) == 0
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    ticket = Ticket.load(tmp_path / "ticket")
    apply_to_checkpoint(tmp_path / "base", [ticket], tmp_path / "applied")
    assert same_folders(tmp_path / "applied", tmp_path / "merged")
    revert_checkpoint(tmp_path / "merged", [ticket], tmp_path / "reverted")
    assert same_folders(tmp_path / "reverted", tmp_path / "base")


def test_verify_names_a_flipped_bit_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parameters that are trained and not, embeddings, norms, and a buffer."""
    architectures.make_model("deepseek_v3").save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base")
    names = [name for name, _ in model.named_parameters() if "q_b_proj" in name]
    ticket = make_ticket(model, names)
    ticket.save(tmp_path / "ticket")
    apply_to_checkpoint(tmp_path / "base", [ticket], tmp_path / "tuned")
    words = ["verify", str(tmp_path / "ticket"), "--tuned"]
    assert cli([*words, str(tmp_path / "tuned")]) == 0
    tensors = tensors_of(tmp_path / "tuned")
    for name in (names[0], "lm_head.weight", "model.norm.weight", "model.layers.1.mlp.gate.e_score_correction_bias"):
        other = tmp_path / name
        other.mkdir()
        changed = {key: tensor.clone() for key, tensor in tensors.items()}
        changed[name].view(-1).view(torch.uint8)[5] ^= 1
        save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
        (other / "config.json").write_bytes((tmp_path / "base" / "config.json").read_bytes())
        for more in ([], ["--base", str(tmp_path / "base")]):
            capsys.readouterr()
            assert cli([*words, str(other), *more, "--json"]) == 1
            found = json.loads(capsys.readouterr().out)
            assert len(found["problems"]) == 1 and found["problems"][0].startswith(name), found["problems"]
        (row,) = [row for row in diff(ModelTensors(tmp_path / "tuned"), ModelTensors(other)) if row.kind != "equal"]
        assert row.name == name and row.num_changed == 1


def test_protected_entries_are_proved(tmp_path: Path) -> None:
    model = save_base(tmp_path / "base")
    first, second = ticket_of(model, 1, 0.1), ticket_of(model, 2, 0.1)
    apply_to_checkpoint(tmp_path / "base", [first], tmp_path / "tuned")
    base, tuned = (ModelTensors(tmp_path / name) for name in ("base", "tuned"))
    free = masks.minus([second.mask, first.mask])
    assert verify([first], base=base, tuned=tuned, protected=[free]).is_proved
    (problem, *_) = verify([first], base=base, tuned=tuned, protected=[second.mask]).problems
    assert "protected entries moved" in problem


def ticket_of(model: Any, seed: int, density: float = 0.05, part: str = "proj") -> Ticket:
    names = [name for name, _ in model.named_parameters() if part in name]
    made = make_ticket(model, names, density)
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    chosen = {name: torch.rand(parameters[name].shape, generator=generator) < density for name in names}
    mask = Mask.from_dense(chosen).with_base(made.mask.base, made.mask.frozen)
    before = {name: parameters[name].detach()[chosen[name]] for name in names}
    values = {
        name: (tensor.float() + 0.1 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        for name, tensor in before.items()
    }
    return Ticket(mask, values, before)


def dense_differences(model: Any, tickets: list[Ticket], name: str) -> tuple[Tensor, Tensor]:
    """The base in fp32, and the tickets' differences as dense tensors: what mergekit computes with."""
    base = dict(model.named_parameters())[name].detach().float()
    rows = []
    for ticket in tickets:
        row = torch.zeros_like(base)
        row[ticket.mask.dense(name)] = ticket.values(name).float() - base[ticket.mask.dense(name)]
        rows.append(row)
    return base, torch.stack(rows)


def oracle(base: Tensor, deltas: Tensor, how: Merge) -> Tensor:
    """mergekit 0.1.5's formulas (generalized_task_arithmetic, linear), in float32."""
    weights = torch.tensor(how.weights or [1.0] * len(deltas)).view(-1, 1, 1)
    if how.method == "linear":
        total = torch.zeros_like(base)
        for delta, weight in zip(deltas, weights, strict=True):
            total.addcmul_(base + delta, weight)
        return total / weights.sum()
    if how.method == "ties":
        kept = []
        for delta in deltas:
            count = max(1, int(how.density * delta.numel()))
            mask = torch.zeros(delta.numel())
            mask[delta.abs().flatten().argsort(descending=True)[:count]] = 1
            kept.append(delta * mask.view_as(delta))
        deltas = torch.stack(kept) * weights
        majority = (deltas.sum(0) >= 0).float() * 2 - 1
        agree = deltas.sign() == majority
        divisor = (weights * agree).sum(0)
        divisor[divisor == 0] = 1
        return base + (deltas * agree).sum(0) / divisor
    return base + (deltas * weights).sum(0)


@pytest.mark.parametrize(
    "how",
    [
        Merge(),
        Merge("sum", [0.7, 1.3, -0.2]),
        Merge("linear", [1.0, 2.0, 0.5]),
        Merge("ties", density=0.02),
        Merge("ties", [0.5, 1.0, 2.0], density=0.03),
    ],
    ids=lambda how: how.method,
)
def test_merges_are_those_of_dense_models(tmp_path: Path, how: Merge) -> None:
    model = save_base(tmp_path / "base", dtype=torch.float32)
    tickets = [ticket_of(model, seed) for seed in range(3)]
    merge(tickets, tmp_path / "merged", how)
    made = Ticket.load(tmp_path / "merged")
    for name in made.names:
        base, deltas = dense_differences(model, tickets, name)
        wanted, got = oracle(base, deltas, how), base.clone()
        got[made.mask.dense(name)] = made.values(name)
        active = made.mask.dense(name)
        assert torch.equal(active, (deltas != 0).any(0))
        assert torch.equal(got[active], wanted[active]), (got[active] - wanted[active]).abs().max()


def test_tickets_that_share_nothing_merge_bit_for_bit(tmp_path: Path) -> None:
    model = save_base(tmp_path / "base")
    first = ticket_of(model, 1, 0.2)
    rest = [masks.minus([ticket_of(model, seed, 0.2).mask, first.mask]) for seed in (2,)]
    second_all = ticket_of(model, 2, 0.2)
    second = Ticket(
        rest[0],
        {
            n: second_all.values(n)[~torch.isin(second_all.mask.indices(n), first.mask.indices(n))]
            for n in rest[0].names
        },
        {
            n: second_all.base_values(n)[~torch.isin(second_all.mask.indices(n), first.mask.indices(n))]
            for n in rest[0].names
        },
    )
    for order in ([first, second], [second, first]):
        merge(order, tmp_path / "merged", overwrite=True)
        made = Ticket.load(tmp_path / "merged")
        apply_to_checkpoint(tmp_path / "base", order, tmp_path / f"both-{order[0] is first}")
        apply_to_checkpoint(tmp_path / "base", [made], tmp_path / f"one-{order[0] is first}")
        assert same_folders(tmp_path / f"both-{order[0] is first}", tmp_path / f"one-{order[0] is first}")


def test_random_drops_are_fixed_by_their_seed_and_keep_the_mean(tmp_path: Path) -> None:
    model = save_base(tmp_path / "base", dtype=torch.float32)
    tickets = [ticket_of(model, seed, 0.5) for seed in range(2)]
    for method in ("dare", "della"):
        totals = []
        for seed in (0, 0, 1):
            merge(tickets, tmp_path / "m", Merge(method, density=0.5, seed=seed), overwrite=True)
            made = Ticket.load(tmp_path / "m")
            totals.append(torch.cat([made.values(name) - made.base_values(name) for name in made.names]))
        assert torch.equal(totals[0], totals[1]) and not torch.equal(totals[0], totals[2])
        merge(tickets, tmp_path / "m", overwrite=True)
        whole = Ticket.load(tmp_path / "m")
        plain = torch.cat([whole.values(name) - whole.base_values(name) for name in whole.names])
        dropped = float((totals[0] == 0).float().mean())
        assert 0.2 < dropped < 0.5 and abs(float(totals[0].abs().mean() / plain.abs().mean()) - 1) < 0.1


def test_weights_by_pattern_and_layer(tmp_path: Path) -> None:
    model = save_base(tmp_path / "base", dtype=torch.float32)
    tickets = [ticket_of(model, seed) for seed in range(2)]
    how = Merge(weights=[1, 1], of_patterns={"*.mlp.*": [0.5, 0.0]}, layers=(0.5, 1.0))
    merge(tickets, tmp_path / "m", how)
    made = Ticket.load(tmp_path / "m")
    for name in made.names:
        base, deltas = dense_differences(model, tickets, name)
        layer = 0.5 if ".0." in name else 1.5
        weights = [0.5 * layer, 0.0] if ".mlp." in name else [layer, layer]
        wanted = base + (deltas * torch.tensor(weights).view(-1, 1, 1)).sum(0)
        active = made.mask.dense(name)
        assert torch.equal(made.values(name), wanted[active])


def test_merging_refuses(tmp_path: Path) -> None:
    one, other = save_base(tmp_path / "a"), save_base(tmp_path / "b", seed=5)
    with pytest.raises(ValueError, match="ticket 2 is of another base than the ones before it"):
        merge([ticket_of(one, 1), ticket_of(other, 1)], tmp_path / "m")
    for how, message in (
        (Merge("mean"), "method must be one of"),
        (Merge(weights=[1]), "a weight for each of 2"),
        (Merge(density=0), "density must be"),
        (Merge("della", density=0.05, epsilon=0.1), "density -/\\+ epsilon"),
    ):
        with pytest.raises(ValueError, match=message):
            merge([ticket_of(one, 1), ticket_of(one, 2)], tmp_path / "m", how)
    assert not (tmp_path / "m").exists()


def test_scale_and_trim(tmp_path: Path) -> None:
    model = save_base(tmp_path / "base")
    ticket = ticket_of(model, 1, 0.2)
    for factor in (0.0, 0.3, 1.0, 1.5):
        scale(ticket, factor, tmp_path / "s", overwrite=True)
        made = Ticket.load(tmp_path / "s")
        for name in ticket.names:
            base, values = ticket.base_values(name), ticket.values(name)
            wanted = (base.float() + factor * (values.float() - base.float())).to(base.dtype)
            assert same_bits(made.values(name), {0.0: base, 1.0: values}.get(factor, wanted))
    sizes = np.concatenate(
        [(ticket.values(n).float() - ticket.base_values(n).float()).abs().numpy() for n in ticket.names]
    )
    for keep in (0.01, 0.3, 1.0):
        trim(ticket, keep, tmp_path / "t", overwrite=True)
        made = Ticket.load(tmp_path / "t")
        assert made.num_active == round(keep * ticket.num_active) and made.mask.overlap(ticket.mask) == made.num_active
        kept = np.concatenate(
            [(made.values(n).float() - made.base_values(n).float()).abs().numpy() for n in made.names]
        )
        assert np.array_equal(np.sort(kept), np.sort(sizes)[len(sizes) - len(kept) :])


def test_overlap_counts_what_is_shared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_base(tmp_path / "base")
    tickets = [ticket_of(model, seed, 0.3) for seed in range(3)]
    for number, ticket in enumerate(tickets):
        ticket.save(tmp_path / str(number))
    rows = list(overlap(tickets, per_tensor=True))
    totals = [row for row in rows if not row.name]
    assert [(row.a, row.b) for row in totals] == [(0, 1), (0, 2), (1, 2)]
    for row in totals:
        shared = conflicts = 0
        mass = kept = 0.0
        for name in tickets[0].names:
            _, deltas = dense_differences(model, [tickets[row.a], tickets[row.b]], name)
            both = tickets[row.a].mask.dense(name) & tickets[row.b].mask.dense(name)
            shared += int(both.sum())
            conflicts += int((deltas[0] * deltas[1] < 0)[both].sum())
            mass += float(deltas.double().abs().sum())
            kept += float(deltas.double().sum(0).abs().sum())
        assert (row.shared, row.conflicts) == (shared, conflicts)
        assert row.lost == pytest.approx(1 - kept / mass)
        assert shared == sum(part.shared for part in rows if part.name and (part.a, part.b) == (row.a, row.b))
    paths = [str(tmp_path / str(number)) for number in range(3)]
    assert (
        cli(["overlap", *paths, "--plot", str(tmp_path / "o.png")]) == 0 and (tmp_path / "o.png").stat().st_size > 5000
    )
    assert cli(["overlap", paths[0], paths[0], "--json"]) == 0
    (pair,) = json.loads(capsys.readouterr().out.split("\n", 3)[-1])["pairs"]
    assert pair["shared"] == tickets[0].num_active and pair["conflicts"] == 0 and pair["lost"] == 0


def test_masks_of_masks_models_and_files(tmp_path: Path) -> None:
    model = save_base(tmp_path / "base")
    a, b = (ticket_of(model, seed, 0.3).mask for seed in (1, 2))
    for made, combine in (
        (masks.union([a, b]), lambda x, y: x | y),
        (masks.intersection([a, b]), lambda x, y: x & y),
        (masks.minus([a, b]), lambda x, y: x & ~y),
    ):
        assert made.base and made.frozen
        assert all(torch.equal(made.dense(n), combine(a.dense(n), b.dense(n))) for n in made.names)
    pruned = tensors_of(tmp_path / "base")
    name = "model.layers.0.mlp.up_proj.weight"
    pruned[name][:10] = 0
    save_file(pruned, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    alive = masks.nonzero(ModelTensors(tmp_path / "base"))
    assert torch.equal(alive.dense(name), pruned[name] != 0) and "lm_head.weight" not in alive.names
    dense = {name: a.dense(name) for name in a.names}
    save_file(dense, tmp_path / "m.safetensors")
    torch.save({name: ~flags for name, flags in dense.items()}, tmp_path / "m.pt")  # True is frozen there
    assert masks.from_file(tmp_path / "m.safetensors") == masks.from_file(tmp_path / "m.pt") == a
    assert masks.from_file(tmp_path / "m.pt", "active") != a
    torch.save({"x": Path}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="without running code"):
        masks.from_file(tmp_path / "code.pt")
    with pytest.raises(ValueError, match="expected boolean masks, got lm_head"):
        masks.from_file(tmp_path / "base" / "model.safetensors")


def test_an_aligned_model_protects_what_it_was_aligned_with(ranks: Any, tmp_path: Path) -> None:
    """`protect_from` in a run, on two ranks, and `lota mask --changed`: the entries that moved most stay."""
    from tests.train import jobs
    from tests.train.test_merged import save_base as with_tokenizer

    base, tuned = with_tokenizer("tied", tmp_path / "base"), tmp_path / "tuned"
    tune(base, tuned, share=0.3, rate=0.05)
    words = ["mask", "--changed", str(base), str(tuned), "--density", "0.1", "--out", str(tmp_path / "aligned")]
    assert cli(words) == 0
    aligned = Mask.load(tmp_path / "aligned")
    assert aligned.num_active == round(0.1 * aligned.eligible)
    rows = [{"prompt": f"Q: {number}", "completion": f" {number}"} for number in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    argv = ["--model_name_or_path", str(tuned), "--train_file", str(tmp_path / "rows.jsonl")]
    argv += ["--output_dir", str(tmp_path / "run"), "--score", "gradient", "--calibration_steps", "1"]
    argv += ["--max_steps", "1"]
    argv += ["--density", "0.5", "--per_device_train_batch_size", "2", "--bf16", "true", "--max_length", "32"]
    argv += ["--learning_rate", "1e-2", "--report_to", "none", "--merged", "true"]
    argv += ["--keep_ranking", "true"]
    argv += ["--protect_from", json.dumps({"base": str(base), "tuned": str(tuned), "density": 0.1})]
    ranks(2).run(jobs.run_recipe, "train_lota", argv)
    ticket = Ticket.load(tmp_path / "run" / "ticket")
    assert Mask.load(tmp_path / "run" / "protected") == aligned and ticket.num_changed
    assert ticket.mask.overlap(aligned) == 0
    assert cut(tmp_path / "run" / "ranking", 0.5) == ticket.mask
    lower = cut(tmp_path / "run" / "ranking", 0.1)
    assert lower.num_active == round(0.1 * lower.eligible) == lower.overlap(ticket.mask)
    models = (ModelTensors(tuned), ModelTensors(tmp_path / "run" / "merged"))
    assert verify([ticket], base=models[0], tuned=models[1], protected=[aligned]).is_proved


def test_several_tickets_in_one_adapter(tmp_path: Path) -> None:
    from peft import PeftModel

    model = save_base(tmp_path / "base")
    ticket_of(model, 1, part="q_proj").save(tmp_path / "a")
    ticket_of(model, 2, part="down_proj").save(tmp_path / "b")
    words = ["export", str(tmp_path / "a"), str(tmp_path / "b"), "--base", str(tmp_path / "base")]
    for form in ("peft", "hf"):
        assert cli([*words, "--format", form, "--out", str(tmp_path / form)]) == 0
    adapted = PeftModel.from_pretrained(load(tmp_path / "base"), str(tmp_path / "peft"))
    assert torch.equal(logits(adapted), logits(load(tmp_path / "hf")))
    assert not torch.equal(logits(adapted), logits(load(tmp_path / "base")))
    assert cli([*words[:2], *words[1:], "--format", "peft", "--out", str(tmp_path / "c")]) == 2  # one of them twice
