"""An exported adapter is run: PEFT's logits on the base against those of the ticket."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lota.architecture import without_zero3
from lota.delivery.live import apply_
from lota.ticket import Ticket

_TOKENS = (2, 12)
_MEMORY_FACTOR = 2.5  # the base, its adapter's copies of modules, activations and the allocator's slack


@dataclass(frozen=True)
class Outcome:
    """is_equal: no logit differs, or it could not be run. reason: why it could not, else "". not_called: the adapted
    modules that the base's forward pass never called, so that no adapter on them can matter."""

    is_equal: bool
    reason: str = ""
    not_called: frozenset[str] = frozenset()


@torch.no_grad()
def run_adapter(
    adapter: Path,
    base: Path,
    ticket: Ticket,
    kind: type[Any],
    modules: Collection[str],
    dtype: torch.dtype | None,
    trust_remote_code: bool = False,
) -> Outcome:
    """Load the base twice as `kind`, with the ticket and with the adapter, and compare the logits of a few tokens.

    modules: the linear modules that the adapter changes by differences.
    """
    try:
        from peft import PeftModel
    except ModuleNotFoundError:
        return Outcome(True, "PEFT is not installed")
    if any(tensor.rows is not None for tensor in ticket.mask.base.values()):
        return Outcome(True, "the ticket brings tensors or rows that the base does not have")
    needed = _MEMORY_FACTOR * sum(file.stat().st_size for file in base.glob("*.safetensors"))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        return Outcome(True, f"it needs {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free")

    def load() -> Any:
        with without_zero3():
            made = kind.from_pretrained(base, dtype=dtype or "auto", trust_remote_code=trust_remote_code)
        return made.eval()

    model = load()
    called: set[str] = set()
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name)) for name in modules
    ]
    try:
        inputs = _probe(model)
        _logits(model, inputs)
    except Exception as error:  # noqa: BLE001 (models with inputs of another kind)
        return Outcome(True, f"a {kind.__name__} does not run on tokens alone ({type(error).__name__})")
    finally:
        for hook in hooks:
            hook.remove()
    apply_(model, ticket, verify=False)
    wanted = _logits(model, inputs)
    del model
    adapted = PeftModel.from_pretrained(load(), str(adapter)).eval()
    got = _logits(adapted, inputs)
    is_equal = torch.equal(wanted.nan_to_num(), got.nan_to_num())
    return Outcome(is_equal, "", frozenset(set(modules) - called))


def _probe(model: nn.Module) -> dict[str, Tensor]:
    config: Any = model.config
    size = int(getattr(config.get_text_config(), "vocab_size", 0) or 100)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(5, size - 1), max(6, size * 9 // 10), _TOKENS, generator=generator, dtype=torch.int64)
    ids = ids.clamp(max=size - 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    outputs = model(**inputs)
    found: Tensor = outputs[0] if not hasattr(outputs, "logits") else outputs.logits
    return found.float()
