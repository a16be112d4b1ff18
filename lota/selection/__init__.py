"""Selection: which entries a ticket trains. Budgets, eligible tensors, protection, and an exact top-k over ranks."""

from lota.selection.candidates import Candidates, candidates, check_unprotected, dense_tensors
from lota.selection.eligible import eligible
from lota.selection.left_out import LeftOut, left_out, left_out_lines
from lota.selection.ranking import cut
from lota.selection.select import Selection, check, select

__all__ = [
    "Candidates",
    "LeftOut",
    "Selection",
    "candidates",
    "check",
    "check_unprotected",
    "cut",
    "dense_tensors",
    "eligible",
    "left_out",
    "left_out_lines",
    "select",
]
