"""Whatever was on a served model before, after a switch every bit is that of the base with exactly the tickets."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lota.delivery.apply import apply_to_checkpoint
from lota.serve.served import BrokenError, ServedModel
from lota.ticket import Ticket
from tests.delivery.test_apply import load_checkpoint
from tests.delivery.test_folders import save_base
from tests.serve.fused import FusedModel
from tests.serve.servers import make_ticket

RANKS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base; tickets A and B that share no entry, C that shares some with both, and one of another base."""
    folder = tmp_path_factory.mktemp("served")
    model = save_base(folder / "base", max_shard_size="20KB")
    make_ticket(model, 1, folder / "A", 0)
    make_ticket(model, 2, folder / "B", 1)
    make_ticket(model, 3, folder / "C")
    make_ticket(save_base(folder / "other", seed=1), 1, folder / "wrong")
    for names in itertools.chain.from_iterable(itertools.combinations("AB", n) for n in (1, 2)):
        tickets = [Ticket.load(folder / name) for name in names]
        apply_to_checkpoint(folder / "base", tickets, folder / f"applied-{''.join(names)}")
    return folder


class Rank:
    """One rank: its model, and what a server does around `ServedModel`."""

    def __init__(self, base: Path, rank: int = 0, *, is_plain: bool = True, keep: int = 8) -> None:
        checkpoint = load_checkpoint(base)
        self.model = FusedModel(checkpoint, rank, RANKS)
        self.model.load_weights(checkpoint.items())
        self.num_reloads = 0
        self.fails_at: int | None = None
        self.is_plain = is_plain
        self.served = ServedModel(base, self.model.load_weights, self.reload, lambda _: self.is_plain, keep=keep)

    def reload(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """As packed weights are: all from the files, none of what was there."""
        self.num_reloads += 1
        for parameter in self.model.parameters():
            parameter.data.fill_(torch.nan)
        for number, weight in enumerate(weights):
            if number == self.fails_at:
                self.fails_at = None
                raise OSError("the disk is gone")
            self.model.load_weights([weight])

    def switch(self, folder: Path, *names: str, rule: str = "refuse") -> None:
        self.served.prepare([str(folder / name) for name in names], rule)
        self.served.switch()

    def state(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def has(self, checkpoint: dict[str, Tensor]) -> bool:
        """Whether the model is, in every bit, what loading this checkpoint makes."""
        wanted = FusedModel(checkpoint, self.model.rank, RANKS)
        wanted.load_weights(checkpoint.items())
        return same(self.state(), dict(wanted.named_parameters()))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name].view(torch.int16), other[name].detach().view(torch.int16)) for name in one)


@pytest.mark.parametrize("is_plain", [True, False])
@pytest.mark.parametrize("rank", range(RANKS))
def test_switches_in_any_order(folder: Path, rank: int, is_plain: bool) -> None:
    served = Rank(folder / "base", rank, is_plain=is_plain)
    states = {names: load_checkpoint(folder / f"applied-{names}") for names in ("A", "B", "AB")}
    states[""] = load_checkpoint(folder / "base")
    order = random.Random(rank)
    for names in ["A", "AB", "B", "", *order.choices(list(states), k=12), ""]:
        served.switch(folder, *names)
        assert served.has(states[names]), names
    assert served.served.is_in_place is is_plain
    assert (served.num_reloads == 0) is is_plain


@pytest.mark.parametrize("is_plain", [True, False])
@pytest.mark.parametrize("rule", ["last", "sum"])
def test_shared_entries(folder: Path, rule: str, is_plain: bool) -> None:
    served, base = Rank(folder / "base", is_plain=is_plain), load_checkpoint(folder / "base")
    with pytest.raises(ValueError, match=r"share \d+ entries.*--rule"):
        served.switch(folder, "A", "C")
    served.switch(folder, "A", "C", rule=rule)
    wanted = {name: tensor.clone() for name, tensor in base.items()}
    tickets = [Ticket.load(folder / name) for name in "AC"]
    for name in tickets[0].names:
        total, count = torch.zeros(base[name].shape), torch.zeros(base[name].shape)
        for ticket in tickets:
            where = ticket.mask.dense(name)
            changes = torch.zeros(base[name].shape, dtype=torch.bool)
            changes[where] = ticket.values(name).view(torch.int16) != base[name][where].view(torch.int16)
            given = base[name].clone()
            given[where] = ticket.values(name)
            wanted[name][changes] = given[changes]
            total, count = total + given.float() - base[name].float(), count + changes
        if rule == "sum":
            summed = (base[name].float() + total).to(base[name].dtype)
            wanted[name][count > 1] = summed[count > 1]
    assert served.has(wanted)
    served.switch(folder)
    assert served.has(base)


def test_what_is_refused_leaves_every_bit(folder: Path, tmp_path: Path) -> None:
    served = Rank(folder / "base")
    served.switch(folder, "A")
    before = served.state()
    Ticket.load(folder / "B").save(tmp_path / "damaged")
    values = tmp_path / "damaged" / "ticket.safetensors"
    content = bytearray(values.read_bytes())
    content[-9] ^= 1
    values.write_bytes(content)
    for names, words in [
        (["wrong"], "belongs to another base model"),
        (["B", "wrong"], "belongs to another base model"),
        ([str(tmp_path / "damaged")], "sha256"),
        (["nothing"], "nothing"),
        (["base"], "finds no ticket there"),
        (["B", "B"], "every ticket once"),
    ]:
        with pytest.raises(ValueError, match=words):
            served.switch(folder, *names)
        with pytest.raises(ValueError, match="prepare it first"):
            served.served.switch()
        assert same(served.state(), before), names
    served.switch(folder, "A", "B")
    assert served.has(load_checkpoint(folder / "applied-AB"))


def test_the_second_switch_reads_no_values(folder: Path, tmp_path: Path) -> None:
    served = Rank(folder / "base", keep=1)
    for name in "AB":
        Ticket.load(folder / name).save(tmp_path / name)
    served.switch(tmp_path, "A")
    served.switch(tmp_path)
    (tmp_path / "A" / "ticket.safetensors").unlink()
    served.switch(tmp_path, "A")
    assert served.has(load_checkpoint(folder / "applied-A"))
    served.switch(tmp_path, "B")
    with pytest.raises(ValueError, match="A"):
        served.switch(tmp_path, "A")  # more than it keeps, so A is read again
    assert served.has(load_checkpoint(folder / "applied-B"))


def test_another_ticket_at_the_same_place_is_read(folder: Path, tmp_path: Path) -> None:
    served = Rank(folder / "base")
    Ticket.load(folder / "A").save(tmp_path / "mine")
    served.switch(tmp_path, "mine")
    Ticket.load(folder / "B").save(tmp_path / "mine", overwrite=True)
    served.switch(tmp_path, "mine")
    assert served.has(load_checkpoint(folder / "applied-B"))


def test_a_base_whose_files_changed_is_refused(folder: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "base", max_shard_size="20KB")
    served = Rank(tmp_path / "base")
    save_base(tmp_path / "base", max_shard_size="20KB")
    with pytest.raises(ValueError, match="changed since the server loaded them"):
        served.switch(folder, "A")


def test_a_ticket_on_packed_weights_ends_writing_in_place(folder: Path) -> None:
    """A is on in place when B names a tensor that the server packed."""
    served = Rank(folder / "base")
    served.switch(folder, "A")
    served.is_plain = False
    served.switch(folder, "A", "B")
    assert served.has(load_checkpoint(folder / "applied-AB"))
    assert not served.served.is_in_place and served.num_reloads == 1
    served.switch(folder, "A")
    served.switch(folder)
    assert served.has(load_checkpoint(folder / "base"))


@pytest.mark.parametrize("number", [0, 7])
def test_a_failed_write_leaves_the_base(folder: Path, number: int) -> None:
    served, base = Rank(folder / "base", is_plain=False), load_checkpoint(folder / "base")
    served.switch(folder, "A")
    served.fails_at = number
    with pytest.raises(ValueError, match="is its base again: the disk is gone"):
        served.switch(folder, "B")
    assert served.has(base)
    served.switch(folder, "B")
    assert served.has(load_checkpoint(folder / "applied-B"))


def test_a_model_that_cannot_be_put_back_is_known_to_be_broken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device fails in the middle of the writes, and again; once it works, any switch repairs the model."""
    served = Rank(folder / "base")
    served.switch(folder, "A")
    index_copy_, calls = Tensor.index_copy_, itertools.count()

    def failing(self: Tensor, *args: object) -> Tensor:
        if next(calls) >= 3:
            raise RuntimeError("device lost")
        return index_copy_(self, *args)  # type: ignore[arg-type]

    served.served.prepare([str(folder / "B")])
    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "index_copy_", failing)
        with pytest.raises(BrokenError, match="device lost"):
            served.served.switch()
    assert not served.has(load_checkpoint(folder / "base"))
    served.switch(folder)
    assert served.has(load_checkpoint(folder / "base"))
