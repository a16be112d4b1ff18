"""Ticket: a mask with the new value of every active entry, the base's values to undo them, and where it came from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lota.ticket.difference import decode
from lota.ticket.manifest import check_provenance
from lota.ticket.mask import Mask
from lota.ticket.reader import open_ticket
from lota.ticket.writer import DEFAULT_SHARD_BYTES, TicketWriter, check_values, count_changed


class Ticket:
    """New values for a mask's active entries, bit for bit; immutable.

    A ticket made from tensors refers to them (it copies nothing); one that was loaded reads a tensor from its files at
    every access and checks its sha256 then, so that it is never whole in memory. `verify` reads all of it at once.
    """

    def __init__(
        self,
        mask: Mask,
        values: Mapping[str, Tensor],
        base_values: Mapping[str, Tensor] | None = None,
        provenance: Mapping[str, Any] | None = None,
        model: Mapping[str, Any] | None = None,
    ) -> None:
        """values, base_values: `[mask.active(name)]` for every name of the mask, in ascending flat order; bf16, fp16 or
        fp32, each in its own dtype (a tensor that is stored whole may have any). provenance: anything JSON. model: what
        a model needs that has tensors the base has not (see `Manifest`). ValueError otherwise.
        """
        _check_all("values", mask, values)
        if base_values is not None:
            _check_all("base_values", mask, base_values)
        self._fill(mask, values, base_values, check_provenance(provenance), None, check_provenance(model), {})

    def _fill(
        self,
        mask: Mask,
        values: Mapping[str, Tensor],
        base_values: Mapping[str, Tensor] | None,
        provenance: dict[str, Any],
        num_changed: int | None,
        model: dict[str, Any],
        differences: Mapping[str, tuple[str, Tensor, tuple[int, ...]]],
    ) -> None:
        self._differences = differences
        self._mask, self._values, self._base_values = mask, values, base_values
        self._provenance, self._num_changed, self._model = provenance, num_changed, model

    @property
    def mask(self) -> Mask:
        return self._mask

    @property
    def names(self) -> tuple[str, ...]:
        return self._mask.names

    @property
    def density(self) -> float:
        return self._mask.density

    @property
    def num_active(self) -> int:
        return self._mask.num_active

    @property
    def has_base_values(self) -> bool:
        """Whether the ticket can be undone by itself."""
        return self._base_values is not None

    @property
    def is_packed(self) -> bool:
        """Whether values are stored as differences alone, so that they are read beside the base's (`values_on`)."""
        return any(name not in self._values for name in self._differences)

    @property
    def provenance(self) -> dict[str, Any]:
        """What the writer recorded of how the ticket was made; a copy."""
        return check_provenance(self._provenance)

    @property
    def model(self) -> dict[str, Any]:
        """The class and the entries of config.json of a model with tensors that the base does not have; a copy."""
        return check_provenance(self._model)

    @property
    def num_changed(self) -> int:
        """Entries whose value differs from the base value, in bits (in fp32 where the two dtypes differ).

        A loaded ticket answers from ticket.json; `verify` recounts. ValueError without base values.
        """
        if self._num_changed is None:
            self.base_values(self.names[0]) if self.names else None  # ValueError without them
            self._num_changed = sum(map(self._count_changed, self.names))
        return self._num_changed

    def _count_changed(self, name: str) -> int:
        if name in self._differences:  # equal bits have a difference of 0, whatever they are
            dtype = getattr(torch, self._differences[name][0])
            zeros = torch.zeros(self._mask.active(name), dtype=dtype)
            return count_changed(self._decoded(name, zeros, is_base=True), zeros)
        return count_changed(self.values(name), self.base_values(name))

    def values(self, name: str) -> Tensor:
        """New values `[mask.active(name)]` of tensor `name`, in ascending flat order."""
        self._mask.shape(name)  # an unknown name is refused here
        if name in self._differences and name not in self._values:
            raise ValueError(_PACKED)
        return self._values[name]

    def values_on(self, name: str, base: Tensor) -> Tensor:
        """New values `[mask.active(name)]` where the base has `base` at the active entries (in its dtype). Of a ticket
        that is not packed they are `values(name)`."""
        if name not in self._differences or name in self._values:
            return self.values(name)
        return self._decoded(name, base, is_base=True)

    def base_values_on(self, name: str, tuned: Tensor) -> Tensor:
        """The base's values where the tuned model has `tuned` at the active entries. Of a ticket that is not packed
        they are `base_values(name)`."""
        if name not in self._differences or name in self._values:
            return self.base_values(name)
        return self._decoded(name, tuned, is_base=False)

    def _decoded(self, name: str, known: Tensor, *, is_base: bool) -> Tensor:
        dtype, data, sizes = self._differences[name]
        if str(known.dtype) != f"torch.{dtype}":
            raise ValueError(
                f"{name}: expected weights in {dtype}, of which the ticket holds differences, got {known.dtype}"
            )
        try:
            return decode(data, sizes, known, is_base=is_base)
        except ValueError as error:
            raise ValueError(f"{self._mask.origin}: {name}: {error}") from None

    def base_values(self, name: str) -> Tensor:
        """The base's values `[mask.active(name)]`. ValueError when the ticket was written without them."""
        self._mask.shape(name)
        if self._base_values is None:
            raise ValueError(
                "this ticket holds no base values, so it cannot be undone by itself. "
                "Take them from the base model, or save the ticket with base values."
            )
        if name in self._differences:
            return self._decoded(name, self.values(name), is_base=False)
        return self._base_values[name]

    def renamed(self, names: Mapping[str, str]) -> Ticket:
        """The same ticket with other names for its tensors. names: by the ticket's name; one that is left out stays.
        Refers to the same values."""
        own = {name: names.get(name, name) for name in self.names}
        made = Ticket.__new__(Ticket)
        made._fill(
            self._mask.renamed(names),
            _Renamed(self._values, own),
            None if self._base_values is None else _Renamed(self._base_values, own),
            self._provenance,
            self._num_changed,
            self._model,
            {own.get(name, name): stream for name, stream in self._differences.items()},
        )
        return made

    def verify(self) -> None:
        """Read everything: ValueError unless all values, all indices and num_changed are sound."""
        for name in self.names:
            for _ in self._mask.chunks(name):  # a piece at a time: decoded whole, a dense index is 64 times its file
                pass
            if name in self._values:
                self.values(name)
        if self._base_values is not None:
            count = sum(map(self._count_changed, self.names))
            if count != self.num_changed:
                raise ValueError(
                    f"{self._mask.origin}: expected num_changed {count}, as its values have it, got {self.num_changed}"
                )

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        overwrite: bool = False,
        form: str = "plain",
    ) -> None:
        """Write the directory `path` atomically, tensor by tensor; ValueError where something is unless `overwrite`.

        form: see `TicketWriter`; `packed` takes about half of the bytes, and needs the base (or the tuned model) to be
        read.
        """
        options: dict[str, Any] = {
            "model": self._model,
            "shard_bytes": shard_bytes,
            "overwrite": overwrite,
            "form": form,
        }
        with TicketWriter(path, self._mask, self._provenance, **options) as writer:
            for name in self.names:
                writer.add(name, self.values(name), self.base_values(name) if self.has_base_values else None)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ticket:
        """Open a ticket directory. ValueError (path, expected, got, cure) on damage, and for a mask without values.

        Reads and checks everything but the values, which are checked when they are read.
        """
        stored = open_ticket(path)
        if stored.values is None:
            raise ValueError(f"{path}: expected a ticket, got a mask without values. Use Mask.load.")
        manifest = stored.manifest
        mask = Mask.of_stored(stored, str(path))
        ticket = cls.__new__(cls)  # the values' dtypes and lengths were checked against the files, without reading them
        facts = manifest.provenance, manifest.num_changed, manifest.model
        ticket._fill(mask, stored.values, stored.base_values, *facts, stored.differences)
        return ticket

    def __repr__(self) -> str:
        return f"Ticket({self._mask!r}, {'with' if self.has_base_values else 'without'} base values)"


_PACKED = (
    "this ticket is packed: it holds the differences to its base, whose values are needed to read its own. Apply it, "
    "or unpack it first (lota unpack TICKET --base BASE)"
)


class _Renamed(Mapping[str, Tensor]):
    """Values by other names. names: by the name in `values`."""

    def __init__(self, values: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self._values, self._names = values, {other: name for name, other in names.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._values[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _check_all(kind: str, mask: Mask, tensors: Mapping[str, Tensor]) -> None:
    missing = [name for name in mask.names if name not in tensors]
    if missing:
        raise ValueError(f"expected {kind} for every tensor of the mask, got none for {', '.join(missing[:3])}")
    for name in tensors:
        check_values(kind, name, tensors[name], mask)
