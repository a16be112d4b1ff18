"""What a run will hold and send, from a model's shapes alone: integers, before anything is loaded."""

from lota.plan.advice import advise
from lota.plan.counts import LoraSettings, MaskCounts, Spread
from lota.plan.layout import RankLayout, Transfer
from lota.plan.methods import MethodPlan, calibration, full, lora, lota
from lota.plan.model import ModelShapes, read_model, shapes_of_config
from lota.plan.moments import Moment
from lota.plan.reduction import choose_reduction
from lota.plan.text import format_bytes, parse_bytes, short_lines, table

__all__ = [
    "LoraSettings",
    "MaskCounts",
    "MethodPlan",
    "ModelShapes",
    "Moment",
    "RankLayout",
    "Spread",
    "Transfer",
    "advise",
    "calibration",
    "choose_reduction",
    "format_bytes",
    "full",
    "lora",
    "lota",
    "parse_bytes",
    "read_model",
    "shapes_of_config",
    "short_lines",
    "table",
]
