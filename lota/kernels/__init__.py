"""Operations between dense weights and the compact space of their active entries."""

from lota.kernels.backend import backend_name, using
from lota.kernels.index import CHUNK, TILE, TileIndex, TileSpans
from lota.kernels.ops import (
    adamw_,
    adamw_scalars,
    exchange_,
    gather,
    gather_add_,
    mask_op,
    padded_zeros,
    popcount,
    pull_,
    pull_rate,
    rmsprop_,
    rmsprop_scalars,
    scatter_,
    scatter_add_,
    squared_norm,
)
from lota.kernels.pull import Pull
from lota.kernels.rounding import fmix64, rounding_key

__all__ = [
    "CHUNK",
    "TILE",
    "Pull",
    "TileIndex",
    "TileSpans",
    "adamw_",
    "adamw_scalars",
    "backend_name",
    "exchange_",
    "fmix64",
    "gather",
    "gather_add_",
    "mask_op",
    "padded_zeros",
    "popcount",
    "pull_",
    "pull_rate",
    "rmsprop_",
    "rmsprop_scalars",
    "rounding_key",
    "scatter_",
    "scatter_add_",
    "squared_norm",
    "using",
]
