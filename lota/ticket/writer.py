"""Writing ticket directories: tensor by tensor, and all or nothing.

Everything goes into a temporary directory beside the target, is synced to the disk, and appears under its name by one
rename. A writer that is killed leaves only that hidden directory (`.NAME.tmp-...`), never half a ticket.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lota.choices import TICKET_FORMS, check_choice
from lota.files import sync_path
from lota.ticket import difference
from lota.ticket.container import StreamWriter
from lota.ticket.manifest import (
    DTYPES,
    MANIFEST_NAME,
    WHOLE_DTYPES,
    Manifest,
    TensorRecord,
    check_provenance,
    format_manifest,
    is_file_name,
)

if TYPE_CHECKING:
    from lota.ticket.mask import Mask

DEFAULT_SHARD_BYTES = 4 << 30
INDEX, VALUES, BASE_VALUES, DIFFERENCE = ".index", ".values", ".base_values", ".difference"
DTYPE_NAMES = {getattr(torch, name): name for name in WHOLE_DTYPES}
_FLOAT_DTYPES = tuple(getattr(torch, name) for name in DTYPES)


class TicketWriter:
    """Write a ticket whose values arrive one tensor at a time; one process of a distributed run does.

        with TicketWriter(path, mask, provenance) as writer:
            for name in mask.names:
                writer.add(name, values, base_values)

    form: one of `choices.TICKET_FORMS`; where a tensor is no smaller in another form, it is plain. path: the ticket's
    directory; it must not exist, or be empty, or (with `overwrite`) be a ticket. model: see `Manifest`.
    shard_bytes: a new file is begun before one would grow larger; one tensor is never divided.
    Leaving the block normally closes: ValueError when a tensor was not added. Leaving it by an exception abandons, and
    nothing stays behind. After `close`, `num_bytes` is the size of all files and `num_changed` counts the entries whose
    value differs from the base value (None without base values).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        mask: Mask,
        provenance: Mapping[str, Any] | None = None,
        *,
        model: Mapping[str, Any] | None = None,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        overwrite: bool = False,
        form: str = "plain",
    ) -> None:
        self._form = check_choice("form", form, TICKET_FORMS)
        self.path = Path(os.path.realpath(path))
        self._mask, self._provenance, self._model = mask, check_provenance(provenance), check_provenance(model)
        self._shard_bytes, self._overwrite = shard_bytes, overwrite
        if shard_bytes <= 0:
            raise ValueError(f"shard_bytes must be positive, got {shard_bytes}")
        check_target(self.path, overwrite)
        self._records: dict[str, TensorRecord] = {}
        self._shards: list[StreamWriter] = []
        self._shard_of: dict[str, int] = {}
        self._has_values = True
        self._has_base_values = False
        self.num_changed: int | None = None
        self.num_bytes = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self._beside("tmp")
        self._temporary.mkdir()
        self._is_open = True

    def add(self, name: str, values: Tensor, base_values: Tensor | None = None) -> None:
        """Write tensor `name`: its new values and, for all tensors or for none, its base values.

        values, base_values: `[mask.active(name)]`, bf16, fp16 or fp32 independently (base values in the base's dtype
        where the mask knows it; a tensor that is stored whole may have any dtype), any device; not changed, not kept.
        Any order of names, each once.
        """
        shape = self._mask.shape(name)  # an unknown name is refused here
        check_values("values", name, values, self._mask)
        if base_values is not None:
            check_values("base_values", name, base_values, self._mask)
            base = self._mask.base.get(name)
            if base is not None and DTYPE_NAMES[base_values.dtype] != base.dtype:
                raise ValueError(
                    f"{name}: expected base_values in the base's dtype {base.dtype}, got {base_values.dtype}. "
                    "Pass the base model's own entries."
                )
        if self._records and self._has_base_values != (base_values is not None):
            raise ValueError(f"{name}: base_values must be given for every tensor or for none")
        if base_values is not None:
            self._has_base_values = True
            self.num_changed = (self.num_changed or 0) + count_changed(values, base_values)
        coded = self._difference(values, base_values)
        if coded is not None:
            data, sizes = coded
            kept = {VALUES: values} if self._form == "values" else {}
            self._write(name, shape, kept | {DIFFERENCE: data}, (DTYPE_NAMES[values.dtype], tuple(sizes)))
            return
        self._write(name, shape, {VALUES: values} | ({} if base_values is None else {BASE_VALUES: base_values}))

    def _difference(self, values: Tensor, base_values: Tensor | None) -> tuple[Tensor, list[int]] | None:
        """The coded difference, where this form and these tensors have one that is smaller than the base values."""
        if self._form == "plain" or base_values is None or not values.numel():
            return None
        if values.dtype not in _FLOAT_DTYPES or values.dtype != base_values.dtype:
            return None
        data, sizes = difference.encode(values, base_values)
        return (data, sizes) if data.numel() < base_values.nbytes else None

    def add_mask_only(self) -> None:
        """Write every tensor's index and no values: a mask."""
        self._has_values = False
        for name in self._mask.names:
            self._write(name, self._mask.shape(name), {})

    def close(self) -> None:
        """Finish the files, sync them and rename the directory to its name. ValueError when a tensor is missing."""
        if not self._is_open:
            return
        try:
            self._finish()
            self._publish()
        except BaseException:
            self.abandon()
            raise
        self._is_open = False

    def abandon(self) -> None:
        """Remove what was written; the target stays as it was."""
        if self._is_open:
            self._is_open = False
            for shard in self._shards:
                shard.abandon()
            shutil.rmtree(self._temporary, ignore_errors=True)

    def __enter__(self) -> TicketWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def _write(
        self,
        name: str,
        shape: tuple[int, ...],
        values: dict[str, Tensor],
        coded: tuple[str, tuple[int, ...]] | None = None,
    ) -> None:
        if not self._is_open:
            raise ValueError(f"{self.path}: this writer is closed; nothing can be added")
        if name in self._records:
            raise ValueError(f"{name}: values were added before; every tensor is added once")
        index = self._mask.encoded(name)
        # Wider items first and the index last, padded, so that every tensor begins aligned and safetensors can view it.
        tensors = dict(sorted(values.items(), key=lambda item: -item[1].element_size()))
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) + index.data.numel()
        padding = torch.zeros(-num_bytes % 8, dtype=torch.uint8)
        tensors[INDEX] = torch.cat([index.data, padding])
        shard = self._shard_for(num_bytes + padding.numel(), 2 if coded else len(values))
        sha256 = {suffix: shard.add(name + suffix, tensor) for suffix, tensor in tensors.items()}
        dtypes = {suffix: DTYPE_NAMES[tensor.dtype] for suffix, tensor in values.items() if suffix != DIFFERENCE}
        self._shard_of[name] = len(self._shards) - 1
        self._records[name] = TensorRecord(
            name, shape, index.num_active, self._mask.base.get(name), "", index.codec, index.low_bits, sha256[INDEX],
            dtypes.get(VALUES), sha256.get(VALUES), dtypes.get(BASE_VALUES), sha256.get(BASE_VALUES),
            self._mask.restricted_rows.get(name), None if coded is None else (*coded, sha256[DIFFERENCE]),
        )  # fmt: skip

    def _shard_for(self, num_bytes: int, num_kinds: int) -> StreamWriter:
        if self._shards and 0 < self._shards[-1].num_data_bytes <= self._shard_bytes - num_bytes:
            return self._shards[-1]
        if self._shards and self._shards[-1].num_data_bytes == 0:
            return self._shards[-1]
        if self._shards:
            self._shards[-1].close()
        left = [name for name in self._mask.names if name not in self._records]
        suffixes = (INDEX, VALUES, BASE_VALUES)[: 1 + num_kinds]
        suffixes += (DIFFERENCE,) if self._form != "plain" else ()
        keys = [name + suffix for name in left for suffix in suffixes]
        most = sum(
            self._mask.encoded(name).data.numel()
            + 8
            + (8 if self._mask.is_dense(name) else 4) * num_kinds * self._mask.active(name)
            for name in left
        )
        self._shards.append(StreamWriter(self._temporary / str(len(self._shards)), keys, most))
        return self._shards[-1]

    def _finish(self) -> None:
        missing = [name for name in self._mask.names if name not in self._records]
        if missing:
            raise ValueError(
                f"{self.path}: expected values for {len(self._mask.names)} tensors, got {len(self._records)}; "
                f"missing: {', '.join(missing[:5])}. Add every name of the mask, also those without active entries."
            )
        if self._shards:
            self._shards[-1].close()
        files = _file_names(len(self._shards))
        for number, name in enumerate(files):
            (self._temporary / str(number)).rename(self._temporary / name)
        records = [
            TensorRecord(**{**vars(self._records[name]), "file": files[self._shard_of[name]]})
            for name in self._mask.names
        ]
        manifest = Manifest(
            tuple(records), self._has_values, self._has_base_values, self.num_changed, self._provenance, self._model,
            self._mask.frozen,
        )  # fmt: skip
        with open(self._temporary / MANIFEST_NAME, "xb") as file:
            file.write(format_manifest(manifest))
            file.flush()
            os.fsync(file.fileno())
        self.num_bytes = sum(entry.stat().st_size for entry in self._temporary.iterdir())
        sync_path(self._temporary)

    def _publish(self) -> None:
        check_target(self.path, self._overwrite)
        replaced = None
        if self.path.is_dir() and any(self.path.iterdir()):
            # A rename cannot replace a directory that is not empty: the old one steps aside first.
            replaced = self._beside("old")
            self.path.rename(replaced)
        try:
            self._temporary.rename(self.path)
        except OSError:
            if replaced is not None:
                replaced.rename(self.path)
            raise
        sync_path(self.path.parent)
        if replaced is not None:
            shutil.rmtree(replaced)

    def _beside(self, purpose: str) -> Path:
        """A free hidden name in the target's own directory, so that a rename stays inside one file system."""
        return self.path.with_name(f".{self.path.name}.{purpose}-{os.getpid()}-{secrets.token_hex(4)}")


def check_target(path: Path, overwrite: bool) -> None:
    """ValueError unless a ticket may be written to `path`: absent, an empty directory, or a ticket and `overwrite`."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path}: expected a directory's name to write a ticket to, got a file. Choose another name.")
    if not any(path.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{path}: expected no such directory or an empty one, got files in it. Pass overwrite=True.")
    if not (path / MANIFEST_NAME).is_file():
        raise ValueError(f"{path}: overwrite replaces a ticket, but the directory holds no {MANIFEST_NAME}. Remove it.")
    others = sorted(entry.name for entry in path.iterdir() if not _is_of_ticket(entry))
    if others:
        raise ValueError(
            f"{path}: overwrite replaces a ticket, but the directory also holds {', '.join(others[:3])}, which would "
            "be lost. Move it away, or choose another directory."
        )


def _is_of_ticket(entry: Path) -> bool:
    return entry.is_file() and (entry.name in (MANIFEST_NAME, "README.md") or is_file_name(entry.name))


def check_values(kind: str, name: str, values: Tensor, mask: Mask) -> None:
    """ValueError unless `values` has an entry for each active one of the tensor: bf16, fp16 or fp32, and of a tensor
    that is stored whole also integers and flags."""
    num_active = mask.active(name)
    allowed = tuple(DTYPE_NAMES) if mask.is_dense(name) else _FLOAT_DTYPES
    if not isinstance(values, Tensor) or values.dtype not in allowed or tuple(values.shape) != (num_active,):
        got = f"{values.dtype} of shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"{name}: expected {kind} as {', '.join(DTYPE_NAMES[dtype] for dtype in allowed[:3])} of shape "
            f"({num_active},), one per active entry in ascending order, got {got}"
        )


def count_changed(values: Tensor, base_values: Tensor) -> int:
    """Entries whose bits differ; of two float dtypes both are compared in fp32, into which each converts exactly."""
    if values.dtype != base_values.dtype:
        values, base_values = values.float(), base_values.float()
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.dtype.itemsize]
    base_values = base_values.detach().to(values.device)
    return int(torch.count_nonzero(values.detach().contiguous().view(bits) != base_values.contiguous().view(bits)))


def _file_names(num_shards: int) -> list[str]:
    if num_shards <= 1:
        return ["ticket.safetensors"][:num_shards]
    return [f"ticket-{number:05d}-of-{num_shards:05d}.safetensors" for number in range(1, num_shards + 1)]
