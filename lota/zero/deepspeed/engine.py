"""DeepSpeed's engine, subclassed, and put in its place for the length of a block.

With `optimizer.py`, `weights.py` and `dense_state.py` the only file with DeepSpeed's private names, but for one switch
in `world.py` and one class in `reentrant.py`.

`deepspeed.initialize` looks `DeepSpeedEngine` up in its module when it is called, and the engine imports the ZeRO-3
class when it builds its optimizer: for the length of a block both are replaced by subclasses. They forward complete
gradients, the ends of backwards and steps to `SparseTraining` or to scores; everything else is DeepSpeed's.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import deepspeed
import deepspeed.comm
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import parameter_offload, stage3
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import log_dist
from packaging.version import Version

from lota.zero.deepspeed import saving
from lota.zero.deepspeed.optimizer import DenseOptimizer
from lota.zero.deepspeed.supported import check_config, check_optimizer_class
from lota.zero.deepspeed.weights import has_mixed_dtypes, regroup, shard_over_world

TESTED = "0.19"
FIRST_TESTED = Version("0.19.8")

_ENGINES: weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref[LotaEngine]] = weakref.WeakKeyDictionary()
"""The engine that a lota block built on a model, whose hooks the model carries until the engine is destroyed."""


class Run(Protocol):
    """What an engine asks of the run whose block it is built in."""

    is_sparse: bool
    is_closed: bool
    engine: Any

    def claim(self) -> None: ...
    def prepare(self, model: torch.nn.Module, engine_config: Any) -> None: ...
    def weight_group(self) -> Any: ...
    def before_step(self) -> None: ...
    def after_step(self, was_skipped: bool, scale_may_fall: bool) -> None: ...
    def build(self, optimizer: Any, engine: Any) -> Any: ...
    def built(self, engine: Any) -> None: ...
    def save_checkpoint(self, save_dir: Path, tag: Any, client_state: Mapping[str, Any], save_latest: bool) -> None: ...
    def load_checkpoint(self, load_dir: Path, tag: Any, load_lr_scheduler_states: bool) -> Any: ...


def check_version() -> None:
    """ValueError for a DeepSpeed other than the series whose private names this file was tested with."""
    version = Version(deepspeed.__version__)
    if f"{version.major}.{version.minor}" != TESTED or version < FIRST_TESTED:
        raise ValueError(
            f"DeepSpeed {TESTED}.x from {FIRST_TESTED} on is required, found {version}: this version of lota "
            "replaces parts of "
            f"ZeRO-3 and was tested with that series only. Install it with: pip install 'deepspeed~={FIRST_TESTED}'"
        )


@contextmanager
def substituted(run: Run, optimizer_class: type[DeepSpeedZeroOptimizer_Stage3] | None) -> Iterator[None]:
    """Make `deepspeed.initialize` build our engine inside the block.

    optimizer_class: the ZeRO-3 class of that engine; None keeps DeepSpeed's own (dense calibration).
    """
    check_version()
    if deepspeed.DeepSpeedEngine is not DeepSpeedEngine:
        raise ValueError("another lota block is open: calibrate and train one after the other, not inside each other")
    engine_class = type("LotaEngine", (LotaEngine,), {"run": run, "optimizer_class": optimizer_class})
    replaced = {
        "DeepSpeedEngine": engine_class,
        "DeepSpeedHybridEngine": _refused("the hybrid engine (hybrid_engine.enabled)"),
        "PipelineEngine": _refused("pipeline parallelism (PipelineModule)"),
        "DualPipeVEngine": _refused("pipeline parallelism (PipelineModule)"),
    }
    saved = {name: getattr(deepspeed, name) for name in replaced}
    try:
        for name, value in replaced.items():
            setattr(deepspeed, name, value)
        yield
    finally:
        for name, value in saved.items():
            setattr(deepspeed, name, value)


def _refused(what: str) -> type:
    class Refused:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise ValueError(
                f"{what} is not supported inside a lota block: weights must be sharded by plain ZeRO-3. Use "
                "deepspeed.initialize "
                "on a plain model."
            )

    return Refused


class LotaEngine(DeepSpeedEngine):
    """DeepSpeed's engine, with our ZeRO-3 optimizer where it trains. An engine without an optimizer is DeepSpeed's
    own."""

    run: Run
    optimizer_class: type[DeepSpeedZeroOptimizer_Stage3] | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config, optimizer = kwargs["config_class"], kwargs.get("optimizer")
        self.is_lota = optimizer is not None or bool(config.optimizer_name)
        if self.is_lota:
            check_config(
                config,
                is_sparse=self.run.is_sparse,
                is_compact=self.optimizer_class is not None,
                mpu=kwargs.get("mpu"),
            )
            check_optimizer_class(optimizer)
            _check_unused(kwargs["model"])
            gc.collect()  # what an earlier block left behind, if its model was in use until now
            self.run.claim()
            self._to_prepare = kwargs["model"], config
        super().__init__(*args, **kwargs)
        self._is_destroyed = self._has_refused_weights = False
        if self.is_lota and super().zero_gather_16bit_weights_on_model_save():
            log_dist(
                "lota: inside a lota block stage3_gather_16bit_weights_on_model_save is off for checkpoints, which "
                "hold no dense weights; save_model() writes the trained model",
                ranks=[0],
                level=logging.WARNING,
            )
        if self.is_lota:
            self.run.built(self)
            _ENGINES[self.module] = weakref.ref(self)

    def _set_distributed_vars(self, args: Any) -> None:
        """DeepSpeed gives the rank its device here; what ranks must agree on travels on that device, and not before."""
        super()._set_distributed_vars(args)
        if self.is_lota:
            self.run.prepare(*self._to_prepare)
            del self._to_prepare

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        has_ended = self.is_lota and (self.run.is_closed or self.run.engine is not self)
        if has_ended and self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "the lota block of this engine has ended, or its state was released: train inside the block, before "
                "mask() or release(); to evaluate, call engine.eval() or use torch.no_grad()"
            )
        return super().forward(*inputs, **kwargs)

    def step(self, lr_kwargs: Any = None) -> None:
        """DeepSpeed's step; FloatingPointError on every rank after too many in a row that were skipped."""
        if not self.is_lota:
            super().step(lr_kwargs)
            return
        scale_may_fall = _scale_may_fall(self.optimizer)
        if self.is_gradient_accumulation_boundary() or not self.managed_gradient_accumulation():
            self.run.before_step()
        before = self.global_steps
        super().step(lr_kwargs)
        if self.global_steps > before:
            self.run.after_step(not self.was_step_applied(), scale_may_fall)

    def destroy(self) -> None:
        self._is_destroyed = True
        super().destroy()
        drop_engine(self)

    def _configure_zero_optimizer(self, optimizer: Any) -> Any:
        if not self.is_lota:
            return super()._configure_zero_optimizer(optimizer)
        if self.has_moe_layers:
            raise ValueError(
                "deepspeed.moe layers are not supported: their experts are sharded over groups of their own. "
                "Use a model whose experts are ordinary tensors (transformers' Mixtral, Qwen3-MoE, ...)."
            )
        group = self.run.weight_group()
        if group is not None:
            shard_over_world(self.module, self)
            regroup(self.module, group)
        is_mixed = has_mixed_dtypes(self.module)
        if is_mixed and self.zero_offload_param() is not None:
            raise ValueError(
                "offload_param is not supported where the trained weights have several dtypes, because DeepSpeed keeps "
                "offloaded weights in one: delete offload_param, or load the model in one dtype"
            )
        # superoffload derives a class from ZeRO-3's when it is first imported: that must have happened before the swap.
        import deepspeed.runtime.superoffload.superoffload_stage3  # noqa: F401

        ours, links = self.optimizer_class, {"lota_run": self.run, "lota_engine": self}

        def construct(*args: Any, **kwargs: Any) -> DeepSpeedZeroOptimizer_Stage3:
            return DenseOptimizer(*args, **kwargs) if ours is None else ours(*args, **links, **kwargs)

        stage3.DeepSpeedZeroOptimizer_Stage3 = construct
        try:
            return super()._configure_zero_optimizer(optimizer)
        finally:
            stage3.DeepSpeedZeroOptimizer_Stage3 = DeepSpeedZeroOptimizer_Stage3

    def get_optimizer_configuration(
        self, optimizer_parameters: dict[str, Any], adam_w_mode: bool, allow_legacy_fallback: bool = False
    ) -> Any:
        """The Adam of an `optimizer` section: torch's where it never steps itself, and on CPUs, where DeepSpeed's
        would first be compiled. An offloaded optimizer stays DeepSpeed's."""
        never_steps = self.optimizer_class is not None or get_accelerator().device_name() == "cpu"
        if self.is_lota and never_steps and not self.zero_use_cpu_optimizer():
            optimizer_parameters["torch_adam"] = True
        return super().get_optimizer_configuration(optimizer_parameters, adam_w_mode, allow_legacy_fallback)

    def coalesce_grad_reduction(self) -> Any:
        if not self.is_lota or self.optimizer_class is None:
            return super().coalesce_grad_reduction()
        raise NotImplementedError(
            "coalesce_grad_reduction keeps every dense gradient until its end; pass reduce_every='step' to "
            "lota.sparse_zero3 to reduce once per step on compact gradients"
        )

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        """As the configuration says, but never for a Trainer's checkpoint: that is the ticket's state, not the model.
        A script that asks for weights and gets none gets a warning."""
        is_asked = bool(super().zero_gather_16bit_weights_on_model_save())
        if not self.is_lota:
            return is_asked
        if saving.is_in_trainers_checkpoint():
            return False
        if not is_asked:
            saving.say_no_weights("save_model()")
        self._has_refused_weights = not is_asked
        return is_asked

    def save_16bit_model(
        self, save_dir: str, save_filename: str = "pytorch_model.bin", exclude_frozen_parameters: bool = False
    ) -> bool:
        """DeepSpeed's: the trained model where `stage3_gather_16bit_weights_on_model_save` is true, else a note."""
        has_saved = super().save_16bit_model(save_dir, save_filename, exclude_frozen_parameters)
        if self.is_lota and not has_saved:
            self._leave_note(Path(save_dir))
        return bool(has_saved)

    def _leave_note(self, folder: Path) -> None:
        """In a folder that was to hold the weights which were refused a moment ago."""
        if self._has_refused_weights and dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            saving.write_note(folder)
        self._has_refused_weights = False

    def save_checkpoint(
        self,
        save_dir: str,
        tag: Any = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write `save_dir/global_stepN` (or `tag`): state in safetensors and JSON, see `lota.zero.checkpoint.vectors`.

        Frozen parameters are never in it. Collective over the world.
        """
        if not self.is_lota:
            return super().save_checkpoint(save_dir, tag, client_state or {}, save_latest, exclude_frozen_parameters)
        self.optimizer.checkpoint_event_prologue()
        self.run.save_checkpoint(Path(save_dir), tag, client_state or {}, save_latest)
        self._leave_note(Path(save_dir))
        self.optimizer.checkpoint_event_epilogue()
        return True

    def load_checkpoint(
        self,
        load_dir: str,
        tag: Any = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> Any:
        """Restore what `save_checkpoint` of the same block on the same base wrote. Collective over the world."""
        if not self.is_lota:
            return super().load_checkpoint(
                *(load_dir, tag, load_module_strict, load_optimizer_states, load_lr_scheduler_states),
                *(load_module_only, custom_load_fn),
            )
        if load_module_only or not load_optimizer_states or custom_load_fn is not None:
            raise ValueError(
                "a checkpoint of a lota block holds the optimizer's state and nothing else: load it whole, without "
                "load_module_only, load_optimizer_states=False and custom_load_fn"
            )
        self.optimizer.checkpoint_event_prologue()
        loaded = self.run.load_checkpoint(Path(load_dir), tag, load_lr_scheduler_states)
        self.optimizer.checkpoint_event_epilogue()
        return loaded


def _scale_may_fall(optimizer: Any) -> bool:
    """Whether a skipped step is followed by one with a lower loss scale. At the lowest DeepSpeed itself would raise,
    without a name: that is left to the run."""
    scaler: Any = getattr(optimizer, "loss_scaler", None)
    if not getattr(scaler, "dynamic", False):
        return False
    scaler.raise_error_at_min_scale = False
    return bool(scaler.cur_scale > scaler.min_scale)


def _check_unused(model: torch.nn.Module) -> None:
    """ValueError for a model that carries the hooks of an earlier block's engine."""
    reference = _ENGINES.get(model)
    earlier = reference() if reference is not None else None
    if earlier is not None and not earlier._is_destroyed:
        raise ValueError(
            "this model still belongs to the engine of an earlier lota block: call engine.destroy() on that one first, "
            "or load the model again"
        )


def drop_engine(engine: Any) -> None:
    """Take an engine that trains no more out of what would keep it, its model and its states alive for ever.

    DeepSpeed's stack of modules and a cache per class hold every ZeRO-3 model of a process, and gradient hooks tie a
    cycle through autograd that Python cannot see: the dense states of a calibration would stay beside the sparse run.
    """
    stack, own = parameter_offload.FWD_MODULE_STACK, set(engine.module.modules())
    stack[:] = [module for module in stack if module not in own]
    cached = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    for cell in cached.__closure__ or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()
    for hook in getattr(engine.optimizer, "_grad_acc_hooks", ()):
        hook.remove()
