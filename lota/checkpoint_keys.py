"""Which keys of a checkpoint make which tensors of a model, as transformers finds them, and the way in both directions.

Most tensors have one key, often under another name. Some are made of several: transformers stacks the experts of a
mixture, for one. `to_model` makes such a tensor from its keys, `to_checkpoint` the keys from the tensor, one at a time.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lota.architecture import tied_names


@dataclass(frozen=True)
class Origin:
    """Tensors of a model, and the keys that they are made from. converter: what makes them of the keys, each of which
    goes where its pattern says; None: the one tensor is the one key's, as it is."""

    names: tuple[str, ...]
    keys: tuple[str, ...]
    patterns: tuple[str, ...] = ()
    converter: Any = None


class CheckpointKeys:
    """The origins of a model's tensors among the keys of a checkpoint.

    model: a transformers model, on any device. Keys that no tensor is made from are in no origin.
    """

    def __init__(self, model: Any, keys: Iterable[str]) -> None:
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        self._model = model
        transforms = _transforms(model)
        renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        converter_of = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        prefix = getattr(model, "base_model_prefix", None)
        state = model.state_dict(keep_vars=True)
        parts: dict[str, list[tuple[str, str]]] = {}
        plain: dict[str, str] = {}
        for key in sorted(keys, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state:
                unchanged, _ = rename_source_key(key, [], [], prefix, state)
                name, pattern = (unchanged, None) if unchanged in state else (name, pattern)
            if pattern is not None:
                parts.setdefault(name, []).append((key, pattern))
            elif name in state:
                plain.setdefault(name, key)  # transformers takes the first of two keys for one tensor
        self.origins = [Origin((name,), (key,)) for name, key in plain.items()]
        for name, found in parts.items():
            converter = converter_of[found[0][1]]
            names = tuple(name.replace(converter.target_patterns[0], target) for target in converter.target_patterns)
            if any(other in state for other in names):
                sources, patterns = zip(*found, strict=True)
                self.origins.append(Origin(names, sources, patterns, converter))
        self.of_name = {name: origin for origin in self.origins for name in origin.names if name in state}
        self.of_key = {key: origin for origin in self.origins for key in origin.keys}
        self._used = [entry for entry in transforms if entry.was_used()]

    def to_model(self, origin: Origin, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors by name from those of the origin's keys."""
        if origin.converter is None:
            return {origin.names[0]: tensors[origin.keys[0]]}
        converter = deepcopy(origin.converter)
        for key, pattern in zip(origin.keys, origin.patterns, strict=True):
            converter.add_tensor(origin.names[0], key, pattern, tensors[key])
        made = converter.convert(origin.names[0], model=self._model, config=self._model.config)
        return {name: _one(tensor) for name, tensor in made.items()}

    def to_checkpoint(self, origin: Origin, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the origin's keys from the model's. ValueError where transformers gives other keys."""
        from transformers.core_model_loading import revert_weight_conversion

        if origin.converter is None:
            return {origin.keys[0]: tensors[origin.names[0]]}
        self._model._weight_conversions = self._used
        made = {key: _one(tensor) for key, tensor in revert_weight_conversion(self._model, dict(tensors)).items()}
        if made.keys() != set(origin.keys):
            raise ValueError(
                f"transformers cannot write {origin.names[0]} under the names of this checkpoint: expected "
                f"{origin.keys[0]} and {len(origin.keys) - 1} more, got {', '.join(sorted(made)[:3])}"
            )
        return made


def filled_names(model: Any, keys: Iterable[str]) -> dict[str, str | None]:
    """By the name in the model, the checkpoint's key that fills the tensor; None where transformers computes it from
    one or more keys (fused experts, say). Names are found as transformers finds them when it loads."""
    known = CheckpointKeys(model, keys)
    return {name: origin.keys[0] if origin.converter is None else None for name, origin in known.of_name.items()}


def missing_names(model: Any, keys: Collection[str]) -> list[str]:
    """The parameters of a model that no key of a checkpoint fills, and that transformers would make anew; tied ones
    once."""
    filled = filled_names(model, keys)
    if is_quantized(model):
        stems = {name.removesuffix(".weight") for name in model.state_dict(keep_vars=True) if name not in filled}
        filled |= {
            name: None
            for stem in stems
            if any(key.startswith((f"{stem}_", f"{stem}.")) for key in keys)
            for name in (stem, f"{stem}.weight")
        }
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return [
        names[0]
        for names in {tuple(names): names for names in tied_names(model).values()}.values()
        if not any(name in filled or any(re.search(pattern, name) for pattern in ignored) for name in names)
    ]


def is_quantized(model: Any) -> bool:
    """Whether a checkpoint of the model holds weights in parts (codes and scales), under names of their own."""
    return getattr(getattr(model, "config", None), "quantization_config", None) is not None


def _transforms(model: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model)) if hasattr(model, "base_model_prefix") else []


def _one(tensor: Any) -> Tensor:
    made: Tensor = tensor[0] if isinstance(tensor, list) else tensor
    return made
