"""What a script's own saves write inside a block: the trained model where that was asked for, else where to find it.

A Trainer asks the engine one and the same question before it writes a checkpoint and in a user's `save_model()`: may
the 16-bit weights be gathered? In checkpoints they would only repeat the base; in `save_model()` they are what was
asked for. DeepSpeed's setting `stage3_gather_16bit_weights_on_model_save` decides for the second alone.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lota.delivery.model_folder import WEIGHT_SUFFIXES
from lota.files import write_text
from lota.zero.deepspeed.weights import whole_numel

NOTE_NAME = "NO_WEIGHTS_HERE.txt"
_CURE = (
    "For the trained model, call run.save_ticket(TICKET) and then: lota apply --base BASE TICKET --out MODEL. Or set "
    "zero_optimization.stage3_gather_16bit_weights_on_model_save to true in the DeepSpeed configuration: then "
    "save_model() gathers the whole trained model on rank 0 and writes it, and checkpoints stay without weights"
)
_NOTE = f"""This folder holds no weights of the model.

It was saved inside a lota block, whose weights are sharded over ranks, and only the state of the run was written
(global_step*: what resuming the same run needs; zero_to_fp32.py makes nothing of it).

{_CURE}.
"""
_LOG = logging.getLogger("lota")


def is_in_trainers_checkpoint() -> bool:
    """Whether a Trainer's `_save_checkpoint` is among the callers. Nothing that reaches an engine says so otherwise."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_save_checkpoint":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def say_no_weights(where: str) -> None:
    """Warn, once on rank 0, that a save is going to be without weights."""
    if dist.get_rank() == 0:
        _LOG.warning("%s writes no weights inside a lota block. %s.", where, _CURE)


def write_note(folder: Path) -> None:
    """On rank 0: leave a note in a folder that was meant to hold the model and has no weights."""
    has_weights = any(path.suffix in WEIGHT_SUFFIXES and "model" in path.name for path in folder.iterdir())
    if dist.get_rank() == 0 and not has_weights:
        write_text(folder / NOTE_NAME, _NOTE)


class WithoutWrongAdvice(logging.Filter):
    """Until `restore`, the Trainer does not tell readers of its log to run zero_to_fp32.py, which makes nothing of the
    state of a block; what a save writes here is said by `say_no_weights`."""

    def __init__(self) -> None:
        super().__init__()
        logging.getLogger("transformers.trainer").addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        return "zero_to_fp32" not in record.getMessage()

    def restore(self) -> None:
        logging.getLogger("transformers.trainer").removeFilter(self)


class GuardedSave:
    """From now until `restore`, `model.save_pretrained(folder)` raises ValueError while the weights are sharded: it
    would write tensors without elements. With a state_dict of whole tensors it works as usual."""

    def __init__(self, model: Any) -> None:
        self._model = model if hasattr(model, "save_pretrained") else None
        if self._model is not None:
            self._model.save_pretrained = self._save

    def _save(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        model = self._model
        assert model is not None
        has_weights = kwargs.get("state_dict") is not None or any(isinstance(arg, Mapping) for arg in args)
        if not has_weights and _is_sharded(model):
            raise ValueError(
                f"save_pretrained({str(save_directory)!r}) inside a lota block would write empty tensors, because the "
                f"weights are sharded over ranks. {_CURE}; trainer.save_model() is that"
            )
        return type(model).save_pretrained(model, save_directory, *args, **kwargs)

    def restore(self) -> None:
        if self._model is not None:
            vars(self._model).pop("save_pretrained", None)
        self._model = None


def _is_sharded(model: Any) -> bool:
    return any(param.numel() < whole_numel(param) for param in model.parameters())
