"""Proof that a model is a base plus exactly these tickets, and that entries that are to stay did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lota.algebra.models import ModelTensors
from lota.delivery.live import check_disjoint, check_frozen, check_is_base, rounded
from lota.delivery.rewrite import changed_positions
from lota.progress import Say, silent, tracked
from lota.tensor_names import find_names
from lota.ticket import Mask, Ticket


@dataclass
class Verdict:
    """problems: what is not as it should be, a line each; none: proved. compared: names of the tensors that were held
    against something. not_compared: those that nothing is known of. how: what was compared with what."""

    how: str
    problems: list[str] = field(default_factory=list)
    compared: list[str] = field(default_factory=list)
    not_compared: list[str] = field(default_factory=list)

    @property
    def is_proved(self) -> bool:
        return not self.problems


def verify(
    tickets: Sequence[Ticket],
    *,
    base: ModelTensors | None = None,
    tuned: ModelTensors | None = None,
    protected: Sequence[Mask] = (),
    say: Say = silent,
) -> Verdict:
    """Hold a model against its base and its tickets.

    base and tuned: every bit of `tuned` is the base's, or a ticket's where it is active. tuned alone: with the tickets'
    base values put back, every tensor that the tickets know has the base's fingerprint. base alone: it is the base of
    the tickets. Neither: the tickets' files are sound. protected: entries of these masks have not moved between base
    and tuned.
    """
    check_disjoint(tickets)
    for ticket in tickets:
        ticket.verify()
    if tuned is None:
        if protected:
            raise ValueError("protected entries are looked at in a tuned model: give it")
        return _of_base(tickets, base, say) if base is not None else Verdict("the files of the tickets are sound")
    if base is None:
        if protected:
            raise ValueError("whether protected entries moved is seen beside the base: give it")
        return _of_tuned(tickets, tuned, say)
    return _of_both(tickets, base, tuned, protected, say)


def _of_base(tickets: Sequence[Ticket], base: ModelTensors, say: Say) -> Verdict:
    verdict = Verdict(f"{base.where} is the base of the tickets")
    known = _known(tickets, base, verdict)
    for name in tracked(base.names, "compared", say):
        tensor, is_known = base.read(name), False
        for ticket, own in known[name]:
            is_known |= ticket.mask.identity(own) is not None
            _check(verdict, ticket.mask, own, tensor)
        (verdict.compared if is_known else verdict.not_compared).append(name)
    return verdict


def _of_tuned(tickets: Sequence[Ticket], tuned: ModelTensors, say: Say) -> Verdict:
    verdict = Verdict(f"{tuned.where}, with the base values put back, has the base's fingerprints")
    known = _known(tickets, tuned, verdict)
    for name in tracked(tuned.names, "compared", say):
        tensor, is_known = tuned.read(name), False
        flat = tensor.contiguous().view(-1).clone()
        for ticket, own in known[name]:
            if own in ticket.mask.names and ticket.mask.active(own):
                where = ticket.mask.indices(own)
                before = ticket.base_values_on(own, flat[where])
                num_other = _num_differing(flat[where], rounded(own, ticket.values_on(own, before), flat))
                if num_other:
                    verdict.problems.append(
                        f"{name}: {num_other} of {where.numel()} entries have not the ticket's value"
                    )
                flat[where] = before.to(flat.dtype)
        for ticket, own in known[name]:
            is_known |= ticket.mask.identity(own) is not None
            _check(verdict, ticket.mask, own, flat.view(tensor.shape))
        (verdict.compared if is_known else verdict.not_compared).append(name)
    return verdict


def _of_both(
    tickets: Sequence[Ticket], base: ModelTensors, tuned: ModelTensors, protected: Sequence[Mask], say: Say
) -> Verdict:
    verdict = Verdict(f"{tuned.where} is {base.where} plus the tickets, bit for bit")
    known = _known(tickets, base, verdict)
    for mine, others in ((base, tuned), (tuned, base)):
        missing = [name for name in mine.names if name not in set(others.names)]
        verdict.problems += [f"{name} is in {mine.where} and not in {others.where}" for name in missing]
    guarded = [find_names(mask.names, base.names) for mask in protected]
    for name in tracked(base.names, "compared", say):
        if name not in set(tuned.names):
            continue
        one, other = base.read(name), tuned.read(name)
        if one.shape != other.shape or one.dtype != other.dtype:
            verdict.problems.append(f"{name}: {one.dtype} {tuple(one.shape)} became {other.dtype} {tuple(other.shape)}")
            continue
        for ticket, own in known[name]:
            _check(verdict, ticket.mask, own, one)
        wanted = one.contiguous().view(-1).clone()
        for ticket, own in known[name]:
            if own in ticket.mask.names and ticket.mask.active(own):
                where = ticket.mask.indices(own)
                wanted[where] = rounded(own, ticket.values_on(own, wanted[where]), wanted)
        wrong = changed_positions(wanted, other.contiguous().view(-1))
        if wrong.numel():
            places = ", ".join(map(str, wrong[:3].tolist()))
            verdict.problems.append(f"{name}: {wrong.numel()} of {wanted.numel()} entries differ, at {places}")
        moved = changed_positions(one, other)
        for mask, names in zip(protected, guarded, strict=True):
            guard = next((own_name for own_name, found in names.items() if found == name), None)
            if guard is not None and mask.active(guard):
                count = int(torch.isin(mask.indices(guard), moved).sum())
                if count:
                    verdict.problems.append(f"{name}: {count} of {mask.active(guard)} protected entries moved")
        verdict.compared.append(name)
    return verdict


def _known(tickets: Sequence[Ticket], model: ModelTensors, verdict: Verdict) -> dict[str, list[tuple[Ticket, str]]]:
    """By the model's name, the tickets that know the tensor and their names for it; what they name and the model lacks
    is a problem."""
    found: dict[str, list[tuple[Ticket, str]]] = {name: [] for name in model.names}
    for ticket in tickets:
        for own, name in find_names((*ticket.names, *ticket.mask.frozen), model.names).items():
            if name is not None:
                found[name].append((ticket, own))
            elif own in ticket.mask.names:
                verdict.problems.append(f"the ticket names {own}, which {model.where} does not have")
    return found


def _check(verdict: Verdict, mask: Mask, name: str, tensor: Tensor) -> None:
    try:
        if name in mask.names:
            check_is_base(mask, name, tensor)
        else:
            check_frozen(mask, name, tensor)
    except ValueError as error:
        verdict.problems.append(str(error))


def _num_differing(one: Tensor, other: Tensor) -> int:
    return int(changed_positions(one, other).numel())
