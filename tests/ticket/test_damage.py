"""Contract: a directory that is not what was written gives a ValueError that names it, or the identical ticket; never
another error, a hang, memory for what it merely claims, or wrong data."""

from __future__ import annotations

import hashlib
import json
import math
import random
import resource
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lota.ticket import Mask, Ticket
from tests.ticket.test_ticket import assert_equal_tickets, make_ticket


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make_ticket().save(tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / "t")
    return tmp_path / "t"


def edit_manifest(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change ticket.json and sign it again, as somebody would who wants to be believed."""
    manifest = json.loads((path / "ticket.json").read_text())
    edit(manifest)
    manifest.pop("sha256", None)
    body = json.dumps(manifest)[1:].encode()
    (path / "ticket.json").write_bytes(b'{"sha256": "%s",\n%s' % (hashlib.sha256(body).hexdigest().encode(), body))


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the safetensors file and every sha256 that speaks of it."""
    file = path / "ticket.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}  # older safetensors map it
    edit(tensors)
    save_file(tensors, file)

    def sign(manifest: dict[str, Any]) -> None:
        for entry in manifest["tensors"]:
            for kind in ("index", "values", "base_values"):
                stored = tensors.get(f"{entry['name']}.{kind}")
                if stored is not None:
                    entry[kind]["sha256"] = hashlib.sha256(stored.view(torch.uint8).numpy().data).hexdigest()

    edit_manifest(path, sign)


def read_everything(path: Path) -> Ticket:
    ticket = Ticket.load(path)
    ticket.verify()
    return ticket


def assert_identical_or_refused(path: Path) -> None:
    begin = time.perf_counter()
    try:
        ticket = read_everything(path)
    except ValueError as error:
        assert str(path) in str(error)  # both outcomes are right; the message must name the file
    else:
        assert_equal_tickets(ticket, Ticket.load(path.parent / "good"))
    assert time.perf_counter() - begin < 5


@pytest.mark.parametrize("name", ["ticket.json", "ticket.safetensors"])
def test_fuzz_flips_and_truncations(saved: Path, name: str) -> None:
    randomly = random.Random(name)
    good = (saved / name).read_bytes()
    for _ in range(400):
        damaged = bytearray(good)
        for _ in range(randomly.choice([1, 1, 1, 2, 8])):
            damaged[randomly.randrange(len(good))] ^= 1 << randomly.randrange(8)
        (saved / name).write_bytes(damaged)
        assert_identical_or_refused(saved)
    for _ in range(100):
        (saved / name).write_bytes(good[: randomly.randrange(len(good))])
        with pytest.raises(ValueError, match=r"ticket\.(json|safetensors)"):
            read_everything(saved)
    for _ in range(100):
        begin, end = sorted(randomly.randrange(len(good)) for _ in range(2))
        (saved / name).write_bytes(good[:begin] + randomly.randbytes(randomly.randrange(40)) + good[end:])
        assert_identical_or_refused(saved)


def test_every_flipped_byte_of_the_values_is_seen_when_they_are_read(saved: Path) -> None:
    file = saved / "ticket.safetensors"
    good = file.read_bytes()
    header = 8 + struct.unpack("<Q", good[:8])[0]
    for position in range(header, len(good), 3):
        damaged = bytearray(good)
        damaged[position] ^= 0x10
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"expected bytes of sha256 \w{64}, got \w{64}.*copy it again"):
            read_everything(saved)


def test_fuzz_signed_manifests(saved: Path) -> None:
    """Any JSON in any place, with a right checksum: refused, or index and values are the ones that were written."""
    randomly = random.Random(7)
    odd: list[Any] = [0, 1, -1, 2**31, 2**62, 2**63, 10**300, 1.5, True, None, "", "x", "elias_fano", "bitmap", [], {}]
    good_text = (saved / "ticket.json").read_bytes()
    good = read_everything(saved.parent / "good")

    def mutate(node: Any) -> None:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = randomly.choice(keys)
        if isinstance(node[key], (dict, list)) and node[key] and randomly.random() < 0.85:
            mutate(node[key])
        elif randomly.random() < 0.15:
            del node[key]
        else:
            node[key] = randomly.choice(odd)

    num_refused = 0
    for _ in range(300):
        (saved / "ticket.json").write_bytes(good_text)
        edit_manifest(saved, mutate)
        try:
            ticket = read_everything(saved)
        except ValueError:
            num_refused += 1
            continue
        for name in ticket.names:
            assert torch.equal(ticket.mask.indices(name), good.mask.indices(name))
            assert torch.equal(ticket.values(name).view(torch.int16), good.values(name).view(torch.int16))
    assert num_refused > 150


ABSURD = 2**36  # 8 GiB as a bit map, 512 GiB as positions


def change_first(**fields: Any) -> Callable[[dict[str, Any]], None]:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["tensors"][0] |= fields
        manifest["num_active"] = sum(entry["num_active"] for entry in manifest["tensors"])
        manifest["num_changed"] = 0

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(version=3), "lota-ticket version 1 or 2, got lota-ticket version 3. Update lota"),
        (lambda m: m.update(format="other"), "expected format lota-ticket version 1 or 2, got other"),
        (lambda m: m.update(num_active=5), "the sums over its tensors, got 5"),
        (lambda m: m.update(eligible=5), "the sums over its tensors"),
        (lambda m: m.update(num_changed=10**9), "expected num_changed from 0 to"),
        (lambda m: m.update(num_changed=1), "expected num_changed [0-9]+, as its values have it, got 1"),
        (lambda m: m.update(extra=1), "expected no further fields, got .'extra'"),
        (lambda m: m.pop("tensors"), "expected the field 'tensors'"),
        (lambda m: m["tensors"].append(m["tensors"][0]), "got a name twice"),
        (lambda m: m["tensors"].pop(), "the sums over its tensors"),
        (lambda m: m["tensors"][0]["index"].update(codec="rice"), "tensor 'a': expected codec .* got 'rice'"),
        (lambda m: m["tensors"][0]["index"].update(low_bits=99), "expected low_bits from 0 to 62"),
        (lambda m: m["tensors"][0]["index"].update(low_bits=9), "a.index: expected [0-9]+ bytes of U8, got"),
        (lambda m: m["tensors"][0]["values"].update(dtype="float8"), "tensor 'a', values: expected dtype"),
        (lambda m: m["tensors"][0]["values"].update(dtype="int64"), "expected version 2 for what it holds"),
        (lambda m: m["tensors"][0]["values"].update(dtype="float32"), "a.values: expected [0-9]+ bytes of F32"),
        (lambda m: m["tensors"][0]["values"].update(dtype="float16"), "a.values: expected [0-9]+ bytes of F16"),
        (lambda m: m["tensors"][0].update(file="../t/ticket.safetensors"), "expected a file name like"),
        (lambda m: m["tensors"][0].update(file="ticket-00002-of-00002.safetensors"), "expected a file, got none"),
        (lambda m: m["tensors"][0].update(shape=[-1, 4]), "tensor 'a': expected a shape"),
        (lambda m: m["tensors"][0].update(shape=[2**40, 2**40]), "tensor 'a': expected a shape of at most 2..62"),
        (lambda m: m["tensors"][0].pop("base"), "expected a base for every tensor or for none"),
        (lambda m: m["tensors"][0]["base"].update(fingerprint="x"), "16 lower-case hex digits"),
        (change_first(num_active=3), "a.index: expected|a.values: expected"),
        (change_first(num_active=-3), "num_active -3"),
        (change_first(shape=[ABSURD], num_active=ABSURD // 2), "num_active|eligible"),
    ],
)
def test_manifest_that_does_not_fit(saved: Path, edit: Callable[[dict[str, Any]], Any], message: str) -> None:
    edit_manifest(saved, edit)
    with pytest.raises(ValueError, match=message):
        read_everything(saved)


def test_absurd_claims_allocate_nothing(saved: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in ({"codec": "bitmap"}, {"codec": "elias_fano", "low_bits": 1}, {"codec": "elias_fano", "low_bits": 36}):

        def edit(manifest: dict[str, Any], index: dict[str, Any] = index) -> None:
            entry = manifest["tensors"][0]
            entry |= {"shape": [ABSURD], "num_active": ABSURD // 2, "index": index | {"sha256": "0" * 64}}
            manifest["num_active"] = sum(entry["num_active"] for entry in manifest["tensors"])
            manifest["eligible"] = ABSURD + sum(math.prod(e["shape"]) for e in manifest["tensors"][1:])

        edit_manifest(saved, edit)
        with pytest.raises(ValueError, match=r"a\.index: expected [0-9]{10,} bytes of U8, got [0-9]+ bytes"):
            Ticket.load(saved)
    for claim in (0xFFFFFFFFFFFFFFFF, ABSURD, 10**8):
        file = saved / "ticket.safetensors"
        file.write_bytes(struct.pack("<Q", claim) + file.read_bytes()[8:])
        with pytest.raises(ValueError, match=r"expected a header inside the file of [0-9]+ bytes"):
            Mask.load(saved)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_an_index_that_is_signed_but_wrong(saved: Path) -> None:
    def set_bit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["c.index"][2] |= 0x80  # 17 entries, all active: bit 23 is padding

    edit_tensors(saved, set_bit)
    with pytest.raises(ValueError, match=r"safetensors: c: expected the unused bits"):
        Mask.load(saved)


def test_an_index_that_descends_is_refused_when_decoded(saved: Path) -> None:
    """Low bits of two entries in one bucket exchanged: every length and count fits."""
    good = Mask.load(saved)
    low_bits = good.encoded("a").low_bits
    positions = good.indices("a")
    pair = int(((positions[1:] >> low_bits) == (positions[:-1] >> low_bits)).nonzero()[0])

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        bits = int.from_bytes(bytes(tensors["a.index"].numpy()), "little")
        one, other = (bits >> (low_bits * (pair + k)) & ((1 << low_bits) - 1) for k in (0, 1))
        bits ^= (one ^ other) << (low_bits * pair) | (one ^ other) << (low_bits * (pair + 1))
        tensors["a.index"] = torch.tensor(list(bits.to_bytes(tensors["a.index"].numel(), "little")), dtype=torch.uint8)

    edit_tensors(saved, swap)
    mask = Mask.load(saved)
    with pytest.raises(ValueError, match=r"/t: a: expected ascending positions.*make the mask again"):
        mask.indices("a")
    with pytest.raises(ValueError, match=r"/t: a: expected ascending positions.*make the mask again"):
        list(mask.chunks("a"))


def test_another_writers_choices_are_read(saved: Path) -> None:
    """A bit map where Elias-Fano is smaller, and padding of up to 7 zeros, are legal; the mask is the same one."""
    good = Mask.load(saved)

    def as_bitmap(tensors: dict[str, torch.Tensor]) -> None:
        weights = 1 << torch.arange(8)
        bits = (good.dense("a").view(-1, 8) * weights).sum(1).to(torch.uint8)
        tensors["a.index"] = torch.cat([bits, torch.zeros(5, dtype=torch.uint8)])

    edit_tensors(saved, as_bitmap)
    edit_manifest(saved, lambda m: m["tensors"][0]["index"].update(codec="bitmap"))
    edit_manifest(saved, lambda m: m["tensors"][0]["index"].pop("low_bits"))
    loaded = read_everything(saved)
    assert loaded.mask == good
    assert loaded.mask.digest == good.digest
    edit_tensors(saved, lambda tensors: tensors["a.index"][-1:].fill_(1))
    with pytest.raises(ValueError, match=r"expected padding of zeros"):
        Ticket.load(saved)


def test_files_of_different_tickets(saved: Path, tmp_path: Path) -> None:
    other = Mask.from_dense({"other": torch.ones(4, dtype=torch.bool)})
    other.save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "ticket.safetensors", saved / "ticket.safetensors")
    with pytest.raises(ValueError, match=r"got a difference in .*The files are of different tickets"):
        Mask.load(saved)
    (saved / "ticket.safetensors").unlink()
    with pytest.raises(ValueError, match=r"expected a file, got none"):
        Mask.load(saved)


def test_a_file_that_changes_after_it_was_opened(saved: Path) -> None:
    ticket = Ticket.load(saved)
    file = saved / "ticket.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-400])
    with pytest.raises(ValueError, match=r"expected [0-9]+ bytes, got [0-9]+. The file was cut"):
        ticket.verify()
    file.unlink()
    with pytest.raises(ValueError, match=r"it was removed meanwhile"):
        ticket.values("a")
    file.write_bytes(good)
    ticket.verify()


def test_json_that_is_no_plain_json(saved: Path) -> None:
    deep, long = b"[" * 100_000, b"1" * 5000
    for body in (b'"a": NaN}', b'"a": 1, "a": 2}', b'"a": \xff}', b'"a": %s}' % deep, b'"a": %s}' % long):
        text = b'{"sha256": "%s",\n' % hashlib.sha256(body).hexdigest().encode() + body
        (saved / "ticket.json").write_bytes(text)
        with pytest.raises(ValueError, match=r"ticket\.json"):
            Ticket.load(saved)
