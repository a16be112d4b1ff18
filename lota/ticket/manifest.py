"""ticket.json: what a ticket directory says about itself, as types that can only be made from valid text."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from lota.ticket.codec import ELIAS_FANO, MAX_NUMEL, num_bytes
from lota.ticket.container import parse_json
from lota.ticket.difference import CODEC as DIFFERENCE_CODEC
from lota.ticket.rows import Rows, check_rows, span, whole

MANIFEST_NAME = "ticket.json"
FORMAT, VERSIONS = "lota-ticket", (1, 2)
DTYPES = ("bfloat16", "float16", "float32")
WHOLE_DTYPES = (*DTYPES, "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
"""What tensors that are stored whole may have: buffers count and flag too."""
_FILE_NAME = re.compile(r"ticket(-[0-9]{5,}-of-[0-9]{5,})?\.safetensors")
_FIRST_LINE = re.compile(rb'\{"sha256": "([0-9a-f]{64})",')
_HEX_64, _HEX_16 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class BaseTensor:
    """One tensor of the base. dtype: one of WHOLE_DTYPES. fingerprint: 16 lower-case hex digits.

    rows: how many leading rows the base has, where the tensor has more (a resized embedding), 0 where the base has no
    such tensor (a new head), None where it has all. The fingerprint is taken of the rows that the base has.
    """

    dtype: str
    fingerprint: str
    rows: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in WHOLE_DTYPES:
            raise ValueError(f"a base tensor's dtype must be {', '.join(WHOLE_DTYPES)}, got {self.dtype!r}")
        if not isinstance(self.fingerprint, str) or not _HEX_16.fullmatch(self.fingerprint):
            raise ValueError(f"a fingerprint must be 16 lower-case hex digits, got {self.fingerprint!r}. Use to_hex().")


@dataclass(frozen=True)
class TensorRecord:
    """One tensor's part of ticket.json; the dtypes and sha256 of values that are not stored are None.

    rows: the range of rows that may be active; None: all of them. difference: dtype, bytes of the planes and sha256 of
    the stream that gives values from base values and back (`lota.ticket.difference`); then base values are not stored,
    and values need not be.
    """

    name: str
    shape: tuple[int, ...]
    num_active: int
    base: BaseTensor | None
    file: str
    codec: str
    low_bits: int
    index_sha256: str
    values_dtype: str | None = None
    values_sha256: str | None = None
    base_values_dtype: str | None = None
    base_values_sha256: str | None = None
    rows: Rows | None = None
    difference: tuple[str, tuple[int, ...], str] | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def eligible(self) -> int:
        """Entries that may be active."""
        start, stop = span(self.shape, self.rows or whole(self.shape))
        return stop - start

    @property
    def is_dense(self) -> bool:
        """Whether all entries that may be active are: the tensor (or its rows) was trained, and is stored, whole."""
        return 0 < self.num_active == self.eligible

    @property
    def version(self) -> int:
        """The version of the format that can say this."""
        dtypes = {self.values_dtype, self.base_values_dtype, self.base.dtype if self.base else None} - {None}
        is_whole = self.rows is None and (self.base is None or self.base.rows is None)
        is_plain = is_whole and self.difference is None and dtypes <= set(DTYPES)
        return 1 if is_plain else 2


@dataclass(frozen=True)
class Manifest:
    """All of ticket.json. num_changed: None without base values.

    model: {"class": ..., "config": {...}, "base_config": {...}} of a ticket with tensors that the base does not have:
    the class that was trained, and entries of config.json with their value there and in the base's; else {}.
    frozen: identity of the base's other tensors, parameters and persistent buffers, which the ticket leaves as they
    are; {} where the writer did not know them.
    """

    tensors: tuple[TensorRecord, ...]
    has_values: bool
    has_base_values: bool
    num_changed: int | None
    provenance: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    frozen: dict[str, BaseTensor] = field(default_factory=dict)

    @property
    def num_active(self) -> int:
        return sum(record.num_active for record in self.tensors)

    @property
    def eligible(self) -> int:
        return sum(record.eligible for record in self.tensors)

    @property
    def version(self) -> int:
        """The lowest version of the format that can say all of it, so that earlier readers read what they can."""
        return max([2 if self.model or self.frozen else 1, *(record.version for record in self.tensors)])


def is_file_name(name: str) -> bool:
    """Whether a ticket's tensors may lie in a file of this name."""
    return bool(_FILE_NAME.fullmatch(name))


def check_provenance(provenance: Mapping[str, Any] | None) -> dict[str, Any]:
    """`provenance` as JSON gives it back (a copy; tuples become lists). ValueError where it is no JSON object."""
    if provenance is None:
        return {}
    if not isinstance(provenance, Mapping):
        raise ValueError(f"provenance must be a dict, got {type(provenance).__name__}")
    try:
        return cast("dict[str, Any]", parse_json(json.dumps(dict(provenance), allow_nan=False).encode()))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"provenance must be JSON (text, finite numbers, lists, dicts): {error}") from None


def format_manifest(manifest: Manifest) -> bytes:
    """The bytes of ticket.json: a line with the sha256 of all that follows it, then the rest, a tensor a line."""
    lines = [_format_tensor(record) for record in manifest.tensors]
    head = {
        "format": FORMAT,
        "version": manifest.version,
        "num_active": manifest.num_active,
        "eligible": manifest.eligible,
        "has_values": manifest.has_values,
        "has_base_values": manifest.has_base_values,
        "num_changed": manifest.num_changed,
        "provenance": manifest.provenance,
    }
    if manifest.model:
        head["model"] = manifest.model
    if manifest.frozen:
        head["frozen"] = {name: [base.dtype, base.fingerprint] for name, base in manifest.frozen.items()}
    body = json.dumps(head)[1:-1] + ',\n"tensors": [' + ",".join("\n" + line for line in lines) + "\n]}\n"
    digest = hashlib.sha256(body.encode("ascii")).hexdigest()
    return f'{{"sha256": "{digest}",\n{body}'.encode("ascii")


def parse_manifest(text: bytes) -> Manifest:
    """The inverse of `format_manifest`; ValueError (expected, got, cure; without the path) on anything else."""
    first, _, body = text.partition(b"\n")
    match = _FIRST_LINE.fullmatch(first)
    if match is None:
        raise ValueError(
            f'expected the first line {{"sha256": "<64 hex digits>", got {first[:90]!r}. '
            "The file is damaged or no ticket: copy it again."
        )
    digest = hashlib.sha256(body).hexdigest()
    if digest != match.group(1).decode("ascii"):
        raise ValueError(
            f"expected text of sha256 {match.group(1).decode('ascii')}, got {digest}. "
            "It was damaged or edited after it was written: copy it again."
        )
    head = _Fields(parse_json(text), "ticket.json")
    head.take("sha256", str)
    written = (head.take("format", str), head.take("version", int))
    if written[0] != FORMAT or written[1] not in VERSIONS:
        raise ValueError(
            f"expected format {FORMAT} version 1 or {VERSIONS[-1]}, got {written[0]!s:.80} version {written[1]!s:.80}. "
            "Update lota to read newer tickets."
        )
    has_values, has_base_values = head.take("has_values", bool), head.take("has_base_values", bool)
    if has_base_values and not has_values:
        raise ValueError("expected values wherever there are base values, got base values alone")
    num_changed = head.take("num_changed", int if has_base_values else type(None))
    provenance = head.take("provenance", dict)
    model = head.take("model", dict) if "model" in head else {}
    frozen = _parse_frozen(head.take("frozen", dict)) if "frozen" in head else {}
    num_active, eligible = head.take("num_active", int), head.take("eligible", int)
    tensors = tuple(_parse_tensor(entry, has_values, has_base_values) for entry in head.take("tensors", list))
    head.finish()
    manifest = Manifest(tensors, has_values, has_base_values, num_changed, provenance, model, frozen)
    if manifest.version > written[1]:
        raise ValueError(f"expected version {manifest.version} for what it holds, got {written[1]}")
    if len({record.name for record in tensors} | frozen.keys()) != len(tensors) + len(frozen):
        raise ValueError("expected every tensor once, got a name twice")
    if (num_active, eligible) != (manifest.num_active, manifest.eligible):
        raise ValueError(
            f"expected num_active {manifest.num_active} and eligible {manifest.eligible}, the sums over its tensors, "
            f"got {num_active} and {eligible}"
        )
    if num_changed is not None and not 0 <= num_changed <= num_active:
        raise ValueError(f"expected num_changed from 0 to {num_active}, got {num_changed}")
    if len({record.base is None for record in tensors}) > 1:
        raise ValueError("expected a base for every tensor or for none, got it for some")
    return manifest


def _parse_frozen(entries: dict[str, Any]) -> dict[str, BaseTensor]:
    made = {}
    for name, entry in entries.items():
        if not isinstance(entry, list) or len(entry) != 2:
            raise ValueError(f"frozen tensor {name!r:.200}: expected a dtype and a fingerprint, got {entry!r:.80}")
        made[name] = BaseTensor(*entry)
    return made


def _format_tensor(record: TensorRecord) -> str:
    index: dict[str, Any] = {"codec": record.codec}
    if record.codec == ELIAS_FANO:
        index["low_bits"] = record.low_bits
    entry: dict[str, Any] = {"name": record.name, "shape": list(record.shape), "num_active": record.num_active}
    if record.rows is not None:
        entry["rows"] = list(record.rows)
    if record.base is not None:
        entry["base"] = {"dtype": record.base.dtype, "fingerprint": record.base.fingerprint}
        if record.base.rows is not None:
            entry["base"]["rows"] = record.base.rows
    entry |= {"file": record.file, "index": index | {"sha256": record.index_sha256}}
    if record.values_dtype is not None:
        entry["values"] = {"dtype": record.values_dtype, "sha256": record.values_sha256}
    if record.difference is not None:
        dtype, sizes, sha256 = record.difference
        entry["difference"] = {"dtype": dtype, "codec": DIFFERENCE_CODEC, "sizes": list(sizes), "sha256": sha256}
    if record.base_values_dtype is not None:
        entry["base_values"] = {"dtype": record.base_values_dtype, "sha256": record.base_values_sha256}
    return json.dumps(entry, separators=(",", ":"))


def _parse_tensor(entry: Any, has_values: bool, has_base_values: bool) -> TensorRecord:
    name = _Fields(entry, "a tensor", partial=True).take("name", str)
    fields = _Fields(entry, f"tensor {name!r:.200}")
    fields.take("name", str)
    shape = fields.take("shape", list)
    is_shape = len(shape) <= 64 and all(type(size) is int and 0 <= size <= MAX_NUMEL for size in shape)
    if not is_shape or math.prod(shape) > MAX_NUMEL:
        raise ValueError(f"{fields.where}: expected a shape of at most 2**62 elements, got {shape!r:.80}")
    num_active = fields.take("num_active", int)
    rows = _parse_rows(fields, shape) if "rows" in fields else None
    base = None
    if "base" in fields:
        base_fields = _Fields(fields.take("base", dict), f"{fields.where}, base")
        base_rows = base_fields.take("rows", int) if "rows" in base_fields else None
        if base_rows is not None and not 0 <= base_rows < whole(shape)[1]:
            raise ValueError(f"{base_fields.where}: expected fewer rows than in {shape!r:.80}, got {base_rows}")
        base = BaseTensor(base_fields.take("dtype", str), base_fields.take("fingerprint", str), base_rows)
        base_fields.finish()
    file = fields.take("file", str)
    if not _FILE_NAME.fullmatch(file):
        raise ValueError(f"{fields.where}: expected a file name like ticket.safetensors, got {file!r:.80}")
    index = _Fields(fields.take("index", dict), f"{fields.where}, index")
    codec = index.take("codec", str)
    low_bits = index.take("low_bits", int) if codec == ELIAS_FANO else 0
    index_sha256 = index.take("sha256", str, _HEX_64)
    try:
        num_bytes(codec, math.prod(shape), num_active, low_bits)
    except ValueError as error:
        raise ValueError(f"{fields.where}: {error}") from None
    index.finish()
    difference = _parse_difference(fields, num_active) if "difference" in fields else None
    if difference is not None and not (has_values and has_base_values):
        raise ValueError(f"{fields.where}: expected a difference only where there are values and base values")
    has_own = has_values and (difference is None or "values" in fields)
    values = _parse_values(fields, "values") if has_own else (None, None)
    stores_base = has_base_values and difference is None
    base_values = _parse_values(fields, "base_values") if stores_base else (None, None)
    fields.finish()
    record = TensorRecord(
        name, tuple(shape), num_active, base, file, codec, low_bits, index_sha256,
        values[0], values[1], base_values[0], base_values[1], rows, difference,
    )  # fmt: skip
    if num_active > record.eligible:
        raise ValueError(f"{fields.where}: expected at most {record.eligible} active entries, got {num_active}")
    return record


def _parse_rows(fields: _Fields, shape: list[int]) -> Rows:
    rows = fields.take("rows", list)
    if len(rows) != 2 or any(type(row) is not int for row in rows) or tuple(rows) == whole(shape):
        raise ValueError(f"{fields.where}: expected rows as two integers that leave some out, got {rows!r:.80}")
    return check_rows(fields.where, shape, rows)


def _parse_difference(fields: _Fields, num_active: int) -> tuple[str, tuple[int, ...], str]:
    difference = _Fields(fields.take("difference", dict), f"{fields.where}, difference")
    dtype, sha256 = difference.take("dtype", str), difference.take("sha256", str, _HEX_64)
    codec, sizes = difference.take("codec", str), difference.take("sizes", list)
    if dtype not in DTYPES or codec != DIFFERENCE_CODEC:
        got = f"{codec} of {dtype}"
        raise ValueError(f"{difference.where}: expected {DIFFERENCE_CODEC} of {', '.join(DTYPES)}, got {got:.80}")
    most = 2 * num_active + 1024  # deflate grows what it cannot pack by far less
    if any(type(size) is not int or not 0 <= size <= most for size in sizes):
        raise ValueError(f"{difference.where}: expected sizes of planes of {num_active} bytes, got {sizes!r:.80}")
    difference.finish()
    return dtype, tuple(sizes), sha256


def _parse_values(fields: _Fields, kind: str) -> tuple[str, str]:
    values = _Fields(fields.take(kind, dict), f"{fields.where}, {kind}")
    dtype, sha256 = values.take("dtype", str), values.take("sha256", str, _HEX_64)
    if dtype not in WHOLE_DTYPES:
        raise ValueError(f"{values.where}: expected dtype {', '.join(WHOLE_DTYPES)}, got {dtype!r:.80}")
    values.finish()
    return dtype, sha256


class _Fields:
    """A JSON object whose fields are taken one by one with their type; what stays untaken is an error."""

    def __init__(self, entry: Any, where: str, partial: bool = False) -> None:
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: expected a JSON object, got {type(entry).__name__}")
        self.where = where
        self._entry = entry
        self._taken: set[str] = set(entry) if partial else set()

    def __contains__(self, key: str) -> bool:
        return key in self._entry

    def take(self, key: str, kind: type, pattern: re.Pattern[str] | None = None) -> Any:
        if key not in self._entry:
            raise ValueError(f"{self.where}: expected the field {key!r}, got {sorted(self._entry)!r:.200}")
        value = self._entry[key]
        if type(value) is not kind or (pattern is not None and not pattern.fullmatch(str(value))):
            raise ValueError(f"{self.where}: expected {key!r} to be a valid {kind.__name__}, got {value!r:.80}")
        self._taken.add(key)
        return value

    def finish(self) -> None:
        unknown = set(self._entry) - self._taken
        if unknown:
            raise ValueError(f"{self.where}: expected no further fields, got {sorted(unknown)!r:.200}")
