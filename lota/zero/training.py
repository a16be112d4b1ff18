"""The run behind `sparse_zero3`: checks, the training inside the engine, its report and its ticket."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from lota import choices, plan
from lota.choices import MAX_SKIPPED_STEPS, check_rounding_seed
from lota.kernels import backend_name
from lota.messages import did_you_mean
from lota.ranks.agree import together
from lota.ticket import BaseTensor, Mask, Ticket
from lota.ticket.fingerprint import add
from lota.ticket.manifest import check_provenance
from lota.ticket.rows import Rows
from lota.zero.block import BUCKET_NUMEL, BlockRun
from lota.zero.buffers import StoredBuffers
from lota.zero.compact.groups import check_shard_group_size, connect, make_groups
from lota.zero.compact.mask_counts import mask_counts
from lota.zero.compact.outline import MaskOutline
from lota.zero.compact.pulling import Pulling, Retained
from lota.zero.compact.training import SparseTraining
from lota.zero.compact.update import choose_update
from lota.zero.deepspeed import weights
from lota.zero.deepspeed.optimizer import SparseOptimizer
from lota.zero.deepspeed.settings import communication_dtype, gather_limits
from lota.zero.exchange import base_in_place, fraction_in_place, settle, ticket_in_place
from lota.zero.fingerprints import differing, dtype_name, frozen_identity, replicas_agree, without_tickets
from lota.zero.freeze import Freeze
from lota.zero.new_tensors import class_name, model_facts, new_tensors, refuse_new
from lota.zero.save_ticket import base_put_back, collect, deliver

_LOG = logging.getLogger("lota")


class SparseRun(BlockRun):
    """Sparse training on a mask.

    dense(shapes of parameters and persistent buffers): which of them train whole, and which rows of them.
    outline: names, shapes, counts and identity of the mask. Its indices are read when the engine is built; afterwards
    only rank 0 keeps them, for the ticket.
    """

    is_sparse = True
    optimizer_class = SparseOptimizer

    def __init__(
        self,
        mask: Mask,
        *,
        shard_group_size: int | str | None,
        gradient_reduction: str,
        reduce_every: str,
        dense: Callable[[Mapping[str, tuple[int, ...]]], Mapping[str, Rows]] | None = None,
        max_skipped_steps: int = MAX_SKIPPED_STEPS,
        rounding_seed: int | None = None,
        retained: Retained | None = None,
    ) -> None:
        super().__init__(max_skipped_steps)
        self._given: Mask | None = mask
        self._dense, self._new = dense, dict[str, int]()
        self._buffers: StoredBuffers | None = None
        self.outline = MaskOutline(mask)
        self._mask: Mask | None = mask
        self._rounding_seed = check_rounding_seed(rounding_seed)
        self._shard_group_size, self._reduce_every = shard_group_size, reduce_every
        self.retained = retained
        self._gradient_reduction, self._reduction_reason = gradient_reduction, "as asked"
        self._kernels = ""
        self.is_exchanged = False

    @property
    def mask(self) -> Mask | MaskOutline:
        """The mask on rank 0, and on all ranks until the engine is built; then, on the others, its outline."""
        return self.outline if self._mask is None else self._mask

    @property
    def _training(self) -> SparseTraining:
        self._need_engine("the ticket")
        assert isinstance(self.core, SparseTraining)
        return self.core

    def prepare(self, model: torch.nn.Module, config: Any) -> None:
        size = self._agreed_shard_group_size()
        weights.check_world_sharded(model, " and pass shard_group_size")
        given = self._whole_mask()
        _check_same_on_all_ranks(given.digest, self.device)
        buffers = weights.buffers(model)
        shapes, buffer_shapes = weights.shapes(model), {name: tuple(buffer.shape) for name, buffer in buffers.items()}
        named = self._dense(buffer_shapes | shapes) if self._dense is not None else {}
        mask = given.with_dense({name: ((buffer_shapes | shapes)[name], rows) for name, rows in named.items()}, {})
        self._check_fits(mask, given, model, config)
        for importance in self.retained.importances if self.retained is not None else ():
            importance.check_fits({name: mask.shape(name) for name in mask.names})
        self._new = new_tensors(model) | {name: base.rows for name, base in given.base.items() if base.rows is not None}
        refuse_new(self._new, model, lambda name, rows: name in mask.names and mask.has_all(name, rows))
        self._buffers = StoredBuffers(model, [name for name in mask.names if name not in shapes])
        self._mask = mask.without(self._buffers.stored)
        self.outline = MaskOutline(self._mask)
        active = set(self._trained_names())
        if not active:
            raise ValueError("the mask has no active entry, so there is nothing to train")
        self._freeze = Freeze(model, active)
        self._groups = make_groups(size)

    def _check_fits(self, mask: Mask, given: Mask, model: torch.nn.Module, config: Any) -> None:
        """ValueError where the mask (`given`, completed) does not fit the model. Local."""
        parameters, buffers = dict(model.named_parameters()), weights.buffers(model)
        shapes, dtypes = weights.shapes(model), weights.engine_dtypes(model, config)
        for name in mask.names:
            if name in buffers:
                if not mask.is_dense(name):
                    raise ValueError(f"{name} is a buffer, which a ticket stores whole or not at all: name it in dense")
            elif name not in shapes:
                raise ValueError(f"the mask names {name}, which the model does not have" + did_you_mean(name, shapes))
            elif self._rounding_seed is not None and mask.active(name) and dtypes[name] != torch.bfloat16:
                raise ValueError(
                    f"rounding_seed={self._rounding_seed} rounds bf16 weights stochastically, but {name} is "
                    f"{dtype_name(dtypes[name])}: load the model in bf16, or leave rounding_seed out"
                )
            elif mask.active(name) and not parameters[name].requires_grad:
                raise ValueError(
                    f"the mask trains {name}, but its requires_grad is False; set it to True or leave the tensor "
                    "out of the mask"
                )
            if name in given.names:
                is_buffer = name in buffers
                shape = tuple(buffers[name].shape) if is_buffer else shapes[name]
                given.check_base(name, shape, str(buffers[name].dtype) if is_buffer else dtype_name(dtypes[name]), None)

    def _stored_buffers(self) -> StoredBuffers:
        assert self._buffers is not None
        return self._buffers

    def _agreed_shard_group_size(self) -> int:
        """Collective: nodes may have different numbers of ranks, and scripts may say different things."""
        with together():
            size = check_shard_group_size(self._shard_group_size, dist.get_world_size())
        sizes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(sizes, size)
        if len(set(sizes)) > 1:
            other = next(rank for rank, other in enumerate(sizes) if other != sizes[0])
            raise ValueError(
                f"shard_group_size {self._shard_group_size} means {sizes[0]} ranks on rank 0 and {sizes[other]} on "
                f"rank {other}: start the same number of ranks on every node, or give the same group size everywhere"
            )
        return size

    def build(self, optimizer: Any, engine: Any) -> SparseTraining:
        tensor_groups, mask = weights.trainable_groups(optimizer), self._whole_mask()
        update = choose_update(optimizer.optimizer, tensor_groups[0].weights.device, self._rounding_seed)
        self._check_optimizer_holds(self._trained_names(), optimizer, "the mask trains")
        self._identify(engine.module, self._new)
        buffers, given = self._stored_buffers(), self._given
        assert given is not None
        buffers.begin()
        identities = self.base_identity | buffers.base
        for name in given.names:
            base, change = given.base.get(name), given.change(name)
            if base is not None and change is not None and _is_applied(base, change, identities[name]):
                continue  # the ticket is on the model already, and its entries are trained further
            given.check_base(name, given.shape(name), identities[name].dtype, identities[name].fingerprint)
        for name in given.frozen.keys() & identities.keys() - self._new.keys():
            given.check_base(name, (), identities[name].dtype, identities[name].fingerprint)
        self._kernels = backend_name(tensor_groups[0].weights.device)
        self._decide_reduction(optimizer, engine, tensor_groups[0].weights.device)
        connect(self.groups.reduction, self.device)
        self.core = SparseTraining(
            tensor_groups,
            mask,
            update,
            groups=self.groups.reduction,
            device=self.device,
            bucket_numel=min(int(optimizer.reduce_bucket_size), BUCKET_NUMEL),
            reduce_every=self._reduce_every,
            gradient_reduction=self._gradient_reduction,
            wire=communication_dtype(engine),
            retained=self.retained,
        )
        self.core.extra = buffers.vectors
        self._given = None
        if dist.get_rank() > 0:
            self._mask = None
        return self.core

    def _whole_mask(self) -> Mask:
        assert self._mask is not None
        return self._mask

    def _trained_names(self) -> list[str]:
        return [name for name in self.outline.names if self.outline.active(name)]

    def _identity(self) -> dict[str, Any]:
        outline = self.outline
        mask = {"digest": outline.digest, "num_active": outline.num_active, "eligible": outline.eligible}
        return {
            "kind": "sparse training",
            "mask": mask,
            "optimizer": self._training.update.name,
            "rounding_seed": self._rounding_seed,
            **({} if self.retained is None else {"pull": self.retained.identity}),
            **super()._identity(),
        }

    def before_step(self) -> None:
        super().before_step()
        if self._training.pulling is not None:
            self._training.pulling.begin(self.engine.optimizer.optimizer, self.engine.lr_scheduler)

    def _decide_reduction(self, optimizer: Any, engine: Any, weights_device: torch.device) -> None:
        """Decide `auto` by the planner, the same way on all ranks, and log it once. Collective."""
        if self._gradient_reduction != "auto":
            return
        is_offloaded = weights_device.type != self.device.type
        layout = replace(self._plan_layout(optimizer, engine), offload_param=is_offloaded)

        @cache
        def counts() -> plan.MaskCounts:
            return mask_counts(self._whole_mask(), layout.shard_size)

        def plan_of(kind: str) -> plan.MethodPlan:
            item_bytes = max(part.data.element_size() for part in weights.partitions(engine.module))
            model = plan.ModelShapes("", weights.shapes(engine.module), 0, item_bytes)
            return plan.lota(model, layout, counts(), reduction=kind, is_pulled=self.retained is not None)

        self._gradient_reduction, self._reduction_reason = plan.choose_reduction(
            plan_of,
            smallest_memory(self.device),
            shard_size=layout.shard_size,
            reduce_every=self._reduce_every,
        )
        if dist.get_rank() == 0:
            _LOG.info("gradient_reduction %s", self._reduction_reason)

    def _plan_layout(self, optimizer: Any, engine: Any) -> plan.RankLayout:
        reduction, limits = self.groups.reduction, gather_limits(engine)
        return plan.RankLayout(
            ranks=reduction.world_size,
            shard_group_size=reduction.shard_size,
            gradient_accumulation_steps=engine.gradient_accumulation_steps(),
            bucket=int(optimizer.reduce_bucket_size),
            persistence_threshold=limits.persistence_threshold,
            live_parameters=limits.live_parameters,
            communication_bytes=communication_dtype(engine).itemsize,
        )

    def report(self) -> dict[str, Any]:
        """What this rank holds and sent, in bytes, against dense ZeRO-3 AdamW with fp32 gradients; counts and steps."""
        training, reduction = self._training, self.groups.reduction
        shards = reduction.shard_size
        trained = self.outline.eligible
        within_groups = trained if shards > 1 else 0
        across_groups = -(-trained // shards) if shards < reduction.world_size else 0
        local = [state.layout.local_active for state in training.states]
        return {
            "num_active": self.outline.num_active,
            "eligible": self.outline.eligible,
            "density": self.outline.density,
            "num_dense": self.outline.num_dense,
            "num_active_this_rank": sum(local),
            "num_active_fullest_rank": max(
                sum(state.layout.active_of_rank(rank) for state in training.states) for rank in range(shards)
            ),
            "update": training.update.name,
            "rounding_seed": self._rounding_seed,
            "gradient_reduction": self._gradient_reduction,
            "gradient_reduction_reason": self._reduction_reason,
            "communication_dtype": dtype_name(training.wire),
            "kernels": self._kernels,
            "shard_group_size": shards,
            **({} if training.pulling is None else {"pull": _pull_report(training.pulling)}),
            "steps": training.num_steps,
            "skipped_steps": training.num_skipped(),
            "bytes_held": {
                "weights": self._weights_bytes(),
                **training.nbytes(),
                "buffers": training.buffer_bytes(),
                "mask_host": self.mask.nbytes,
            },
            "bytes_held_dense": {
                "weights": self._weights_bytes(),
                "masters_moments_gradients": 16 * -(-trained // shards),
            },
            "bytes_sent": training.bytes_sent(),
            "bytes_sent_dense": training.num_reductions * 4 * (within_groups + across_groups),
            "reductions": training.num_reductions,
        }

    @contextmanager
    def base(self) -> Iterator[Any]:
        """The base's values at the active entries for the length of a `with`, in place, on the sharded model: a
        reference model for two bytes an active entry. Gives the model. Collective; no step may be taken inside."""
        training = self._training
        with self._exchanged(), base_in_place(training, self.engine.optimizer):
            yield self.engine.module

    @contextmanager
    def at(self, alpha: float) -> Iterator[Any]:
        """A point between the values at the start and the trained ones, for the length of a `with`: alpha 0 is the
        start, 1 the trained model. Collective; no step may be taken inside."""
        choices.check_alpha(alpha)
        training = self._training
        with self._exchanged(), fraction_in_place(training, self.engine.optimizer, alpha):
            yield self.engine.module

    def settle(self, alpha: float) -> None:
        """Make a point between the values at the start and the trained ones the outcome of the run: the ticket that is
        saved holds it. Collective."""
        choices.check_alpha(alpha)
        if self.is_exchanged:
            raise ValueError("settle inside run.base(), run.applied() or run.at(): leave it first")
        if alpha != 1:
            settle(self._training, self.engine.optimizer, alpha)

    @contextmanager
    def applied(self, ticket: Ticket) -> Iterator[Any]:
        """The base with another ticket of it, likewise. The ticket's fingerprints are held against the base's."""
        training, reduction = self._training, self.groups.reduction
        for name in ticket.mask.base.keys() & self.base_identity.keys():
            found = self.base_identity[name]
            ticket.mask.check_base(name, ticket.mask.shape(name), found.dtype, found.fingerprint)
        sizes = reduction.shard_size, reduction.shard_rank
        with (
            self._exchanged(),
            base_in_place(training, self.engine.optimizer),
            ticket_in_place(self.engine.module, ticket, self.engine.optimizer, *sizes),
        ):
            yield self.engine.module

    def values(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The trained values of every tensor of the mask, compact and in the mask's order, as a ticket holds them: on
        rank 0, in host memory; empty elsewhere. dtype: None gives the weights' own bits. Collective."""
        training = self._training
        outline = self.outline.with_base({name: self.base_identity[name] for name in self.outline.names})
        made = {}
        for name in outline.names:
            values, _ = collect(training, outline, name, dtype, self.device)
            if dist.get_rank() == 0:
                made[name] = values
        return made

    @contextmanager
    def _exchanged(self) -> Iterator[None]:
        if self.is_exchanged:
            raise ValueError("run.base() and run.applied() do not go inside one another")
        self.is_exchanged = True
        try:
            yield
        finally:
            self.is_exchanged = False

    def save_ticket(
        self,
        path: str | Path,
        provenance: Mapping[str, Any] | None = None,
        *,
        dtype: torch.dtype | None = None,
        overwrite: bool = False,
        beside: Sequence[Ticket] = (),
        form: str = "plain",
    ) -> dict[str, Any]:
        """Verify that no frozen bit of the model moved, then write the ticket. Collective; rank 0 writes.

        Persistent buffers count: one that moved and is not stored (`dense`) is an error. Those that are stored have
        rank 0's values.

        beside: tickets that were on the base when the run began and share no entry with its mask: the ticket is then
        of the base without them, so that each can be applied and taken out without the others.
        form: `packed` stores differences to the base's values, in about half of the bytes (see `TicketWriter`).
        dtype: None stores the weights' own bits, torch.float32 the masters. Returns counts and bytes on every rank.
        Raises RuntimeError where a frozen entry changed (a fault, or a script that wrote into the weights), and
        ValueError or OSError where the ticket cannot be written; then nothing is left at `path`.
        """
        if dtype not in (None, torch.float32):
            raise ValueError(f"dtype must be None (the weights' own) or torch.float32 (the masters), got {dtype}")
        training = self._training
        if self.is_exchanged:
            raise ValueError("save_ticket inside run.base() or run.applied() would store other weights")
        reduction = self.groups.reduction
        now = self._fingerprints(self.engine.module, base_put_back(training))
        moved = differing(now, self.start, reduction.world, self.device)
        if moved:
            raise RuntimeError(
                f"{len(moved)} tensors changed outside the mask, {moved[0]} first: something wrote into frozen weights "
                "during the run. The ticket was not written."
            )
        if not replicas_agree(self._fingerprints(self.engine.module), reduction.replica, self.device):
            raise RuntimeError(
                "copies of the weights in different shard groups are no longer equal: something wrote into trained "
                "weights on some ranks only. The ticket was not written."
            )
        buffers = self._stored_buffers()
        buffers.check_unmoved(reduction.world, self.device)
        identity = without_tickets(self.base_identity, beside)
        base = {name: identity[name] for name in self.outline.names}
        frozen = frozen_identity(identity | buffers.base, self._new, {*base, *buffers.stored})
        return deliver(
            training,
            self.outline.with_base(base),
            buffers.add_to(self._whole_mask().with_base(base, frozen)) if dist.get_rank() == 0 else None,
            path,
            {"class": class_name(self.engine.module), **check_provenance(provenance)},
            stored=buffers.values(),
            model=model_facts(self.engine.module) if self._new else None,
            dtype=dtype,
            overwrite=overwrite,
            form=form,
            device=self.device,
        )


def _pull_report(pulling: Pulling) -> dict[str, Any]:
    """asked, and what the rates of all steps add up to, by parameter group; how many of this rank's entries have an
    importance above 0; what it is the importance of."""
    return {
        "asked": pulling.retained.pull,
        "reached": list(pulling.reached().values()),
        "num_pulled_this_rank": pulling.num_pulled,
        "retained": [importance.facts for importance in pulling.retained.importances],
    }


def _is_applied(base: BaseTensor, change: int, found: BaseTensor) -> bool:
    return base.dtype == found.dtype and int(found.fingerprint, 16) == add(int(base.fingerprint, 16), change)


def smallest_memory(device: torch.device) -> int | None:
    """Bytes of the smallest accelerator among all ranks; None on CPUs, whose memory ranks share. Collective there."""
    if device.type == "cpu":
        return None
    total = torch.tensor([get_accelerator().total_memory()], dtype=torch.int64, device=device)
    dist.all_reduce(total, op=dist.ReduceOp.MIN)
    return int(total)


def _check_same_on_all_ranks(digest: str, device: torch.device) -> None:
    value = torch.tensor([int(digest[:15], 16)], dtype=torch.int64, device=device)
    low, high = value.clone(), value.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    if not torch.equal(low, high):
        raise ValueError(
            "the mask differs between ranks: load the same ticket on every rank, or broadcast the mask from rank 0"
        )
