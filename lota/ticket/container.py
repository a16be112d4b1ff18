"""Safetensors files as this package needs them: written as a stream, read tensor by tensor, never trusted.

The layout is safetensors' own (8-byte little-endian header length, JSON header, data without holes), so any safetensors
reader opens these files. Written here because a ticket is streamed (a tensor at a time, its neighbours never in
memory), and because whatever is wrong with a file from outside must end in a ValueError that names it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lota.files import open_regular

DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ITEM_BYTES = {code: dtype.itemsize for dtype, code in DTYPE_CODES.items()}
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class StoredTensor:
    """Where a 1-D tensor lies: `num_bytes` from byte `begin` of the file `path`, as safetensors dtype `code`."""

    path: Path
    code: str
    begin: int
    num_bytes: int


class StreamWriter:
    """Write 1-D tensors one after another into a new safetensors file.

    keys: every key that may be added, and max_bytes: bytes of data at most, so that room for the header is left in
    front; spaces fill what stays unused. longest_code: the longest of DTYPE_CODES that will be added.
    Callers keep the data aligned: an item of 2, 4 or 8 bytes must begin at a multiple of its size.
    """

    def __init__(self, path: Path, keys: list[str], max_bytes: int, longest_code: str = "BF16") -> None:
        widest = {
            key: {"dtype": longest_code, "shape": [max_bytes], "data_offsets": [max_bytes, max_bytes]} for key in keys
        }
        self._header_bytes = -(-len(_header(widest)) // 8) * 8
        self._entries: dict[str, dict[str, Any]] = {}
        self.num_data_bytes = 0
        self._file = open(path, "xb")  # noqa: SIM115 - open until close() or abandon()
        self._file.seek(8 + self._header_bytes)

    def add(self, key: str, values: Tensor) -> str:
        """Append `values` (1-D, a dtype of DTYPE_CODES, any device) and return the sha256 of its bytes, in hex."""
        data = values.detach().cpu().contiguous().view(torch.uint8).numpy().data
        begin, self.num_data_bytes = self.num_data_bytes, self.num_data_bytes + data.nbytes
        assert begin % values.element_size() == 0, f"{key} would be misaligned"
        self._file.write(data)
        self._entries[key] = {
            "dtype": DTYPE_CODES[values.dtype],
            "shape": [values.numel()],
            "data_offsets": [begin, self.num_data_bytes],
        }
        return hashlib.sha256(data).hexdigest()

    def close(self) -> None:
        """Write the header into the room left for it, and the file to the disk."""
        header = _header(self._entries)
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._header_bytes) + header.ljust(self._header_bytes))
        self._file.truncate(8 + self._header_bytes + self.num_data_bytes)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close without finishing. What is still to be written may not fit on the disk, which is no error any more."""
        with suppress(OSError):
            self._file.close()


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of the safetensors file `path` by key. ValueError unless header and file size agree throughout."""
    try:
        with open_regular(path) as file:
            file_bytes = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise ValueError(f"expected at least 8 bytes, got {len(prefix)}")
            (header_bytes,) = struct.unpack("<Q", prefix)
            if header_bytes > min(_MAX_HEADER_BYTES, file_bytes - 8):
                raise ValueError(f"expected a header inside the file of {file_bytes} bytes, got one of {header_bytes}")
            entries = parse_json(file.read(header_bytes))
        if not isinstance(entries, dict):
            raise ValueError("expected a JSON object as the header")
        entries.pop("__metadata__", None)
        return _located(entries, path, 8 + header_bytes, file_bytes)
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"{path}: expected a file, got none. Copy the whole directory.") from None
    except ValueError as error:
        raise ValueError(f"{path}: not a sound safetensors file: {error}. It is damaged: copy it again.") from None


def read_bytes(stored: StoredTensor, sha256: str, what: str) -> Tensor:
    """The bytes of `stored` as uint8 `[num_bytes]`; ValueError if they are cut short or do not have that sha256."""
    data = torch.empty(stored.num_bytes, dtype=torch.uint8)
    try:
        with open_regular(stored.path) as file:
            file.seek(stored.begin)
            got = file.readinto(data.numpy().data)  # type: ignore[attr-defined]
    except FileNotFoundError:
        raise ValueError(f"{stored.path}: {what}: expected a file, got none: it was removed meanwhile.") from None
    if got != stored.num_bytes:
        raise ValueError(
            f"{stored.path}: {what}: expected {stored.num_bytes} bytes, got {got}. The file was cut: copy it again."
        )
    digest = hashlib.sha256(data.numpy().data).hexdigest()
    if digest != sha256:
        raise ValueError(
            f"{stored.path}: {what}: expected bytes of sha256 {sha256}, got {digest}. "
            "The file is damaged or belongs to another ticket: copy it again."
        )
    return data


def parse_json(text: bytes) -> Any:
    """Strict JSON: ValueError on duplicate keys, NaN, numbers that no float or 128-bit integer is, halves of
    characters, nesting of more than 64 levels, and everything else that is not well-formed."""
    try:
        made = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite
        )
        _check_content(made, 0)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    return made


_MAX_DEPTH, _MAX_INT = 64, 1 << 127


def _check_content(value: Any, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError(f"JSON nested in more than {_MAX_DEPTH} levels")
    if isinstance(value, str):
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise ValueError("JSON with half of a character (a lone surrogate)")
    elif isinstance(value, int):
        if abs(value) >= _MAX_INT:
            raise ValueError("JSON with an integer of more than 128 bits")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_content(key, depth + 1)
            _check_content(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_content(item, depth + 1)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"JSON with the number {text:.40}, which no float holds")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("JSON with a key that occurs twice")
    return made


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"JSON with the number {name}")


def _header(entries: dict[str, dict[str, Any]]) -> bytes:
    whole = {"__metadata__": {"format": "lota-ticket"}, **entries}
    return json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def _located(entries: dict[str, Any], path: Path, data_begin: int, file_bytes: int) -> dict[str, StoredTensor]:
    ends = [0]
    located = {}
    for key, entry in entries.items():
        begin, end, num_elements, code = _parse_entry(key, entry)
        if end - begin != num_elements * _ITEM_BYTES[code]:
            raise ValueError(f"{key:.200}: expected {num_elements} elements of {code} in {end - begin} bytes")
        located[key] = StoredTensor(path, code, data_begin + begin, end - begin)
    for stored in sorted(located.values(), key=lambda stored: (stored.begin, stored.num_bytes)):
        if stored.begin != data_begin + ends[-1]:
            raise ValueError("expected tensors one after another, got a hole or an overlap")
        ends.append(stored.begin + stored.num_bytes - data_begin)
    if ends[-1] != file_bytes - data_begin:
        raise ValueError(f"expected {ends[-1]} bytes of data, got {file_bytes - data_begin}")
    return located


def _parse_entry(key: str, entry: Any) -> tuple[int, int, int, str]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{key:.200}: expected dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _ITEM_BYTES:
        raise ValueError(f"{key:.200}: expected dtype {', '.join(_ITEM_BYTES)}, got {code!r:.80}")
    for numbers, length in ((shape, 1), (offsets, 2)):
        if not isinstance(numbers, list) or len(numbers) != length or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"{key:.200}: expected {length} non-negative integers, got {numbers!r:.80}")
    return offsets[0], offsets[1], shape[0], code
