"""Operations between dense weights and the compact space of their active entries."""

from lota.kernels.index import TILE, TileIndex
from lota.kernels.ops import (
    adamw_,
    adamw_scalars,
    exchange_,
    gather,
    gather_add_,
    mask_op,
    padded_zeros,
    popcount,
    rmsprop_,
    rmsprop_scalars,
    scatter_,
    scatter_add_,
)

__all__ = [
    "TILE",
    "TileIndex",
    "adamw_",
    "adamw_scalars",
    "exchange_",
    "gather",
    "gather_add_",
    "mask_op",
    "padded_zeros",
    "popcount",
    "rmsprop_",
    "rmsprop_scalars",
    "scatter_",
    "scatter_add_",
]
