"""Many tickets of one base on one model, switched in the time of a copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lota.choices import STACKING_RULES, check_choice
from lota.delivery.live import check_disjoint, locate_entries, tensor_mode
from lota.delivery.stacking import Entries, sum_shared
from lota.ticket import Ticket


@dataclass(frozen=True)
class _Entries:
    """Entries of one tensor. values, base: in the weights' dtype, where the switcher keeps them."""

    name: str
    flat: Tensor
    positions: Tensor
    values: Tensor
    base: Tensor


class TicketSwitcher:
    """Holds tickets by name with their positions decoded, and puts any of them on the model in place.

        switcher = lota.TicketSwitcher(model, {"math": math, "sql": sql})
        switcher.to("math")             # on
        switcher.to("sql")              # math off, sql on
        switcher.to(["math", "sql"])    # both; shared entries by `rule`
        switcher.to(None)               # every bit of the base

    The model is verified against each ticket once, when it is added, on the base. Afterwards a switch writes the base's
    bits of what is on and the values of what comes, and reads nothing else: the model belongs to the switcher until
    `to(None)`.
    """

    def __init__(
        self,
        model: nn.Module,
        tickets: Mapping[str, Ticket] | None = None,
        *,
        device: torch.device | str | None = None,
        rule: str = "refuse",
    ) -> None:
        """device: where positions and values are kept (None: with each weight); `cpu` spares the memory of a GPU for
        the price of a transfer at every switch. rule: what an entry gets that several tickets on at once have: `refuse`
        (a ValueError), `last` (the last ticket's value), `sum` (base + the sum of the differences, in fp32, rounded).
        """
        check_choice("rule", rule, STACKING_RULES)
        self._model, self._rule = model, rule
        self._device = None if device is None else torch.device(device)
        self._held: dict[str, tuple[Ticket, list[_Entries]]] = {}
        self._on: tuple[str, ...] = ()
        for name, ticket in (tickets or {}).items():
            self.add(name, ticket)

    @property
    def names(self) -> tuple[str, ...]:
        """The tickets that are held."""
        return tuple(self._held)

    @property
    def on(self) -> tuple[str, ...]:
        """Those that are on the model, in the order in which they were put on."""
        return self._on

    def add(self, name: str, ticket: Ticket) -> None:
        """Hold a ticket under a name; what is on stays on. ValueError where the model is not its base."""
        if name in self._held:
            raise ValueError(f"a ticket called {name!r} is held already: remove it first")
        before = self._on
        self.to(None)
        try:
            entries = []
            for found, tensor, positions, values in locate_entries(self._model, ticket):
                flat = tensor.detach().view(-1)
                where = self._device or flat.device
                entries.append(_Entries(found, flat, positions.to(where), values.to(where), flat[positions].to(where)))
            self._held[name] = ticket, entries
        finally:
            self.to(before)

    def remove(self, name: str) -> None:
        """Forget a ticket; it comes off if it is on."""
        self._known(name)
        self.to([other for other in self._on if other != name])
        del self._held[name]

    def to(self, names: str | Sequence[str] | None) -> None:
        """Have exactly these tickets on the model; None or none: the base. ValueError leaves everything as it is."""
        wanted = () if names is None else (names,) if isinstance(names, str) else tuple(names)
        for name in wanted:
            self._known(name)
        if len(set(wanted)) != len(wanted):
            raise ValueError(f"expected every ticket once, got {', '.join(wanted)}")
        if len(wanted) > 1 and self._rule == "refuse":
            check_disjoint([self._held[name][0] for name in wanted])
        writes = [(part, part.base) for name in reversed(self._on) for part in self._held[name][1]]
        writes += [(part, part.values) for name in wanted for part in self._held[name][1]]
        if len(wanted) > 1 and self._rule == "sum":
            writes += self._sums(wanted)
        for part, values in writes:
            with tensor_mode(part.flat):
                device = part.flat.device
                part.flat.index_copy_(0, part.positions.to(device), values.to(device))
        self._on = wanted

    @contextmanager
    def using(self, names: str | Sequence[str] | None) -> Iterator[nn.Module]:
        """These tickets for the length of a `with`, then what was on before."""
        before = self._on
        self.to(names)
        try:
            yield self._model
        finally:
            self.to(before)

    def _sums(self, wanted: Sequence[str]) -> list[tuple[_Entries, Tensor]]:
        """Entries that several of the tickets have: base + the sum of their differences, rounded once."""
        by_tensor: dict[str, list[_Entries]] = {}
        for name in wanted:
            for part in self._held[name][1]:
                by_tensor.setdefault(part.name, []).append(part)
        writes = []
        for parts in by_tensor.values():
            if len(parts) > 1:
                made = sum_shared([Entries(part.positions, part.values, part.base) for part in parts])
                first = parts[0]
                writes.append((_Entries(first.name, first.flat, made.positions, made.values, made.base), made.values))
        return writes

    def _known(self, name: str) -> None:
        if name not in self._held:
            raise ValueError(f"no ticket called {name!r} is held: expected one of {', '.join(self._held) or 'none'}")
