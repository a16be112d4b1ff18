"""Contract: a ticket comes back bit for bit, is written whole or not at all, and is as small as promised."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lota.ticket import BaseTensor, Mask, Ticket, TicketWriter, read_manifest
from tests.ticket.test_fingerprint import DTYPES, random_values
from tests.ticket.test_mask import BASE, dense_tensors

PROVENANCE = {"task": "gsm8k", "steps": 60, "nested": {"list": [1, 2.5, None, True]}, "text": "naïve \u2713"}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def make_ticket(
    dtype: torch.dtype = torch.bfloat16, base_dtype: torch.dtype | None = torch.bfloat16, base: bool = True
) -> Ticket:
    mask = Mask.from_dense(dense_tensors(), BASE if base else None)
    values = {name: random_values(mask.active(name), dtype, seed) for seed, name in enumerate(mask.names)}
    base_values = None
    if base_dtype is not None:
        base_values = {name: random_values(mask.active(name), base_dtype, 9) for name in mask.names}
    return Ticket(mask, values, base_values, PROVENANCE)


def assert_equal_tickets(one: Ticket, other: Ticket) -> None:
    assert one.mask == other.mask
    assert one.names == other.names
    assert one.mask.base == other.mask.base
    assert one.provenance == other.provenance
    assert one.has_base_values == other.has_base_values
    for name in one.names:
        assert same_bits(one.values(name), other.values(name))
        if one.has_base_values:
            assert same_bits(one.base_values(name), other.base_values(name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base_dtype", [*DTYPES, None])
def test_round_trip_is_bit_exact(tmp_path: Path, dtype: torch.dtype, base_dtype: torch.dtype | None) -> None:
    """Random bit patterns hold NaN payloads, infinities, subnormals and -0.0."""
    ticket = make_ticket(dtype, base_dtype, base=False)
    ticket.save(tmp_path / "ticket")
    loaded = Ticket.load(tmp_path / "ticket")
    assert_equal_tickets(loaded, ticket)
    loaded.verify()
    if base_dtype is not None:
        assert loaded.num_changed == ticket.num_changed
    assert Mask.load(tmp_path / "ticket") == ticket.mask


def test_special_values_survive(tmp_path: Path) -> None:
    patterns = torch.tensor([0x7FC1, -0x8000, 0x7F80, 0x7FFF, 0x0001, -0x0001], dtype=torch.int16).view(torch.bfloat16)
    mask = Mask.from_dense({"w": torch.ones(2, 3, dtype=torch.bool)})
    Ticket(mask, {"w": patterns}, None, {}).save(tmp_path / "t")
    assert same_bits(Ticket.load(tmp_path / "t").values("w"), patterns)


def test_safetensors_reads_every_file(tmp_path: Path) -> None:
    """Mixed dtypes and odd counts: every tensor lies aligned, as other readers need it."""
    mask = Mask.from_dense({f"t{k}": torch.rand(50, 3) < 0.3 for k in range(6)})
    values = {name: random_values(mask.active(name), DTYPES[k % 3], k) for k, name in enumerate(mask.names)}
    base_values = {
        name: random_values(mask.active(name), DTYPES[(k + k // 3) % 3], k) for k, name in enumerate(mask.names)
    }
    Ticket(mask, values, base_values).save(tmp_path / "t", shard_bytes=600)
    files = sorted((tmp_path / "t").glob("*.safetensors"))
    assert len(files) > 1
    assert files[0].name == f"ticket-00001-of-{len(files):05d}.safetensors"
    seen = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            seen |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - safe_open is no mapping
    for name in mask.names:
        assert same_bits(seen[f"{name}.values"], values[name])
        assert same_bits(seen[f"{name}.base_values"], base_values[name])
        assert seen[f"{name}.index"].dtype == torch.uint8
    assert_equal_tickets(Ticket.load(tmp_path / "t"), Ticket(mask, values, base_values))


def test_shards_stay_below_their_bound(tmp_path: Path) -> None:
    mask = Mask.from_dense({f"t{k}": torch.rand(1000) < 0.5 for k in range(10)})
    ticket = Ticket(mask, {name: torch.randn(mask.active(name)) for name in mask.names})
    ticket.save(tmp_path / "t", shard_bytes=5000)
    sizes = [path.stat().st_size for path in (tmp_path / "t").glob("*.safetensors")]
    assert len(sizes) == 5
    assert max(sizes) < 5000 + 4000  # data within the bound, and the room for the header
    assert_equal_tickets(Ticket.load(tmp_path / "t"), ticket)


@pytest.mark.parametrize(("density", "bound"), [(0.1, 2.15), (0.01, 0.25)])
def test_bits_a_weight(tmp_path: Path, density: float, bound: float) -> None:
    """Index and bf16 value on a uniform random mask, all files counted."""
    numel = 4_000_000
    mask = Mask.from_dense({"w": torch.rand(2000, 2000, generator=torch.Generator().manual_seed(1)) < density})
    Ticket(mask, {"w": torch.randn(mask.num_active).bfloat16()}).save(tmp_path / "t")
    bits = 8 * sum(path.stat().st_size for path in (tmp_path / "t").iterdir()) / numel
    assert bits * density * numel / mask.num_active <= bound  # for exactly this density: the random mask is a bit off


def test_num_changed() -> None:
    mask = Mask.from_dense({"w": torch.ones(6, dtype=torch.bool)})
    base = torch.tensor([1.0, 2.0, 0.0, float("nan"), 5.0, 6.0]).bfloat16()
    values = torch.tensor([1.0, 2.5, -0.0, float("nan"), 5.0, 6.0])
    values[3] = base[3].float()  # the same NaN: compared by bits, it has not changed
    values[4] += 1e-6  # lost in bf16, kept in fp32
    assert Ticket(mask, {"w": values.bfloat16()}, {"w": base}).num_changed == 2
    assert Ticket(mask, {"w": values}, {"w": base}).num_changed == 3
    with pytest.raises(ValueError, match=r"holds no base values"):
        _ = Ticket(mask, {"w": values}).num_changed


def test_writer_streams_and_reports(tmp_path: Path) -> None:
    ticket = make_ticket()
    with TicketWriter(tmp_path / "t", ticket.mask, PROVENANCE) as writer:
        for name in reversed(ticket.names):  # any order
            writer.add(name, ticket.values(name), ticket.base_values(name))
            assert not (tmp_path / "t").exists()
    assert_equal_tickets(Ticket.load(tmp_path / "t"), ticket)
    assert writer.num_changed == ticket.num_changed
    assert writer.num_bytes == sum(path.stat().st_size for path in (tmp_path / "t").iterdir())
    manifest = read_manifest(tmp_path / "t")
    assert (manifest.num_active, manifest.eligible) == (ticket.num_active, ticket.mask.eligible)
    assert manifest.provenance == PROVENANCE
    with pytest.raises(ValueError, match=r"this writer is closed"):
        writer.add("a", ticket.values("a"), ticket.base_values("a"))


def test_a_writer_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    ticket = make_ticket()
    with pytest.raises(ValueError, match=r"got 1; missing: b, c, d\. Add every name"):  # noqa: SIM117
        with TicketWriter(tmp_path / "t", ticket.mask) as writer:
            writer.add("a", ticket.values("a"))
    with pytest.raises(KeyboardInterrupt):  # noqa: SIM117
        with TicketWriter(tmp_path / "t", ticket.mask) as writer:
            writer.add("a", ticket.values("a"))
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_the_earlier_ticket(tmp_path: Path) -> None:
    ticket = make_ticket()
    ticket.save(tmp_path / "t")
    child = os.fork()
    if child == 0:
        writer = TicketWriter(tmp_path / "t", ticket.mask, overwrite=True)
        writer.add("a", ticket.values("a"))
        os._exit(0)
    os.waitpid(child, 0)
    assert_equal_tickets(Ticket.load(tmp_path / "t"), ticket)
    assert all(path.name.startswith(".t.tmp-") for path in tmp_path.iterdir() if path.name != "t")


def test_overwrite(tmp_path: Path) -> None:
    ticket, other = make_ticket(), make_ticket(torch.float32)
    ticket.save(tmp_path / "t")
    with pytest.raises(ValueError, match=r"an empty one, got files in it. Pass overwrite=True"):
        other.save(tmp_path / "t")
    assert_equal_tickets(Ticket.load(tmp_path / "t"), ticket)
    other.save(tmp_path / "t", overwrite=True)
    assert_equal_tickets(Ticket.load(tmp_path / "t"), other)
    loaded = Ticket.load(tmp_path / "t")
    loaded.save(tmp_path / "t", overwrite=True)  # reads from what it replaces
    assert_equal_tickets(loaded, other)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
    (tmp_path / "empty").mkdir()
    ticket.save(tmp_path / "empty")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").touch()
    with pytest.raises(ValueError, match=r"the directory holds no ticket.json"):
        ticket.save(tmp_path / "photos", overwrite=True)
    with pytest.raises(ValueError, match=r"got a file. Choose another name"):
        ticket.save(tmp_path / "photos" / "one.jpg", overwrite=True)


def test_messages(tmp_path: Path) -> None:
    ticket = make_ticket()
    mask, values = ticket.mask, {name: ticket.values(name) for name in ticket.names}
    with pytest.raises(ValueError, match=r"expected values for every tensor of the mask, got none for d"):
        Ticket(mask, {name: values[name] for name in "abc"})
    with pytest.raises(ValueError, match=r"unknown tensor 'z'"):
        Ticket(mask, {**values, "z": values["a"]})
    with pytest.raises(ValueError, match=r"c: expected values .*of shape \(17,\).*got torch.bfloat16 of shape \(16,\)"):
        Ticket(mask, {**values, "c": values["c"][1:]})
    with pytest.raises(ValueError, match=r"a: expected base_values .*got torch.float64"):
        Ticket(mask, values, {**values, "a": values["a"].double()})
    with pytest.raises(ValueError, match=r"c: expected base_values .*got torch.complex64"):
        Ticket(mask, values, {**values, "c": values["c"].to(torch.complex64)})
    with pytest.raises(ValueError, match=r"provenance must be JSON"):
        Ticket(mask, values, None, {"x": torch.ones(1)})
    with pytest.raises(ValueError, match=r"provenance must be JSON"):
        Ticket(mask, values, None, {"loss": float("nan")})
    with pytest.raises(ValueError, match=r"provenance must be a dict, got list"):
        Ticket(mask, values, None, [1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"unknown tensor 'z'"):
        ticket.values("z")
    with pytest.raises(ValueError, match=r"this ticket holds no base values"):
        Ticket(mask, values).base_values("a")
    based = mask.with_base({name: BaseTensor("bfloat16", "0" * 16) for name in "abcd"})
    with TicketWriter(tmp_path / "t", based) as writer:
        writer.add("a", values["a"], values["a"])
        with pytest.raises(ValueError, match=r"a: values were added before"):
            writer.add("a", values["a"], values["a"])
        with pytest.raises(ValueError, match=r"b: base_values must be given for every tensor or for none"):
            writer.add("b", values["b"])
        with pytest.raises(ValueError, match=r"base_values in the base's dtype bfloat16, got torch.float32"):
            writer.add("b", values["b"], values["b"].float())
        for name in "bcd":
            writer.add(name, values[name], values[name])
    with pytest.raises(ValueError, match=r"shard_bytes must be positive"):
        TicketWriter(tmp_path / "u", mask, shard_bytes=0)
    mask.save(tmp_path / "mask")
    with pytest.raises(ValueError, match=r"expected a ticket, got a mask without values. Use Mask.load"):
        Ticket.load(tmp_path / "mask")
    for load in (Ticket.load, Mask.load):
        with pytest.raises(ValueError, match=r"expected a ticket's directory with ticket.json, got none"):
            load(tmp_path / "nowhere")
