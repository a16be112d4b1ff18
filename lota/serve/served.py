"""A running model and the tickets that are on it: prepared, which checks all and writes nothing, then switched.

Entries are written in place where the model's memory holds the base as its files do. Elsewhere (weights that the server
packed, quantized or derived others from) the model loads its base's files again, with the tickets laid over. Either way
absolute values are assigned, so what is on after a switch does not depend on what was on before it.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lota.choices import STACKING_RULES, check_choice
from lota.delivery.apply import Change, Verified, checkpoint_changes
from lota.delivery.live import tensor_mode
from lota.delivery.model_folder import read_tensors, weight_files
from lota.delivery.stacking import Entries, shared_positions, sum_shared
from lota.files import open_regular
from lota.progress import Say, silent
from lota.serve.placement import NotPlainError, place, record_copies, whole_memory
from lota.ticket import Ticket
from lota.ticket.hub import local_directory
from lota.ticket.manifest import MANIFEST_NAME

Weights = Iterable[tuple[str, Tensor]]


class BrokenError(RuntimeError):
    """A write failed, and so did putting the base back: what the model holds is unknown."""


@dataclass
class _Held:
    """A ticket that was read and verified. identity: sha256 of its ticket.json, which has those of all of its values.
    entries: by the address of the memory that they lie in, or (not in place) by their tensor's key in the files."""

    path: str
    identity: str
    is_in_place: bool
    entries: dict[int | str, Entries]


class ServedModel:
    """One rank's model, loaded from the checkpoint in `folder`.

    load: the model's `load_weights`. reload: called with all tensors of the checkpoint, which loads them and does again
    what the server does after loading. is_plain: whether the server reads this memory of a parameter at every step, and
    holds nothing that was made of it. is_whole: whether this rank holds all of the model. keep: how many tickets stay
    in memory; a switch to one of them reads no values. say: called with a line for every ticket that is read.
    """

    def __init__(
        self,
        folder: Path,
        load: Callable[[Weights], Any],
        reload: Callable[[Weights], Any],
        is_plain: Callable[[Tensor], bool],
        *,
        is_whole: bool = False,
        keep: int = 8,
        say: Say = silent,
    ) -> None:
        self._is_whole, self._say = is_whole, say
        self._folder, self._load, self._reload, self._is_plain, self.keep = folder, load, reload, is_plain, keep
        self._files, self._verified = _state_of(folder), Verified()
        self._memory: dict[int | str, Tensor] = {}
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._is_in_place = True
        self._on: list[_Held] = []
        self._next: tuple[list[_Held], str] | None = None

    @property
    def is_in_place(self) -> bool:
        """Whether switches write entries in place; False from the first ticket on that needs the model loaded again."""
        return self._is_in_place

    def prepare(self, tickets: Sequence[str], rule: str = "refuse") -> None:
        """Read and verify what a switch to exactly these tickets needs; none: the base. Nothing is written.

        tickets: paths, or names on the hub. rule: what an entry gets that several of them change, as in
        `TicketSwitcher`. ValueError where the model is not their base, a file is damaged, or they share entries and the
        rule is `refuse`.
        """
        self._next = None
        check_choice("rule", rule, STACKING_RULES)
        if len(set(tickets)) != len(tickets):
            raise ValueError(f"expected every ticket once, got {', '.join(tickets)}")
        if _state_of(self._folder) != self._files:
            raise ValueError(f"the files of {self._folder} changed since the server loaded them: start it again")
        wanted = [self._hold(path) for path in tickets]
        if not all(held.is_in_place == self._is_in_place for held in wanted):  # the last one ended writing in place
            wanted = [self._hold(path) for path in tickets]
        if rule == "refuse":
            _check_disjoint(wanted)
        self._next = wanted, rule

    def switch(self) -> None:
        """Have exactly what was prepared on the model. ValueError where writing failed, and the model is its base;
        BrokenError where that failed too (another switch may still succeed)."""
        if self._next is None:
            raise ValueError("expected a switch that was prepared, got none: prepare it first")
        (wanted, rule), self._next = self._next, None
        before = self._on
        self._on = [*before, *wanted]  # until all is written, anything of these may be on the model
        try:
            self._write(before, wanted, rule)
        except Exception as error:
            try:
                self._write(self._on, [], "refuse")
            except Exception as second:  # noqa: BLE001 (whatever a loader or a device makes of it)
                raise BrokenError(f"a switch failed ({error}), and so did putting the base back ({second})") from error
            self._on = []
            raise ValueError(f"the switch failed, and the model is its base again: {error}") from error
        self._on = wanted

    def discard(self) -> None:
        """Forget what was prepared."""
        self._next = None

    def _hold(self, path: str) -> _Held:
        """The ticket that is at `path` now, from memory where it is the one that was read."""
        identity = _identity(path)
        held = self._held.pop(path, None)
        if held is None or held.identity != identity or held.is_in_place != self._is_in_place:
            changes = checkpoint_changes(self._folder, Ticket.load(path), verified=self._verified)
            entries = self._placed(changes) if self._is_in_place else None
            found: dict[int | str, Entries] = {change.name: change.entries for change in changes}
            found = found if entries is None else entries
            held = _Held(path, identity, entries is not None, found)
            num_entries = sum(part.positions.numel() for part in found.values())
            self._say(f"{path}: {num_entries:,} entries, {'in place' if held.is_in_place else 'by loading again'}")
        self._held[path] = held
        while len(self._held) > self.keep:
            self._held.popitem(last=False)
        return held

    def _placed(self, changes: Sequence[Change]) -> dict[int | str, Entries] | None:
        """The entries by the memory that they lie in. None where some cannot be written in place; then none will be any
        more, and what is held is read again when it is asked for."""
        parts: dict[int | str, list[Entries]] = {}
        try:
            for name, shape, entries in changes:
                num_found = 0
                for copy in record_copies(self._load, name, shape, entries.values.dtype):
                    if not self._is_plain(copy.target):
                        raise NotPlainError(f"{name}: the server holds something that was made of it")
                    memory = whole_memory(copy.target)
                    self._memory[memory.data_ptr()] = memory
                    found = place(copy, entries)
                    num_found += found.positions.numel()
                    parts.setdefault(memory.data_ptr(), []).append(found)
                if self._is_whole and num_found < entries.positions.numel():
                    raise NotPlainError(f"{name}: the loader leaves entries out")
        except NotPlainError as error:
            self._say(f"switches load the model's files again: {error}")
            self._is_in_place = False
            self._memory.clear()
            return None
        return {key: Entries(*map(torch.cat, zip(*pieces))) for key, pieces in parts.items()}

    def _write(self, before: Sequence[_Held], wanted: Sequence[_Held], rule: str) -> None:
        """Assign the base's values of `before`, then the values of `wanted`."""
        if not self._is_in_place:
            self._reload(self._laid_over(_final(wanted, rule)))
            return
        for held in before:
            for key, entries in held.entries.items():
                self._assign(key, entries.positions, entries.base)
        for key, writes in _final(wanted, rule).items():
            for entries in writes:
                self._assign(key, entries.positions, entries.values)

    def _assign(self, key: int | str, positions: Tensor, values: Tensor) -> None:
        assert isinstance(key, int)
        memory = self._memory[key]
        with tensor_mode(memory):
            memory.index_copy_(0, positions.long(), values)

    def _laid_over(self, writes: Mapping[int | str, Sequence[Entries]]) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's tensors with the entries assigned."""
        for file in weight_files(self._folder):
            for name, tensor in read_tensors(file):
                for entries in writes.get(name, ()):
                    tensor.view(-1).index_copy_(0, entries.positions, entries.values)
                yield name, tensor


def _final(tickets: Sequence[_Held], rule: str) -> dict[int | str, list[Entries]]:
    """What to assign, in order, by memory or key."""
    writes: dict[int | str, list[Entries]] = {}
    for held in tickets:
        for key, entries in held.entries.items():
            writes.setdefault(key, []).append(entries)
    if rule == "sum":
        for parts in writes.values():
            parts.append(sum_shared(parts))
    return writes


def _check_disjoint(tickets: Sequence[_Held]) -> None:
    """ValueError where two tickets change the same entry."""
    shared = sum(shared_positions(parts).numel() for parts in _final(tickets, "refuse").values())
    if shared:
        raise ValueError(
            f"the tickets {', '.join(held.path for held in tickets)} share {shared} entries: switch to one of them, "
            "merge them first, or choose what a shared entry gets (--rule last, or --rule sum)"
        )


def _identity(path: str) -> str:
    """sha256 of a ticket's ticket.json."""
    try:
        with open_regular(local_directory(path) / MANIFEST_NAME) as file:
            return hashlib.sha256(file.read()).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: the server finds no ticket there: expected a path on the server's machine") from None


def _state_of(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of the checkpoint's files: what was loaded is what is there as long as they stay."""
    states = [(file.name, os.stat(file)) for file in weight_files(folder)]
    return [(name, state.st_size, state.st_mtime_ns) for name, state in states]
