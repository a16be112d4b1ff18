"""Tickets and checkpoints among themselves: differences, proofs, and new tickets made of others, tensor by tensor."""

from lota.algebra import masks
from lota.algebra.change import pack, scale, trim, unpack
from lota.algebra.diff import TensorDiff, diff
from lota.algebra.extract import Extracted, extract
from lota.algebra.merge import Merge, merge
from lota.algebra.models import ModelTensors
from lota.algebra.overlap import Overlap, overlap
from lota.algebra.verify import Verdict, verify

__all__ = [
    "Extracted",
    "Merge",
    "ModelTensors",
    "Overlap",
    "TensorDiff",
    "Verdict",
    "diff",
    "extract",
    "masks",
    "merge",
    "overlap",
    "pack",
    "scale",
    "trim",
    "unpack",
    "verify",
]
