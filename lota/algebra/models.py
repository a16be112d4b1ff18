"""The tensors of a model on disk, one at a time, under the names that the loaded model has for them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lota.architecture import tied_names
from lota.checkpoint_keys import Origin
from lota.delivery.rewrite import Checkpoint
from lota.ticket import BaseTensor, fingerprint, to_hex
from lota.ticket.manifest import WHOLE_DTYPES

_NAMES = {getattr(torch, name): name for name in WHOLE_DTYPES}


class ModelTensors:
    """A checkpoint folder of safetensors, or a loaded model: names and tensors of parameters and persistent buffers.

    Of tied tensors one name counts. A folder's files are read when a tensor is asked for; tensors that the model makes
    of several (fused experts) are made then.
    """

    def __init__(
        self,
        source: str | Path | torch.nn.Module,
        names: Collection[str] = (),
        facts: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """names, facts: tensors that the model is to have, and the class that was trained, for a folder whose
        configuration fits several (the text part of a multimodal base)."""
        self._made: tuple[Origin, dict[str, Tensor]] | None = None
        self._loaded: dict[str, Tensor] | None = None
        if isinstance(source, torch.nn.Module):
            self.where, self.kind = type(source).__name__, type(source).__name__
            self._loaded = _state(source)
            self.names = list(self._loaded)
            return
        self.where = str(source)
        self._checkpoint = Checkpoint.open(Path(source), names, facts, trust_remote_code)
        self.kind = "" if self._checkpoint.model is None else type(self._checkpoint.model).__name__
        self.names = _names_of(self._checkpoint)

    def read(self, name: str) -> Tensor:
        """The tensor as it is stored; not to be changed."""
        if self._loaded is not None:
            return self._loaded[name]
        keys = self._checkpoint.keys
        if keys is None:
            return self._checkpoint.read(Origin((name,), (name,)))[name]
        known = next(alias for alias in (name, *self._checkpoint.tied.get(name, ())) if alias in keys.of_name)
        origin = keys.of_name[known]
        if self._made is None or self._made[0] is not origin:
            self._made = None
            self._made = origin, keys.to_model(origin, self._checkpoint.read(origin))
        return self._made[1][known]

    def __contains__(self, name: str) -> bool:
        return name in self._set

    @property
    def _set(self) -> set[str]:
        return set(self.names)


def identity(tensor: Tensor) -> BaseTensor | None:
    """dtype and fingerprint as tickets know them; None for dtypes that they do not."""
    if tensor.dtype not in _NAMES:
        return None
    return BaseTensor(_NAMES[tensor.dtype], to_hex(fingerprint(tensor.contiguous().view(-1))))


def _state(model: torch.nn.Module) -> dict[str, Tensor]:
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    stored = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in stored}
    return {**parameters, **buffers}


def _names_of(checkpoint: Checkpoint) -> list[str]:
    """In the model's order; a tied tensor under the name that `named_parameters` gives it, further ones only where the
    files hold other values for them, so that transformers keeps them apart."""
    if checkpoint.keys is None or checkpoint.model is None:
        homes = checkpoint.homes
        pairs = [(name, alias) for name, group in checkpoint.tied.items() for alias in group if alias != name]
        copies = {b for a, b in pairs if a in homes and b in homes and checkpoint.is_copy(a, b)}
        return sorted(homes.keys() - copies)
    made = checkpoint.keys.of_name
    tied = tied_names(checkpoint.model)
    names = []
    for name in dict.fromkeys([*dict(checkpoint.model.named_parameters()), *made]):
        group = tied.get(name, [name])
        if not any(alias in made for alias in group):
            continue
        first = group[0]
        if name == first or (name in made and first in made and not checkpoint.is_copy(first, name)):
            names.append(name)
    return names
