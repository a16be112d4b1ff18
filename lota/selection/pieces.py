"""Reading score pieces: the caller's (name, offset, scores) checked, placed in the model, and grouped by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from lota.selection.protection import Protection
from lota.selection.topk import ScorePiece
from lota.selection.workers import Workers

Pieces = Callable[[], Iterable[tuple[str, int, Tensor]]]


class PieceReader:
    """This rank's pieces in the order of `shapes`; misuse ends the walk and is kept in `problem` for all ranks to hear.

    Raising where the misuse is seen would leave the other ranks waiting in the next collective.
    """

    def __init__(
        self, pieces: Pieces, shapes: Mapping[str, Sequence[int]], protection: Protection, workers: Workers
    ) -> None:
        self._pieces = pieces
        self._workers = workers
        self._protection = protection
        self.names = list(shapes)
        self.position = {name: position for position, name in enumerate(self.names)}
        self.numel = {name: math.prod(shape) for name, shape in shapes.items()}
        self._model_start: dict[str, int] = {}
        self.eligible = 0
        for name in self.names:
            self._model_start[name] = self.eligible
            self.eligible += self.numel[name]
        self.problem: str | None = None

    def walk(self) -> Iterator[ScorePiece]:
        """The pieces that are not empty. Calls pieces() once."""
        self.problem = None
        here, end = -1, 0  # the tensor reached, and the flat position in it
        try:
            for name, start, scores in self._workers.pull(self._pieces):
                start = int(start)
                self._check(name, start, scores)
                if (self.position[name], start) < (here, end):
                    raise ValueError(
                        f"pieces() gave {name} at {start} after a later piece; expected the tensors, in the order of "
                        f"`shapes`, and the pieces of a tensor by ascending offset without overlap."
                    )
                stop = start + scores.numel()
                here, end = self.position[name], stop
                if stop > start:
                    free = self._protection.free(name, start, stop, scores.device)
                    yield ScorePiece(name, start, self._model_start[name] + start, scores.detach(), free)
        except ValueError as error:
            self.problem = str(error) or repr(error)

    def walk_by_tensor(self) -> Iterator[tuple[str, list[ScorePiece]]]:
        """(name, this rank's pieces of it) for every tensor of `shapes`, also those of which this rank has nothing."""
        walk = self.walk()
        ahead = next(walk, None)
        for name in self.names:
            mine = []
            while ahead is not None and ahead.name == name:
                mine.append(ahead)
                ahead = next(walk, None)
            yield name, mine

    def _check(self, name: str, start: int, scores: Tensor) -> None:
        if name not in self.position:
            raise ValueError(f"pieces() gave scores for {name}, expected one of the {len(self.names)} in `shapes`.")
        if scores.dim() != 1 or not scores.is_floating_point():
            raise ValueError(
                f"scores of {name} must be a flat floating-point tensor, got {scores.dtype} {tuple(scores.shape)}."
            )
        if start < 0 or start + scores.numel() > self.numel[name]:
            raise ValueError(
                f"scores of {name} must lie in [0, {self.numel[name]}), got [{start}, {start + scores.numel()}). "
                f"Cut off the padding of the last partition."
            )
