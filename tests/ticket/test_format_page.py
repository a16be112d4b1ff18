"""Contract: docs/ticket_format.md is enough to read a ticket, and every block on it is what the library writes."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "ticket_format.md").read_text(encoding="utf-8")
NUMPY_DTYPES = {
    "BF16": np.dtype("<u2"), "F16": np.dtype("<u2"), "F32": np.dtype("<u4"), "U8": np.dtype("u1"),
    "F64": np.dtype("<u8"), "I64": np.dtype("<u8"), "BOOL": np.dtype("u1"),
}
CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "int64": "I64", "bool": "BOOL"}

# The reader: json, struct, numpy and the page; nothing of lota or safetensors. Values are bit patterns.


def page_safetensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for key, entry in header.items():
        begin, end = entry["data_offsets"]
        array = np.frombuffer(raw[8 + length + begin : 8 + length + end], dtype=NUMPY_DTYPES[entry["dtype"]])
        assert [array.size] == entry["shape"]
        found[key] = (entry["dtype"], array)
    return found


def page_bits(data: np.ndarray, num_bits: int) -> np.ndarray:
    bits = np.unpackbits(data, bitorder="little")
    assert not bits[num_bits:].any()
    return bits[:num_bits]


def page_index(data: np.ndarray, numel: int, n: int, codec: str, low_bits: int) -> np.ndarray:
    if codec == "bitmap":
        size = -(-numel // 8)
        positions = np.flatnonzero(page_bits(data[:size], numel))
    elif n == 0:
        size, positions = 0, np.empty(0, np.int64)
    else:
        middle = -(-n * low_bits // 8)
        num_high_bits = n + ((numel - 1) >> low_bits) + 1
        size = middle + -(-num_high_bits // 8)
        low = page_bits(data[:middle], n * low_bits).reshape(n, low_bits).astype(np.int64)
        high = np.flatnonzero(page_bits(data[middle:size], num_high_bits)) - np.arange(n)
        positions = (high << low_bits) | (low << np.arange(low_bits)).sum(1)
    assert 0 <= data.size - size <= 7
    assert not data[size:].any()
    assert positions.size == n
    assert (np.diff(positions) > 0).all()
    assert n == 0 or positions[-1] < numel
    return positions


def page_ticket(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    text = (path / "ticket.json").read_bytes()
    first, body = text.split(b"\n", 1)
    match = re.fullmatch(rb'\{"sha256": "([0-9a-f]{64})",', first)
    assert match
    assert hashlib.sha256(body).hexdigest().encode() == match.group(1)
    ticket = json.loads(text)
    assert ticket["format"] == "lota-ticket"
    assert ticket["version"] in (1, 2)
    stored = {file: page_safetensors(path / file) for file in {entry["file"] for entry in ticket["tensors"]}}
    tensors: dict[str, dict[str, np.ndarray]] = {}
    for entry in ticket["tensors"]:
        read = tensors[entry["name"]] = {}
        for kind in ("index", "values", "base_values"):
            if kind in entry:
                code, array = stored[entry["file"]][f"{entry['name']}.{kind}"]
                assert hashlib.sha256(array.tobytes()).hexdigest() == entry[kind]["sha256"]
                assert code == CODES.get(entry[kind].get("dtype"), "U8")
                read[kind] = array
        numel = int(np.prod(entry["shape"], dtype=np.int64))
        index = entry["index"]
        read["index"] = page_index(read["index"], numel, entry["num_active"], index["codec"], index.get("low_bits", 0))
    assert ticket["num_active"] == sum(read["index"].size for read in tensors.values())
    return ticket, tensors


def page_fmix64(k: int) -> int:
    k ^= k >> 33
    k = k * 0xFF51AFD7ED558CCD % 2**64
    k ^= k >> 33
    k = k * 0xC4CEB9FE1A85EC53 % 2**64
    return k ^ k >> 33


def page_multiplier(name: str, number: int) -> int:
    return page_fmix64({"A": 1, "B": 2**32}[name] + number) | 1


def page_fingerprint(bits: list[int], start: int = 0) -> int:
    shares = (
        page_multiplier("A", p % 65536) * page_multiplier("B", p // 65536) * (b + 1) for p, b in enumerate(bits, start)
    )
    return sum(shares) % 2**64


def block(kind: str) -> str:
    match = re.search(rf"^```{kind}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert match, f"the page has no {kind} block"
    return match.group(1)


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """The ticket that the page prints, as files."""
    room = int(re.search(r"8 bytes that hold (\d+)", PAGE).group(1))  # type: ignore[union-attr]
    path = tmp_path / "example"
    path.mkdir()
    (path / "ticket.json").write_text(block("json"))
    header = block("header").strip().encode().ljust(room)
    (path / "ticket.safetensors").write_bytes(struct.pack("<Q", room) + header + bytes.fromhex(block("hex")))
    return path


def test_the_page_reads_its_own_example(example: Path) -> None:
    ticket, tensors = page_ticket(example)
    assert ticket["provenance"] == {"note": "worked example"}
    up, down = tensors["layers.0.up"], tensors["layers.0.down"]
    assert up["index"].tolist() == [3, 37, 38]
    assert up["values"].tolist() == [0x3FC0, 0x8000, 0x4220]
    assert (up["base_values"].astype(np.uint32) << 16).view(np.float32).tolist() == [3.0, 37.0, 38.0]
    assert down["index"].tolist() == [1, 2, 5, 7]
    assert down["values"].view("<f4").tolist() == [1.0, -2.5, 5.0, np.float32(0.1)]
    base = [int(bits) >> 16 for bits in np.arange(64, dtype="<f4").view("<u4")]
    assert f"{page_fingerprint(base):016x}" == ticket["tensors"][0]["base"]["fingerprint"]


def test_the_library_reads_and_writes_the_example(example: Path, tmp_path: Path) -> None:
    from lota.ticket import Ticket

    loaded = Ticket.load(example)
    loaded.verify()
    assert loaded.mask.indices("layers.0.up").tolist() == [3, 37, 38]
    assert loaded.num_changed == 5
    loaded.save(tmp_path / "again")
    for name in ("ticket.json", "ticket.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (example / name).read_bytes()


def test_fingerprint_vectors() -> None:
    import torch

    from lota.ticket import fingerprint, to_hex

    one = torch.tensor([1.0]).bfloat16()
    tensors = [
        (one[:0], 0),
        (one * 0, 0),
        (one, 0),
        (one, 65536),
        (one, 2**31),
        (torch.arange(64).bfloat16(), 0),
        (torch.arange(8).float(), 0),
        ((torch.arange(70000) % 2048).float(), 0),
    ]
    table = re.findall(r"^\|.*\| `([0-9a-f]{16})` \|$", PAGE, re.MULTILINE)
    assert len(table) == len(tensors)
    for (tensor, start), expected in zip(tensors, table):
        integers = tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16).tolist()
        bits = [value % (1 << 8 * tensor.element_size()) for value in integers]
        assert f"{page_fingerprint(bits, start):016x}" == expected
        assert to_hex(fingerprint(tensor, start)) == expected
    multipliers = re.findall(r"([AB])\((\d+)\) = `([0-9a-f]{16})`", PAGE)
    assert len(multipliers) == 4
    for name, number, expected in multipliers:
        assert f"{page_multiplier(name, int(number)):016x}" == expected


@pytest.mark.parametrize("shard_bytes", [4 << 30, 2000])
def test_the_page_reads_what_the_library_writes(tmp_path: Path, shard_bytes: int) -> None:
    import torch

    from tests.ticket.test_ticket import make_ticket

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        ticket = make_ticket(dtype)
        path = tmp_path / str(dtype)
        ticket.save(path, shard_bytes=shard_bytes)
        manifest, tensors = page_ticket(path)
        assert tuple(tensors) == ticket.names
        for entry in manifest["tensors"]:
            name = entry["name"]
            assert tuple(entry["shape"]) == ticket.mask.shape(name)
            assert tensors[name]["index"].tolist() == ticket.mask.indices(name).tolist()
            for kind, values in (("values", ticket.values(name)), ("base_values", ticket.base_values(name))):
                assert tensors[name][kind].tobytes() == values.view(torch.uint8).numpy().tobytes()
    ticket.mask.save(tmp_path / "mask")
    _, tensors = page_ticket(tmp_path / "mask")
    assert all(set(read) == {"index"} for read in tensors.values())


def test_the_page_reads_version_2(tmp_path: Path) -> None:
    import torch

    from lota.ticket import BaseTensor, Mask, Ticket, fingerprint, to_hex

    embed = torch.arange(40).bfloat16().view(10, 4)
    count, flag = torch.tensor(2**40 + 7), torch.tensor([True, False, True])
    every = {
        name: torch.ones(shape, dtype=torch.bool) for name, shape in (("head", (3, 4)), ("count", ()), ("flag", (3,)))
    }
    added = torch.zeros(10, 4, dtype=torch.bool)
    added[8:] = True
    base = {
        "embed": BaseTensor("bfloat16", to_hex(fingerprint(embed.flatten()[:32])), 8),
        "head": BaseTensor("bfloat16", "0" * 16, 0),
        "count": BaseTensor("int64", to_hex(fingerprint(count.view(1)))),
        "flag": BaseTensor("bool", to_hex(fingerprint(flag))),
    }
    mask = Mask.from_dense({"embed": added, **every}, base=base, rows={"embed": (8, 10)})
    values = {
        "embed": embed[8:].flatten(),
        "head": torch.zeros(12).bfloat16(),
        "count": count.view(1) + 1,
        "flag": ~flag,
    }
    model = {"class": "Tagger", "config": {"vocab_size": 10}, "base_config": {"vocab_size": 8}}
    ticket = Ticket(mask, values, {**values, "count": count.view(1), "flag": flag}, {}, model)
    ticket.save(tmp_path / "ticket")
    manifest, tensors = page_ticket(tmp_path / "ticket")
    assert manifest["version"] == 2
    assert manifest["eligible"] == manifest["num_active"] == 8 + 12 + 1 + 3
    assert manifest["model"] == model
    entries = {entry["name"]: entry for entry in manifest["tensors"]}
    assert entries["embed"]["rows"] == [8, 10]
    assert {name: entry["base"].get("rows") for name, entry in entries.items()} == {
        "embed": 8, "head": 0, "count": None, "flag": None
    }
    assert tensors["embed"]["index"].tolist() == list(range(32, 40))
    assert tensors["count"]["values"].tolist() == [2**40 + 8]
    assert f"{page_fingerprint([2**40 + 7]):016x}" == entries["count"]["base"]["fingerprint"]
    assert f"{page_fingerprint([1, 0, 1]):016x}" == entries["flag"]["base"]["fingerprint"]
    again = Ticket.load(tmp_path / "ticket")
    assert again.mask == mask
    assert (again.mask.base, again.mask.restricted_rows, again.model) == (base, {"embed": (8, 10)}, model)
    assert all(torch.equal(again.values(name), values[name]) for name in values)
    assert again.num_changed == 1 + 3


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(version=1), "expected version 2 for what it holds"),
        (lambda m: m["tensors"][0].update(rows=[8, 11]), "expected rows inside"),
        (lambda m: m["tensors"][0].update(rows=[0, 10]), "that leave some out"),
        (lambda m: m["tensors"][0].update(rows=[9, 10]), "at most 4 active|eligible"),
        (lambda m: m["tensors"][0]["base"].update(rows=10), "expected fewer rows"),
        (lambda m: m["tensors"][0]["base"].update(rows=True), "expected 'rows'"),
        (lambda m: m.update(model=[]), "expected 'model'"),
    ],
)
def test_a_manifest_of_version_2_that_does_not_fit(tmp_path: Path, edit: Any, message: str) -> None:
    import torch

    from lota.ticket import BaseTensor, Mask
    from tests.ticket.test_damage import edit_manifest

    added = torch.zeros(10, 4, dtype=torch.bool)
    added[8:] = True
    mask = Mask.from_dense({"a": added}, base={"a": BaseTensor("bfloat16", "0" * 16, 8)}, rows={"a": (8, 10)})
    mask.save(tmp_path / "mask")
    edit_manifest(tmp_path / "mask", edit)
    with pytest.raises(ValueError, match=message):
        Mask.load(tmp_path / "mask")
