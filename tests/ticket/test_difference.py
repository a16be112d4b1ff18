"""Packed tickets: one stream gives the values to whoever has the base, and the base to whoever has the values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import lota
from lota.algebra import ModelTensors, pack, unpack, verify
from lota.cli import main as cli
from lota.delivery.apply import apply_to_checkpoint, revert_checkpoint
from lota.delivery.rewrite import same_bits
from lota.ticket import Ticket
from lota.ticket.difference import decode, encode
from tests.algebra.test_algebra import same_folders, ticket_of
from tests.delivery.test_folders import save_base

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def random_bits(count: int, dtype: torch.dtype, seed: int) -> Tensor:
    kind = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    info = torch.iinfo(kind)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(info.min, info.max, (count,), generator=generator, dtype=kind).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 7, 100_003])
def test_any_bits_come_back_both_ways(dtype: torch.dtype, count: int) -> None:
    """NaN with payloads, infinities, signs of zero, and the largest jumps there are."""
    base = random_bits(count, dtype, 1)
    for values in (random_bits(count, dtype, 2), base.clone(), (base.float() * 1.01).to(dtype), -base):
        data, sizes = encode(values, base)
        assert same_bits(decode(data, sizes, base, is_base=True), values)
        assert same_bits(decode(data, sizes, values, is_base=False), base)


@pytest.mark.parametrize(("rate", "bits"), [(2e-5, 2.0), (1e-4, 4.0), (1e-3, 7.5), (1e-2, 10.5)])
def test_the_stream_is_near_its_entropy(rate: float, bits: float) -> None:
    generator = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(500_000, generator=generator)).bfloat16()
    values = (base.float() + rate * torch.randn(base.shape, generator=generator)).bfloat16()
    data, _ = encode(values, base)
    assert 8 * data.numel() / base.numel() < bits  # of 32 for value and base value


def test_damage_is_an_error_and_bounded() -> None:
    base, values = random_bits(1000, torch.bfloat16, 1), random_bits(1000, torch.bfloat16, 2)
    data, sizes = encode(values, base)
    for other, parts in (
        (data[:-1], sizes),
        (data, [sizes[0] - 1, sizes[1] + 1]),
        (data, sizes[:1]),
        (torch.zeros_like(data), sizes),
    ):
        with pytest.raises(ValueError, match=r"stream|plane"):
            decode(other, parts, base, is_base=True)
    for known in (base[:999], torch.cat([base, base])):
        with pytest.raises(ValueError, match="plane of"):
            decode(data, sizes, known, is_base=True)


@pytest.mark.parametrize("form", ["packed", "values"])
def test_packed_tickets_do_what_plain_ones_do(tmp_path: Path, form: str) -> None:
    model = save_base(tmp_path / "base")
    drawn = ticket_of(model, 1, 0.2)
    before = {name: drawn.base_values(name) for name in drawn.names}
    moved = {name: (base.float() + 1e-3 * torch.randn(base.shape)).bfloat16() for name, base in before.items()}
    plain = Ticket(drawn.mask, moved, before)
    plain.save(tmp_path / "plain")
    pack(plain, tmp_path / form, form=form)
    packed = Ticket.load(tmp_path / form)
    packed.verify()
    assert packed.is_packed is (form == "packed") and packed.has_base_values
    assert packed.num_changed == Ticket.load(tmp_path / "plain").num_changed
    sizes = [sum(path.stat().st_size for path in (tmp_path / name).glob("*.safetensors")) for name in (form, "plain")]
    assert sizes[0] < (0.8 if form == "packed" else 0.97) * sizes[1]
    if form == "packed":
        with pytest.raises(ValueError, match="lota unpack TICKET --base BASE"):
            packed.values(packed.names[0])
    else:
        assert all(same_bits(packed.base_values(name), plain.base_values(name)) for name in plain.names)

    for ticket, out in ((plain, "a"), (packed, "b")):
        apply_to_checkpoint(tmp_path / "base", [ticket], tmp_path / out)
    assert same_folders(tmp_path / "a", tmp_path / "b")
    revert_checkpoint(tmp_path / "b", [packed], tmp_path / "again")
    assert same_folders(tmp_path / "again", tmp_path / "base")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    applied = lota.apply_(model, packed)
    after = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    applied.revert()
    assert all(same_bits(tensor, state[name]) for name, tensor in model.state_dict().items())
    lota.apply_(model, plain)
    assert all(same_bits(tensor, after[name]) for name, tensor in model.state_dict().items())

    base, tuned = (ModelTensors(tmp_path / name) for name in ("base", "b"))
    assert verify([packed], base=base, tuned=tuned).is_proved and verify([packed], tuned=tuned).is_proved
    assert cli(["inspect", str(tmp_path / form), "--verify"]) == 0
    unpack(packed, base, tmp_path / "plain again")
    again = (tmp_path / "plain again" / "ticket.safetensors").read_bytes()
    assert again == (tmp_path / "plain" / "ticket.safetensors").read_bytes()
