"""The backend `lota` of vLLM's weight transfer, in every worker. Nothing but vLLM imports this file.

vLLM's own control plane drives it, over HTTP or offline: `start_weight_update`, then `update_weights` twice,

    {"step": "prepare", "tickets": ["/runs/math/ticket"], "rule": "refuse"}     reads and verifies; writes nothing
    {"step": "switch"}                                                          writes

then `finish_weight_update`. A refusal of any rank comes before the first write on any rank. `lota.serve.control` does
these calls, and has the server paused in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from lota.delivery.model_folder import locate
from lota.serve.served import ServedModel


@dataclass
class TicketInit(WeightTransferInitInfo):
    """keep: how many tickets a worker keeps in memory."""

    keep: int = 8


@dataclass
class TicketUpdate(WeightTransferUpdateInfo):
    """One of the two steps. tickets, rule: of `prepare`, see `ServedModel`."""

    step: str = "prepare"
    tickets: list[str] = field(default_factory=list)
    rule: str = "refuse"


class TicketEngine(WeightTransferEngine[TicketInit, TicketUpdate]):
    """Tickets on one worker's model."""

    init_info_cls = TicketInit
    update_info_cls = TicketUpdate
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        folder = locate(self.model_config.model, self.model_config.revision)
        load, say = self.model.load_weights, init_logger(f"vllm.{__name__}").info
        is_whole = self.parallel_config.world_size == 1
        self._served = ServedModel(folder, load, self._reload, self._is_plain, is_whole=is_whole, say=say)

    def init_transfer_engine(self, init_info: TicketInit) -> None:
        self._served.keep = init_info.keep

    def start_weight_update(self) -> None:
        self._served.discard()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """One step. The base class waits for an accelerator, which CPUs do not have."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: TicketUpdate) -> None:
        if update_info.step == "prepare":
            self._served.prepare(update_info.tickets, update_info.rule)
        elif update_info.step == "switch":
            self._served.switch()
        else:
            raise ValueError(f"step must be prepare or switch, got {update_info.step!r}")

    def finish_weight_update(self) -> None:
        self._served.discard()

    def shutdown(self) -> None:
        self._served.discard()

    def _reload(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load all tensors, and have every layer pack, quantize or derive again what it did after the first loading."""
        initialize_layerwise_reload(self.model)
        self.model.load_weights(weights)
        finalize_layerwise_reload(self.model, self.model_config)
        # A head that is tied to the embeddings is no weight of the files, so vLLM leaves its packed copy as it was.
        for modules in _tied(self.model):
            for module in modules:
                if _is_unquantized(module):
                    method: Any = module.quant_method
                    method.process_weights_after_loading(module)

    def _is_plain(self, target: Tensor) -> bool:
        """Whether vLLM computes with this memory itself."""
        memory = target.untyped_storage().data_ptr()
        for module in _owners(self.model, memory):
            if hasattr(module, "quant_method") and not _is_unquantized(module):
                return False
            # On CPUs a layer computes with a function, which may hold a packed copy of the weight.
            if getattr(getattr(module, "cpu_linear", None), "__closure__", None):
                return False
        # Attention of this kind multiplies two of its weights once, after loading.
        return not any(isinstance(module, MLAAttention) for module in self.model.modules())


def _is_unquantized(module: nn.Module) -> bool:
    return type(getattr(module, "quant_method", None)).__name__.startswith("Unquantized")


def _owners(model: nn.Module, memory: int) -> Iterator[nn.Module]:
    """The modules with a parameter in the memory at this address."""
    for module in model.modules():
        own = module.parameters(recurse=False)
        if any(parameter.untyped_storage().data_ptr() == memory for parameter in own):
            yield module


def _tied(model: nn.Module) -> list[list[nn.Module]]:
    """The modules of every parameter that several have."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    return [modules for modules in owners.values() if len(modules) > 1]
