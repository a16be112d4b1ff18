"""Sparse fine-tuning by lottery tickets (LoTA, arXiv 2406.16797) on DeepSpeed."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lota import algebra as algebra
    from lota import delivery as delivery
    from lota import kernels as kernels
    from lota import optim as optim
    from lota import plan as plan
    from lota import retention as retention
    from lota import selection as selection
    from lota import ticket as ticket
    from lota.algebra import diff, extract, merge
    from lota.blocks import calibration_zero3, importance_zero3, sparse_zero3
    from lota.delivery.live import apply_, exchange_
    from lota.delivery.switcher import TicketSwitcher
    from lota.ticket import Mask, Ticket

_HOMES = {
    "TicketSwitcher": "lota.delivery.switcher",
    "diff": "lota.algebra",
    "extract": "lota.algebra",
    "merge": "lota.algebra",
    "Mask": "lota.ticket",
    "Ticket": "lota.ticket",
    "apply_": "lota.delivery.live",
    "calibration_zero3": "lota.blocks",
    "exchange_": "lota.delivery.live",
    "importance_zero3": "lota.blocks",
    "sparse_zero3": "lota.blocks",
}
_SUBMODULES = ("algebra", "delivery", "kernels", "optim", "plan", "retention", "selection", "ticket")

__all__ = [
    "Mask",
    "Ticket",
    "TicketSwitcher",
    "apply_",
    "calibration_zero3",
    "diff",
    "exchange_",
    "extract",
    "importance_zero3",
    "merge",
    "sparse_zero3",
]


def __getattr__(name: str) -> Any:
    """Import on first use: `import lota` alone loads neither torch nor DeepSpeed."""
    from importlib import import_module

    if name in _SUBMODULES:
        return import_module(f"lota.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'lota' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name not in ("deepspeed", "transformers"):
            raise
        text = f"lota.{name} needs {error.name}, which is not installed: pip install 'lota[train]'"
        raise ModuleNotFoundError(text, name=error.name) from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
