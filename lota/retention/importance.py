"""How important every weight of a model is to a task: collected once, small enough to travel in the task's ticket."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lota.files import naming_disk_full, sync_path
from lota.messages import did_you_mean
from lota.retention.factors import ExactSums, SquareSums, at, matrices
from lota.selection import candidates
from lota.ticket import Mask
from lota.ticket.hub import local_directory

FILE_NAME = "importance.safetensors"
"""Of the file in a ticket's folder."""
_FORMAT, _VERSION = "lota-importance", 1
_IS_ONE = 1e-5
_ROWS, _COLUMNS, _EXACT = ".rows", ".columns", ".exact"


class Importance:
    """The diagonal of a Fisher matrix, whose mean over all entries is 1: factored, two fp32 vectors a matrix, for every
    tensor; and exact (bf16) at the active entries of a mask where those were asked for. Immutable.

    shapes: of the tensors, by name. rows, columns: fp32 vectors as `lota.retention.factors.SquareSums` lays them out,
    of any scale. exact: compact `[active]` of the same scale, by name, with `mask_digest`. facts: JSON, what it is of.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        rows: Mapping[str, Tensor],
        columns: Mapping[str, Tensor],
        *,
        exact: Mapping[str, Tensor] | None = None,
        mask_digest: str | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        for name, shape in self.shapes.items():
            _check(name, shape, rows[name], columns[name])
        total = math.fsum(float(rows[name].double().sum()) for name in self.shapes)
        mean = total / max(sum(math.prod(shape) for shape in self.shapes.values()), 1)
        if not 0 < mean < math.inf:
            raise ValueError(
                "the importance is 0 everywhere: no gradient arrived. Collect it over rows whose answers are trained"
            )
        if abs(mean - 1) < _IS_ONE:  # it was read from a file: the same bits again
            mean = 1.0
        self._rows, self._columns, self._exact = (
            {name: _scaled(values, mean, dtype) for name, values in kind.items()}
            for kind, dtype in ((rows, torch.float32), (columns, torch.float32), (exact or {}, torch.bfloat16))
        )
        self.mask_digest, self.facts = mask_digest, dict(facts or {})

    @classmethod
    def of_sums(
        cls,
        shapes: Mapping[str, Sequence[int]],
        sums: Mapping[str, SquareSums],
        at_mask: ExactSums | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Importance:
        """From sums over the same micro-batches, at a mask's entries too; their scale does not matter."""
        return cls(
            shapes,
            {name: value.rows for name, value in sums.items()},
            {name: value.columns for name, value in sums.items()},
            exact=None if at_mask is None else at_mask.values,
            mask_digest=None if at_mask is None else at_mask.mask.digest,
            facts=facts,
        )

    @classmethod
    def collect(
        cls,
        model: torch.nn.Module,
        batches: Iterable[Mapping[str, Any]],
        *,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        mask: Mask | None = None,
    ) -> Importance:
        """Of a whole model on one process: every batch is a micro-batch, and `model(**batch).loss` its mean loss.

        include, exclude: patterns of tensors, as of `calibration_zero3`; all matrices of the blocks without them. mask:
        collect the exact values at its active entries as well. The model's weights, gradients and flags are as before
        afterwards. Under ZeRO-3, or with a Trainer, use `lota.importance_zero3`. 64 micro-batches of 4 rows are enough;
        8 are too few.
        """
        parameters = dict(model.named_parameters())
        names = candidates({name: tuple(p.shape) for name, p in parameters.items()}, include, exclude).names
        shapes = {name: tuple(parameters[name].shape) for name in names}
        sums = {name: SquareSums(shapes[name], parameters[name].device) for name in names}
        at_mask = None if mask is None else ExactSums(mask, {name: parameters[name].device for name in names})
        before = {name: (p.requires_grad, p.grad) for name, p in parameters.items()}
        number = 0
        try:
            for name, parameter in parameters.items():
                parameter.requires_grad_(name in sums)
                parameter.grad = None
            for batch in batches:
                model(**batch).loss.backward()
                number += 1
                for name in names:
                    gradient, parameters[name].grad = parameters[name].grad, None
                    if gradient is not None:
                        sums[name].add(gradient)
                        if at_mask is not None:
                            at_mask.add(name, gradient)
        finally:
            for name, (is_trained, gradient) in before.items():
                parameters[name].requires_grad_(is_trained)
                parameters[name].grad = gradient
        return cls.of_sums(shapes, sums, at_mask, facts={"micro_batches": number})

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    @property
    def is_exact(self) -> bool:
        """Whether it is exact at the entries of one mask."""
        return self.mask_digest is not None

    @property
    def digest(self) -> str:
        """sha256 over all of its values, in hex."""
        return _digest(self._tensors())

    @property
    def nbytes(self) -> int:
        kinds = (self._rows, self._columns, self._exact)
        return sum(values.nbytes for kind in kinds for values in kind.values())

    def at(self, name: str, positions: Tensor) -> Tensor:
        """The factored importance at flat positions (int64) of tensor `name`: fp32, as long as `positions`, on the CPU;
        its mean over all entries of all tensors is 1. ValueError for a tensor that it does not know."""
        if name not in self.shapes:
            raise ValueError(f"this importance does not know {name}" + did_you_mean(name, self.shapes))
        return at(self.shapes[name], self._rows[name], self._columns[name], positions.cpu())

    def at_active(self, mask: Mask, name: str) -> Tensor:
        """Of the active entries of a mask's tensor: fp32 `[mask.active(name)]`, on the CPU; the exact values where it
        has those of this mask."""
        if self.is_exact:
            if mask.digest != self.mask_digest:
                raise ValueError(
                    "this importance is exact at the entries of another mask: collect it for this one, or without a "
                    "mask, which gives the factored one"
                )
            return self._exact[name].float()
        chunks = [self.at(name, positions) for positions in mask.chunks(name)]
        return torch.cat(chunks) if chunks else torch.zeros(0, dtype=torch.float32)

    def check_fits(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """ValueError where a tensor of the same name has another shape, or no name is known."""
        shared = self.shapes.keys() & shapes.keys()
        if not shared:
            example = next(iter(self.shapes), "none")
            raise ValueError(
                f"the importance knows none of the tensors that are trained (it knows {example}, ...): it is of "
                "another model"
            )
        for name in shared:
            if self.shapes[name] != tuple(shapes[name]):
                raise ValueError(
                    f"{name}: expected shape {self.shapes[name]}, as in the importance, got {tuple(shapes[name])}: "
                    "it is of another model"
                )

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write the file `path` (or FILE_NAME in the folder `path`), whole or not at all; its bytes."""
        path, tensors = _file(path), self._tensors()
        about = {
            "format": _FORMAT,
            "version": _VERSION,
            "shapes": self.shapes,
            "mask": self.mask_digest,
            "facts": self.facts,
            "sha256": _digest(tensors),
        }
        temporary = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
        try:
            with naming_disk_full(path):
                save_file(tensors, temporary, metadata={"lota": json.dumps(about)})
                temporary.chmod(path.parent.stat().st_mode & 0o666 | 0o200)
                sync_path(temporary)
                os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return path.stat().st_size

    def _tensors(self) -> dict[str, Tensor]:
        """By the keys of the file."""
        kinds = ((_ROWS, self._rows), (_COLUMNS, self._columns), (_EXACT, self._exact))
        return {name + ending: values.contiguous() for ending, kind in kinds for name, values in kind.items()}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Importance:
        """Read what `save` wrote: a file, or a ticket's folder with one. ValueError where there is none, or damage."""
        given, path = path, _file(local_directory(path))
        if not path.is_file():
            if path.parent.is_dir() and path.name == FILE_NAME and Path(given).is_dir():
                raise ValueError(
                    f"{given} holds no {FILE_NAME}: the ticket was made without keep_importance. Train it with "
                    "keep_importance: true, or give rows of its task instead: {data: FILE}"
                )
            raise ValueError(f"{given}: expected an importance file or a ticket's folder with one, found none")
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["lota"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            if about["format"] != _FORMAT or about["version"] != _VERSION:
                raise ValueError(f"format {about['format']!s:.40} version {about['version']!s:.40}: update lota")
            if _digest(tensors) != about["sha256"]:
                raise ValueError("its contents do not have the sha256 that it names")
            shapes = {str(name): tuple(map(int, shape)) for name, shape in about["shapes"].items()}
            kinds = [_of_kind(tensors, ending) for ending in (_ROWS, _COLUMNS, _EXACT)]
            if any(kind.keys() != shapes.keys() for kind in kinds[:2]):
                raise ValueError("its vectors are not those of its tensors")
            digest, facts = about["mask"], dict(about["facts"])
        except (SafetensorError, OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{path}: not a sound importance file ({str(error)[:200]}): copy or collect it again"
            ) from None
        return cls(shapes, kinds[0], kinds[1], exact=kinds[2], mask_digest=digest, facts=facts)

    def __repr__(self) -> str:
        return f"Importance({len(self.shapes)} tensors, {'exact' if self.is_exact else 'factored'})"


def strength(importances: Sequence[Importance], mask: Mask, name: str) -> Tensor:
    """The sum of several tasks' importance at the active entries of a mask's tensor: fp32 `[mask.active(name)]`; a
    tensor that one of them does not know counts as 0 there."""
    total = torch.zeros(mask.active(name), dtype=torch.float32)
    for importance in importances:
        if name in importance.shapes:
            total += importance.at_active(mask, name)
    return total


def load_all(items: Sequence[Any]) -> list[Importance]:
    """Importances, or the paths of their files or of tickets that hold one. ValueError for anything else."""
    return list(_each(items))


def _each(items: Sequence[Any]) -> Iterator[Importance]:
    for item in items:
        if isinstance(item, Importance):
            yield item
        elif isinstance(item, (str, Path)):
            yield Importance.load(item)
        else:
            raise ValueError(
                f"retain takes lota.retention.Importance or paths of tickets that hold one, got {type(item).__name__}"
            )


def _file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path / FILE_NAME if path.is_dir() else path


def _of_kind(tensors: Mapping[str, Tensor], ending: str) -> dict[str, Tensor]:
    return {key.removesuffix(ending): values for key, values in tensors.items() if key.endswith(ending)}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    hasher = hashlib.sha256()
    for key in sorted(tensors):
        hasher.update(f"{key} {tensors[key].dtype}\n".encode())
        hasher.update(tensors[key].contiguous().view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _scaled(values: Tensor, mean: float, dtype: torch.dtype) -> Tensor:
    return (values.detach().cpu().double() / mean).to(dtype)


def _check(name: str, shape: Sequence[int], rows: Tensor, columns: Tensor) -> None:
    number, num_rows, num_columns = matrices(shape)
    for kind, values, length in (("rows", rows, number * num_rows), ("columns", columns, number * num_columns)):
        if values.shape != (length,):
            raise ValueError(
                f"{name}: expected {length} {kind} for shape {tuple(shape)}, got shape {tuple(values.shape)}"
            )
        if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
            raise ValueError(f"{name}: the importance of its {kind} is not finite or below 0: a loss was not finite")
