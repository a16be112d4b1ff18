"""Reading ticket directories. Nothing in them is trusted: every claim is held against the bytes that are there.

When a directory is opened: ticket.json's checksum and fields; that each safetensors file is whole and holds exactly the
tensors that ticket.json names, with the lengths that its counts ask for; every index's sha256 and number of entries.
When values are asked for: their sha256. When an index is decoded: that it ascends and stays in range.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lota.files import MAX_JSON_BYTES, open_regular
from lota.ticket.codec import EncodedIndex, check, decode, encode, num_bytes
from lota.ticket.container import DTYPE_CODES, StoredTensor, read_bytes, read_header
from lota.ticket.hub import local_directory
from lota.ticket.manifest import MANIFEST_NAME, Manifest, TensorRecord, parse_manifest
from lota.ticket.writer import BASE_VALUES, DIFFERENCE, DTYPE_NAMES, INDEX, VALUES

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class StoredTicket:
    """An opened directory: what ticket.json says, the indices in memory, and where the values lie."""

    manifest: Manifest
    indices: dict[str, EncodedIndex]
    values: StoredValues | None
    base_values: StoredValues | None
    differences: StoredDifferences


class StoredValues(Mapping[str, Tensor]):
    """Values by tensor name, read from the file and held against their sha256 at every access."""

    def __init__(self, entries: dict[str, tuple[StoredTensor, str, str]]) -> None:
        self._entries = entries  # name -> place, dtype, sha256

    def __getitem__(self, name: str) -> Tensor:
        stored, dtype, sha256 = self._entries[name]
        return read_bytes(stored, sha256, name).view(_DTYPES[dtype])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class StoredDifferences(Mapping[str, tuple[str, Tensor, tuple[int, ...]]]):
    """By tensor name dtype, stream and sizes of its planes, read from the file and held against the sha256 at every
    access."""

    def __init__(self, entries: dict[str, tuple[StoredTensor, tuple[str, tuple[int, ...], str]]]) -> None:
        self._entries = entries

    def __getitem__(self, name: str) -> tuple[str, Tensor, tuple[int, ...]]:
        stored, (dtype, sizes, sha256) = self._entries[name]
        return dtype, read_bytes(stored, sha256, name), sizes

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """What the ticket or mask directory `path` says of itself. ValueError where ticket.json is missing or damaged."""
    file = local_directory(path) / MANIFEST_NAME
    try:
        with open_regular(file) as content:
            text = content.read(MAX_JSON_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{path}: expected a ticket's directory with {MANIFEST_NAME}, got none. Pass the directory that save wrote."
        ) from None
    try:
        if len(text) > MAX_JSON_BYTES:
            raise ValueError(f"expected at most {MAX_JSON_BYTES >> 20} MiB")
        return parse_manifest(text)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def open_ticket(path: str | os.PathLike[str]) -> StoredTicket:
    """Open a ticket or mask directory; memory as large as the encoded indices. ValueError on whatever is wrong."""
    path = local_directory(path)
    manifest = read_manifest(path)
    stored = _locate(path, manifest)
    indices = {record.name: _read_index(stored[record.name + INDEX], record) for record in manifest.tensors}
    values = base_values = None
    if manifest.has_values:
        values = StoredValues(
            {
                record.name: (stored[record.name + VALUES], str(record.values_dtype), str(record.values_sha256))
                for record in manifest.tensors
                if record.values_dtype is not None
            }
        )
    if manifest.has_base_values:
        base_values = StoredValues({
            record.name: (
                stored[record.name + BASE_VALUES], str(record.base_values_dtype), str(record.base_values_sha256)
            )
            for record in manifest.tensors
            if record.base_values_dtype is not None
        })  # fmt: skip
    differences = {
        record.name: (stored[record.name + DIFFERENCE], record.difference)
        for record in manifest.tensors
        if record.difference is not None
    }
    return StoredTicket(manifest, indices, values, base_values, StoredDifferences(differences))


def _locate(directory: Path, manifest: Manifest) -> dict[str, StoredTensor]:
    """Every stored tensor by key, once files, dtypes and lengths are those that the manifest asks for."""
    expected: dict[str, dict[str, tuple[str, int, int]]] = {}  # file -> key -> dtype, fewest and most bytes
    for record in manifest.tensors:
        keys = expected.setdefault(record.file, {})
        shortest = num_bytes(record.codec, record.numel, record.num_active, record.low_bits)
        keys[record.name + INDEX] = ("U8", shortest, shortest + 7)
        if record.difference is not None:
            size = sum(record.difference[1])
            keys[record.name + DIFFERENCE] = ("U8", size, size)
        for suffix, dtype in ((VALUES, record.values_dtype), (BASE_VALUES, record.base_values_dtype)):
            if dtype is not None:
                exact = record.num_active * _DTYPES[dtype].itemsize
                keys[record.name + suffix] = (DTYPE_CODES[_DTYPES[dtype]], exact, exact)
    located: dict[str, StoredTensor] = {}
    for file, keys in expected.items():
        path = directory / file
        found = read_header(path)
        if set(found) != set(keys):
            odd = sorted(set(found) ^ set(keys))
            raise ValueError(
                f"{path}: expected exactly the tensors that {MANIFEST_NAME} names, got a difference in "
                f"{', '.join(odd[:5])}. The files are of different tickets: copy the whole directory again."
            )
        for key, (code, fewest, most) in keys.items():
            got_code, got = found[key].code, found[key].num_bytes
            if got_code != code or not fewest <= got <= most:
                raise ValueError(
                    f"{path}: {key}: expected {fewest} bytes of {code}, got {got} bytes of {got_code}. "
                    "The counts disagree: the directory is damaged, copy it again."
                )
        located |= found
    return located


def _read_index(stored: StoredTensor, record: TensorRecord) -> EncodedIndex:
    """The index of one tensor, in the form that `encode` gives whichever writer made the file."""
    data = read_bytes(stored, record.index_sha256, record.name)
    length = num_bytes(record.codec, record.numel, record.num_active, record.low_bits)
    if torch.count_nonzero(data[length:]):
        raise ValueError(f"{stored.path}: {record.name}: expected padding of zeros after the index, got other bytes")
    index = EncodedIndex(record.codec, record.numel, record.num_active, record.low_bits, data[:length])
    try:
        check(index)
        return index if index.is_canonical else encode(decode(index), index.numel)
    except ValueError as error:
        raise ValueError(f"{stored.path}: {record.name}: {error}. The index is wrong: write it again.") from None
