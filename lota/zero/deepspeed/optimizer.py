"""DeepSpeed's ZeRO-3 optimizer, subclassed: dense with what calibration needs, and compact for everything else.

With `engine.py`, `weights.py` and `dense_state.py` the only file with DeepSpeed's private names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.utils import defragment
from torch import Tensor

from lota.zero.compact.training import SparseTraining


class MixedDtypes(DeepSpeedZeroOptimizer_Stage3):
    """ZeRO-3 whose weights may have several dtypes (a model that keeps some of its tensors in fp32).

    DeepSpeed flattens all trained weights into one buffer, of one dtype; here every dtype has a buffer of its own.
    """

    @property
    def defaults(self) -> dict[str, Any]:
        """Those of the caller's optimizer, which some schedules of transformers read (polynomial)."""
        made: dict[str, Any] = self.optimizer.defaults
        return made

    def _create_fp16_sub_groups(self, params_group: list[Any]) -> list[list[Any]]:
        """Sub-groups of one dtype each."""
        by_dtype: dict[torch.dtype, list[Any]] = {}
        for param in params_group:
            by_dtype.setdefault(param.ds_tensor.dtype, []).append(param)
        make = super()._create_fp16_sub_groups
        return [sub_group for params in by_dtype.values() for sub_group in make(params)]

    def _get_parameter_partitions(self) -> list[Tensor]:
        """What DeepSpeed puts into its buffer: the pieces of the first dtype."""
        pieces = super()._get_parameter_partitions()
        return [piece for piece in pieces if piece.dtype == pieces[0].dtype]

    def _set_fp16_partitioned_groups_flat(self) -> None:
        buffers = {self.lp_param_buffer.dtype: self.lp_param_buffer}
        pieces = super()._get_parameter_partitions()
        for dtype in dict.fromkeys(piece.dtype for piece in pieces):
            if dtype not in buffers:
                buffers[dtype] = defragment([piece for piece in pieces if piece.dtype == dtype])
        filled = dict.fromkeys(buffers, 0)
        for sub_group in self.fp16_groups:
            dtype, numel = sub_group[0].ds_tensor.dtype, sum(param.partition_numel() for param in sub_group)
            self.fp16_partitioned_groups_flat.append(buffers[dtype].narrow(0, filled[dtype], numel))
            filled[dtype] += numel


class DenseOptimizer(MixedDtypes):
    """DeepSpeed's own ZeRO-3, except that a step uses the sum of all gradients since the last step.

    DeepSpeed counts micro steps by forwards and lets the first one overwrite its buffers: where two forwards precede
    two backwards, the second gradient replaces the first, and a weight that no micro step used is stepped by an old
    one. Here micro steps are counted by backwards, and the buffers are zeros after a step.
    """

    _is_stepping = False

    def independent_gradient_partition_epilogue(self) -> None:
        super().independent_gradient_partition_epilogue()
        self.micro_step_id += 1
        self._epilogue_ran_this_backward = False  # or the next forward would count this backward again

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        if self._is_stepping:
            return  # DeepSpeed's step calls this before it uses the buffers, and its engine once more after the step
        if self.grad_partitions_flat_buffer is not None:
            self.grad_partitions_flat_buffer.zero_()
        if self.offload_optimizer:
            for flat in self.fp32_partitioned_groups_flat:
                if flat.grad is not None:
                    flat.grad.zero_()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        if self.offload_optimizer:
            # Gradients move to the host in the step's last backward, which those of weights that it did not use missed.
            moved = self.norm_for_param_grads
            waiting = {p.ds_id for group in self.fp16_groups for p in group if self.get_param_id(p) not in moved}
            self._offload_boundary_param_ids &= waiting
            self.finalize_gradient_accumulation_boundary()
        self._is_stepping = True
        try:
            super().step(closure)
        finally:
            self._is_stepping = False


class CompactOptimizer(MixedDtypes):
    """ZeRO-3 whose gradients and steps go to `self.core` (built by the run); it allocates nothing dense itself."""

    def __init__(self, *args: Any, lota_run: Any, lota_engine: Any, **kwargs: Any) -> None:
        self._lota_run, self._lota_engine = lota_run, lota_engine
        self.core: Any = None
        super().__init__(*args, **kwargs)

    def _setup_for_real_optimizer(self) -> None:
        self.core = self._lota_run.build(self, self._lota_engine)
        for group in self.optimizer.param_groups:
            group["params"] = []

    def reduce_independent_p_g_buckets_and_remove_grads(self, param: Any) -> None:
        """Called when a parameter's gradient is complete; its dense gradient ends here."""
        if param.grad is None or not getattr(param, "ds_grad_is_ready", True):
            return
        gradient, param.grad = param.grad, None
        self.core.add_gradient(self.param_names[param], gradient)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        if self.core is not None:
            self.core.discard_gradients()

    def independent_gradient_partition_epilogue(self) -> None:
        self.core.finish_backward(self.is_gradient_accumulation_boundary())
        for param_id in self.params_already_reduced:
            self.params_already_reduced[param_id] = False
        self._epilogue_ran_this_backward = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        if closure is not None:
            raise ValueError("step does not take a closure")
        # torch's schedulers wrap the optimizer's own step to see that it comes before theirs; this is that step.
        self.optimizer._opt_called = True
        self._pre_step()
        self._partition_all_parameters()
        self._global_grad_norm, skip = self.lota_step()
        self.overflow: Any = skip
        if self.dtype == torch.float16:
            self.overflow = bool(skip)
            self._update_scale(self.overflow)
        self.zero_grad(set_to_none=True)
        self._post_step(set())

    def lota_step(self) -> tuple[Tensor, Tensor]:
        """The gradient norm and whether the step was skipped, as device scalars."""
        return self.core.step(self.loss_scale)

    def _refuse(self, what: str) -> NoReturn:
        raise NotImplementedError(
            f"{what} is not available inside a lota block: only active entries have fp32 state, and there is none "
            "for the frozen ones to read or write"
        )

    def has_overflow(self, partition_gradients: bool = True) -> NoReturn:
        self._refuse("has_overflow")

    def set_full_hp_param(self, value: Any, param: Any, optim_state_key: Any = None) -> NoReturn:
        self._refuse("safe_set_full_fp32_param / safe_set_full_optimizer_state")

    def set_local_hp_param(self, value: Any, param: Any, optim_state_key: Any = None) -> NoReturn:
        self._refuse("safe_set_local_fp32_param / safe_set_local_optimizer_state")

    def set_fp32_grad_for_param(self, value: Any, param: Any) -> NoReturn:
        self._refuse("safe_set_full_grad")

    def set_local_grad_for_param(self, value: Any, param: Any) -> NoReturn:
        self._refuse("safe_set_local_grad")

    def update_fp32_grad_for_param_vectorized(self, update_func: Any, param_list: Any) -> NoReturn:
        self._refuse("safe_update_full_grad_vectorized")

    def get_full_hp_param(self, param: Any, optim_state_key: Any = None) -> Any:
        self._refuse("safe_get_full_fp32_param / safe_get_full_optimizer_state")

    def get_local_fp32_param(self, param: Any, optim_state_key: Any = None) -> Any:
        self._refuse("safe_get_local_fp32_param / safe_get_local_optimizer_state")

    def get_fp32_grad_for_param(self, param: Any) -> Any:
        self._refuse("safe_get_full_grad")

    def get_local_fp32_grad_for_param(self, param: Any) -> Any:
        self._refuse("safe_get_local_grad")

    def get_fp32_grad_partitions(self) -> NoReturn:
        self._refuse("get_fp32_grad_partitions")

    def get_hp_param_device(self, param: Any, optim_state_key: Any = None) -> NoReturn:
        self._refuse("get_hp_param_device")

    def offload_states(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("offload_states")

    def reload_states(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("reload_states")

    def refresh_fp32_params(self) -> NoReturn:
        self._refuse("refresh_fp32_params")

    def state_dict(self) -> NoReturn:
        self._refuse("the optimizer's state_dict")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("the optimizer's load_state_dict")


class SparseOptimizer(CompactOptimizer):
    """Sparse training: `core` is a `SparseTraining`. Getters return what the optimizer really works with."""

    core: SparseTraining

    @contextmanager
    def lota_rewriting(self) -> Iterator[None]:
        """The partitions may be written in the block; what is kept gathered is gathered again after it. Collective."""
        self._partition_all_parameters()
        with torch.no_grad():
            yield
        if self.persistent_parameters:
            self.persistent_parameters[0].partition(self.persistent_parameters)
            self.persistent_parameters[0].all_gather(self.persistent_parameters)

    def lota_step(self) -> tuple[Tensor, Tensor]:
        if self._lota_run.is_exchanged:
            raise ValueError("a step inside run.base() or run.applied() would train other weights: leave it first")
        return self.core.step(self.optimizer.param_groups, self.clip_grad, self.loss_scale)

    def get_local_fp32_param(self, param: Any, optim_state_key: str | None = None) -> Tensor | None:
        """This rank's fp32 piece: masters at active entries and the weights elsewhere; moments with zeros elsewhere."""
        if not param.requires_grad:
            return None
        state, slot = self.core.slot(self.param_names[param])
        if optim_state_key is None:
            return state.dense_piece(slot, state.master, fill=state.slot_weights(slot).clone())
        moments = self.core.update.moments(state)
        if optim_state_key not in moments:
            raise ValueError(f"no optimizer state {optim_state_key!r}; there is {', '.join(moments) or 'none'}")
        return state.dense_piece(slot, moments[optim_state_key])

    def get_full_hp_param(self, param: Any, optim_state_key: str | None = None) -> Tensor | None:
        piece = self.get_local_fp32_param(param, optim_state_key)
        return None if piece is None else self._fp32_state_allgather(param, piece)

    def get_local_fp32_grad_for_param(self, param: Any) -> Tensor | None:
        """The accumulated gradient of the active entries, zeros elsewhere."""
        if not param.requires_grad:
            return None
        state, slot = self.core.slot(self.param_names[param])
        return state.dense_piece(slot, state.gradient)

    def get_fp32_grad_for_param(self, param: Any) -> Tensor | None:
        piece = self.get_local_fp32_grad_for_param(param)
        return None if piece is None else self._fp32_state_allgather(param, piece)

    def get_hp_param_device(self, param: Any, optim_state_key: str | None = None) -> torch.device | None:  # type: ignore[override]
        return self.core.slot(self.param_names[param])[0].master.device if param.requires_grad else None
