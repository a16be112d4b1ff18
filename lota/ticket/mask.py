"""Mask: which entries of which tensors are active (trained), encoded in memory as on disk."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lota.messages import did_you_mean
from lota.ticket.codec import EncodedIndex, decode, decode_chunks, encode
from lota.ticket.fingerprint import add, fingerprint_at
from lota.ticket.manifest import BaseTensor
from lota.ticket.reader import StoredTicket, open_ticket
from lota.ticket.rows import Rows, check_rows, span, whole
from lota.ticket.writer import TicketWriter

Shape = tuple[int, ...]


class Mask:
    """The active entries of named tensors; immutable. True means trained.

    Holds encoded indices only (0.5 bits a weight at 10%, 0.09 at 1%), on the CPU; a tensor is decoded when asked for.
    Tensors without active entries stay named: they count as eligible. Two masks are equal when names, shapes and active
    entries are, whatever the order of names and the base.

    frozen: identity of the base's other tensors, by name, where it is known: with `base` it says which model the mask
    is for, whole. origin: the directory that the mask was loaded from, or "".
    """

    def __init__(
        self,
        tensors: Mapping[str, tuple[Shape, EncodedIndex]],
        base: Mapping[str, BaseTensor] | None = None,
        origin: str = "",
        rows: Mapping[str, Rows] | None = None,
        frozen: Mapping[str, BaseTensor] | None = None,
    ) -> None:
        """From encoded indices; `from_dense`, `from_indices` and `load` are the usual ways.

        rows: of tensors that take part with some of their rows only, which; active entries outside are a ValueError.
        """
        self.origin = origin
        self._shapes = {name: tuple(int(size) for size in shape) for name, (shape, _) in tensors.items()}
        self._indices = {name: index for name, (_, index) in tensors.items()}
        self._digest: str | None = None
        self._values: Mapping[str, Tensor] | None = None
        self._base_values: Mapping[str, Tensor] | None = None
        for name, shape in self._shapes.items():
            if not isinstance(name, str) or not name or not _is_utf8(name):
                raise ValueError(f"a tensor's name must be a non-empty string of Unicode, got {name!r}")
            index = self._indices[name]
            if index.numel != math.prod(shape) or not index.is_canonical:
                raise ValueError(f"{name}: expected an index that encode() made for shape {shape}")
        self._rows = {name: check_rows(name, self.shape(name), taken) for name, taken in (rows or {}).items()}
        self._rows = {name: taken for name, taken in self._rows.items() if taken != whole(self._shapes[name])}
        self._base = self._checked_base(base or {})
        self._frozen = {name: tensor for name, tensor in (frozen or {}).items() if name not in self._shapes}

    @classmethod
    def from_dense(
        cls,
        tensors: Mapping[str, Tensor],
        base: Mapping[str, BaseTensor] | None = None,
        rows: Mapping[str, Rows] | None = None,
    ) -> Mask:
        """From bool tensors of any shape and device, True = active. ValueError on another dtype."""
        made = {}
        for name, dense in tensors.items():
            if not isinstance(dense, Tensor) or dense.dtype != torch.bool:
                got = dense.dtype if isinstance(dense, Tensor) else type(dense).__name__
                raise ValueError(f"{name}: expected a bool tensor, True where an entry is active, got {got}")
            made[name] = (tuple(dense.shape), encode(dense.flatten().nonzero().squeeze(1), dense.numel()))
        return cls(made, base, rows=rows)

    @classmethod
    def from_indices(
        cls,
        tensors: Mapping[str, tuple[Shape, Tensor]] | Iterable[tuple[str, Shape, Tensor]],
        base: Mapping[str, BaseTensor] | None = None,
        rows: Mapping[str, Rows] | None = None,
    ) -> Mask:
        """From flat (row-major) positions: int64 `[n]`, ascending, unique. ValueError names the tensor otherwise.

        tensors: `{name: (shape, positions)}`, or an iterable of `(name, shape, positions)`, of which each is encoded
        before the next is asked for.
        """
        items = ((name, *item) for name, item in tensors.items()) if isinstance(tensors, Mapping) else tensors
        made: dict[str, tuple[Shape, EncodedIndex]] = {}
        for name, shape, positions in items:
            if name in made:
                raise ValueError(f"{name}: expected every tensor once, got it twice")
            try:
                made[name] = (tuple(shape), encode(positions, math.prod(shape)))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            del positions  # else it would live on while the next ones are made
        return cls(made, base, rows=rows)

    @property
    def names(self) -> tuple[str, ...]:
        """Tensor names in the order in which they were given."""
        return tuple(self._shapes)

    @property
    def num_active(self) -> int:
        return sum(index.num_active for index in self._indices.values())

    @property
    def eligible(self) -> int:
        """Entries of all named tensors that may be active: all of them, or those of the rows that take part."""
        return sum(self.num_eligible(name) for name in self._indices)

    @property
    def density(self) -> float:
        """num_active / eligible; 0.0 for a mask without elements."""
        return self.num_active / self.eligible if self.eligible else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of the encoded indices in memory."""
        return sum(index.data.numel() for index in self._indices.values())

    @property
    def base(self) -> dict[str, BaseTensor]:
        """dtype and fingerprint of the base's tensor by name; empty for a mask that knows no base."""
        return dict(self._base)

    @property
    def frozen(self) -> dict[str, BaseTensor]:
        """dtype and fingerprint of the base's tensors that the mask does not name; empty where they are not known."""
        return dict(self._frozen)

    def identity(self, name: str) -> BaseTensor | None:
        """dtype and fingerprint of the base's tensor `name`, whether the mask names it or not; None where unknown."""
        return self._base.get(name) or self._frozen.get(name)

    @property
    def base_dtype(self) -> torch.dtype | None:
        """The dtype of the base's tensors where all have the same; None where they differ or no base is known. Tensors
        that are stored whole do not count where there are others: buffers have dtypes of their own."""
        names = {base.dtype for name, base in self._base.items() if not self.is_dense(name)}
        names = names or {base.dtype for base in self._base.values()}
        return getattr(torch, names.pop()) if len(names) == 1 else None

    @property
    def digest(self) -> str:
        """sha256 over names, shapes and indices, in hex: equal exactly for equal masks."""
        if self._digest is None:
            hasher = hashlib.sha256()
            for name in sorted(self._shapes):
                index = self._indices[name]
                row = [name, list(self._shapes[name]), index.num_active, index.codec, index.low_bits]
                hasher.update(json.dumps(row).encode("ascii") + b"\n")
                hasher.update(index.data.numpy().data)
            self._digest = hasher.hexdigest()
        return self._digest

    def shape(self, name: str) -> Shape:
        return self._shapes[self._known(name)]

    def numel(self, name: str) -> int:
        return self._indices[self._known(name)].numel

    def active(self, name: str) -> int:
        """Active entries of tensor `name`."""
        return self._indices[self._known(name)].num_active

    @property
    def restricted_rows(self) -> dict[str, Rows]:
        """Of the tensors that take part with some of their rows only, which rows."""
        return dict(self._rows)

    def rows(self, name: str) -> Rows:
        """The rows of tensor `name` that take part: `start, stop` along its first dimension."""
        return self._rows.get(self._known(name)) or whole(self._shapes[name])

    def num_eligible(self, name: str) -> int:
        """Entries of tensor `name` that may be active."""
        start, stop = span(self._shapes[self._known(name)], self.rows(name))
        return stop - start

    def is_dense(self, name: str) -> bool:
        """Whether all entries of tensor `name` that may be active are."""
        return 0 < self.active(name) == self.num_eligible(name)

    def has_all(self, name: str, rows: Rows) -> bool:
        """Whether all entries in a range of rows of tensor `name` are active."""
        start, stop = span(self._shapes[self._known(name)], rows)
        if self.active(name) < stop - start:
            return False
        return sum(int(((chunk >= start) & (chunk < stop)).sum()) for chunk in self.chunks(name)) == stop - start

    def encoded(self, name: str) -> EncodedIndex:
        """The encoded index of tensor `name`; not a copy."""
        return self._indices[self._known(name)]

    def indices(self, name: str) -> Tensor:
        """Flat positions of the active entries: int64 `[active(name)]` on the CPU, ascending, decoded at every call."""
        index = self.encoded(name)
        with self._naming(name):
            return self._inside(name, decode(index))

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The same positions, decoded as they are asked for: ascending chunks of at most a million, none empty."""
        chunks = decode_chunks(self.encoded(name))
        while True:
            with self._naming(name):
                chunk = next(chunks, None)
                if chunk is None:
                    return
                self._inside(name, chunk)
            yield chunk

    def _inside(self, name: str, positions: Tensor) -> Tensor:
        """`positions` (ascending), after checking that they lie in the rows that take part."""
        start, stop = span(self._shapes[name], self.rows(name))
        if positions.numel() and not start <= int(positions[0]) <= int(positions[-1]) < stop:
            raise ValueError(
                f"expected positions in {start}:{stop}, the rows that take part, got {int(positions[0])} to "
                f"{int(positions[-1])}"
            )
        return positions

    def dense(self, name: str) -> Tensor:
        """bool tensor of `shape(name)` on the CPU, True where active."""
        positions = self.indices(name)
        dense = torch.zeros(self.numel(name), dtype=torch.bool)
        dense[positions] = True
        return dense.view(self.shape(name))

    def with_base(self, base: Mapping[str, BaseTensor], frozen: Mapping[str, BaseTensor] | None = None) -> Mask:
        """The same mask with `base` for all of its tensors and `frozen` for the others (or `{}` to forget them); shares
        the indices."""
        tensors = {name: (shape, self._indices[name]) for name, shape in self._shapes.items()}
        return Mask(tensors, base, self.origin, self._rows, frozen)

    def with_dense(self, tensors: Mapping[str, tuple[Shape, Rows]], base: Mapping[str, BaseTensor]) -> Mask:
        """The mask with these tensors, or ranges of their rows, active whole; all of its base is `base`.

        A tensor that the mask names already has these rows active beside its own entries, and all of its rows take part
        as before.
        """
        made = {name: (shape, self._indices[name]) for name, shape in self._shapes.items()}
        rows = dict(self._rows)
        for name, (shape, taken) in tensors.items():
            numel, positions = math.prod(shape), torch.arange(*span(shape, taken), dtype=torch.int64)
            if name in self._shapes:
                if self._shapes[name] != tuple(shape):
                    raise ValueError(f"{name}: expected shape {self._shapes[name]}, as in the mask, got {tuple(shape)}")
                positions = torch.cat([self.indices(name), positions]).unique()
                rows[name] = min(taken[0], self.rows(name)[0]), max(taken[1], self.rows(name)[1])
            else:
                rows[name] = taken
            made[name] = tuple(shape), encode(positions, numel)
        return Mask(made, base, self.origin, rows, self._frozen)

    def without(self, names: Collection[str]) -> Mask:
        """The mask without these tensors; shares the indices of the others."""
        kept = {name: (shape, self._indices[name]) for name, shape in self._shapes.items() if name not in names}
        base = {name: tensor for name, tensor in self._base.items() if name in kept}
        rows = {name: rows for name, rows in self._rows.items() if name in kept}
        return Mask(kept, base, self.origin, rows, self._frozen)

    def renamed(self, names: Mapping[str, str]) -> Mask:
        """The mask with other names for its tensors, by the mask's name; one that is left out stays. Shares the
        indices. ValueError where two get the same name."""

        def other(tensors: Mapping[str, Any]) -> dict[str, Any]:
            made = {names.get(name, name): value for name, value in tensors.items()}
            if len(made) != len(tensors):
                raise ValueError("expected a new name of its own for every tensor, got one twice")
            return made

        tensors = {name: (shape, self._indices[name]) for name, shape in self._shapes.items()}
        return Mask(other(tensors), other(self._base), self.origin, other(self._rows), other(self._frozen))

    def check_base(self, name: str, shape: Iterable[int], dtype: str, fingerprint: str | None) -> None:
        """ValueError unless the mask is for a tensor of that name, shape, and (where the mask knows) that base.

        Of a tensor that is frozen, dtype and fingerprint are compared. dtype: "bfloat16" or "torch.bfloat16".
        fingerprint: 16 hex digits, or None to leave it unchecked.
        """
        base = self.identity(name)
        if name in self._frozen and base is not None:
            _check_frozen(name, base, dtype, fingerprint)
            return
        expected = self.shape(name)
        if tuple(shape) != expected:
            is_short = base is not None and base.rows is not None and tuple(shape) == (base.rows, *expected[1:])
            raise ValueError(
                f"{name}: expected shape {expected}, as in the mask, got {tuple(shape)}. "
                + (
                    f"It was given more rows before training: do the same (resize_token_embeddings({expected[0]}))."
                    if is_short
                    else "The mask is of another model (or of a transposed or fused one)."
                )
            )
        if base is None:
            return
        if dtype.removeprefix("torch.") != base.dtype:
            raise ValueError(
                f"{name}: expected base weights in {base.dtype}, got {dtype}. Load the base model in {base.dtype}."
            )
        if fingerprint is not None and base.rows != 0 and fingerprint != base.fingerprint:
            raise ValueError(
                f"{name}: expected base weights of fingerprint {base.fingerprint}, got {fingerprint}. "
                "The mask belongs to another base model or revision, or these weights were already changed."
            )

    def overlap(self, other: Mask) -> int:
        """Entries active in both masks. ValueError where a tensor of the same name has another shape."""
        total = 0
        for name, shape in self._shapes.items():
            if name not in other._shapes:
                continue
            if other._shapes[name] != shape:
                raise ValueError(
                    f"{name}: expected the same shape in both masks, got {shape} and {other._shapes[name]}. "
                    "They are of different models."
                )
            if self.active(name) and other.active(name):
                few, many = sorted((self.indices(name), other.indices(name)), key=len)
                nearest = torch.searchsorted(many, few).clamp_(max=many.numel() - 1)
                total += int(torch.count_nonzero(many[nearest] == few))
        return total

    def save(
        self, path: str | os.PathLike[str], provenance: Mapping[str, Any] | None = None, *, overwrite: bool = False
    ) -> None:
        """Write the directory `path` (ticket.json, ticket.safetensors) atomically; ValueError where something is."""
        with TicketWriter(path, self, provenance, overwrite=overwrite) as writer:
            writer.add_mask_only()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Mask:
        """Read the mask of a mask or ticket directory. ValueError (path, expected, got, cure) where it is damaged."""
        stored = open_ticket(path)
        return cls.of_stored(stored, str(path))

    @classmethod
    def of_stored(cls, stored: StoredTicket, origin: str) -> Mask:
        """The mask of an opened directory."""
        manifest, indices = stored.manifest, stored.indices
        records = manifest.tensors
        base = {record.name: record.base for record in records if record.base is not None}
        rows = {record.name: record.rows for record in records if record.rows is not None}
        tensors = {record.name: (record.shape, indices[record.name]) for record in records}
        mask = cls(tensors, base, origin, rows, manifest.frozen)
        mask._values, mask._base_values = stored.values, stored.base_values
        return mask

    def change(self, name: str) -> int | None:
        """What the ticket that the mask was loaded with adds to the fingerprint of the base's tensor when it is
        applied; None for a mask without values and base values."""
        if self._values is None or self._base_values is None:
            return None
        if name not in self._values or name not in self._base_values:
            return None  # a packed ticket, whose values are not known without the base
        positions, before = self.indices(name), self._base_values[name]
        after = self._values[name].to(before.dtype)
        return add(fingerprint_at(positions, after), -fingerprint_at(positions, before))

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, Mask) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Mask({len(self._shapes)} tensors, {self.num_active} of {self.eligible} active, {self.density:.4%})"

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Say of which mask and tensor an index is wrong."""
        try:
            yield
        except ValueError as error:
            where = f"{self.origin}: {name}" if self.origin else name
            raise ValueError(f"{where}: {error}. The index is wrong: make the mask again.") from None

    def _known(self, name: str) -> str:
        if name not in self._shapes:
            raise ValueError(f"unknown tensor {name!r}: the mask names {len(self._shapes)} tensors{self._close(name)}")
        return name

    def _close(self, name: str) -> str:
        return did_you_mean(name, self._shapes) or f", {', '.join(self.names[:3])} among them."

    def _checked_base(self, base: Mapping[str, BaseTensor]) -> dict[str, BaseTensor]:
        if not base:
            return {}
        for name in base:
            self._known(name)
        missing = [name for name in self._shapes if name not in base]
        if missing:
            raise ValueError(
                f"expected a base for all {len(self._shapes)} tensors or for none, none for {', '.join(missing[:3])}"
            )
        return {name: base[name] for name in self._shapes}


def _check_frozen(name: str, base: BaseTensor, dtype: str, fingerprint: str | None) -> None:
    if dtype.removeprefix("torch.") != base.dtype:
        raise ValueError(
            f"{name}: expected base weights in {base.dtype}, got {dtype}. Load the base model in {base.dtype}."
        )
    if fingerprint is not None and fingerprint != base.fingerprint:
        raise ValueError(
            f"{name}: expected the base's own weights (fingerprint {base.fingerprint}), which were not trained, got "
            f"others ({fingerprint}). The ticket belongs to another base model or revision, or this one was changed."
        )


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
