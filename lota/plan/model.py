"""The shapes of a model, from its config alone: nothing is downloaded but the config, nothing is allocated."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lota.architecture import check_is_model, check_is_name, fitting_config, read_config, set_entries, without_zero3

_BLOCK = re.compile(r"^(.*?\.\d+)\.")


@dataclass(frozen=True)
class ModelShapes:
    """Full shape of every parameter by name, tied ones once. hidden: the width, from which DeepSpeed's "auto" values
    follow. item_bytes: 2 for bf16 and fp16 weights, 4 for fp32. tied: elements that a second module uses as well, and
    that are gathered for it once more."""

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    hidden: int
    item_bytes: int = 2
    tied: int = 0

    def numel(self, names: Iterable[str] | None = None) -> int:
        return sum(math.prod(self.shapes[name]) for name in (self.shapes if names is None else names))

    def pieces(self, size: int, names: Iterable[str] | None = None) -> int:
        """Elements a rank holds when every tensor is cut into `size` padded pieces."""
        return sum(-(-math.prod(self.shapes[name]) // size) for name in (self.shapes if names is None else names))

    def largest(self, names: Iterable[str] | None = None) -> int:
        """Elements of the largest tensor."""
        chosen = self.shapes if names is None else names
        return max((math.prod(self.shapes[name]) for name in chosen), default=0)

    def largest_piece(self, size: int, names: Iterable[str] | None = None) -> int:
        """Elements of a rank's piece of it."""
        return -(-self.largest(names) // size)

    def persistent(self, threshold: int) -> int:
        """Elements of the tensors that DeepSpeed keeps gathered."""
        return sum(numel for numel in map(math.prod, self.shapes.values()) if numel < threshold)

    def is_in_block(self, name: str) -> bool:
        """Whether a tensor lies in a repeated block."""
        return bool(_BLOCK.match(name))

    def in_blocks(self) -> int:
        """Elements inside repeated blocks, which activation checkpointing computes twice."""
        return sum(self._blocks().values())

    def largest_gathered(self) -> int:
        """Elements of the largest block, or of a tensor outside of all blocks that is larger."""
        outside = (math.prod(shape) for name, shape in self.shapes.items() if not _BLOCK.match(name))
        return max(*self._blocks().values(), 0, *outside, 0)

    def largest_gradient(self, names: Iterable[str]) -> int:
        """Elements of dense gradients that are alive at once: one tensor's, or all stacked experts' of one block."""
        experts: dict[str, int] = {}
        largest = 0
        for name in names:
            shape = self.shapes[name]
            numel = math.prod(shape)
            largest = max(largest, numel)
            block = _BLOCK.match(name)
            if len(shape) >= 3 and block:
                experts[block[1]] = experts.get(block[1], 0) + numel
        return max([largest, *experts.values()])

    def _blocks(self) -> dict[str, int]:
        blocks: dict[str, int] = {}
        for name, shape in self.shapes.items():
            match = _BLOCK.match(name)
            if match:
                blocks[match[1]] = blocks.get(match[1], 0) + math.prod(shape)
        return blocks


def read_model(
    model: str,
    *,
    revision: str = "main",
    dtype: str | None = None,
    architecture: str | None = None,
    entries: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> ModelShapes:
    """Shapes of a model: a folder with a config.json, that file itself, or a name on the hub.

    dtype: "bfloat16", "float16" or "float32" (None: bfloat16). architecture: the transformers class to plan, such as
    `LlamaForSequenceClassification` (None: a causal language model). entries: of config.json with other values, such as
    `vocab_size` where rows were added. ValueError where there is no such config or class.
    """
    path = Path(model)
    where = str(path.parent) if path.name == "config.json" and path.is_file() else model
    check_is_name(where)
    if Path(where).is_dir():
        check_is_model(Path(where))
    config = read_config(where, revision=revision, trust_remote_code=trust_remote_code)
    set_entries(config, entries or {})
    return shapes_of_config(config, str(model), dtype=dtype, architecture=architecture)


def shapes_of_config(
    config: Any, name: str, *, dtype: str | None = None, architecture: str | None = None
) -> ModelShapes:
    """The same from a transformers config object. The model is built without memory (torch's meta device)."""
    import torch

    items = {None: 2, "bfloat16": 2, "float16": 2, "float32": 4}
    if dtype not in items:
        raise ValueError(f"dtype must be bfloat16, float16 or float32, got {dtype!r}")
    made = _class(config, name, architecture)
    try:
        with torch.device("meta"), without_zero3():
            model = made(fitting_config(config, made))
    except Exception as error:  # noqa: BLE001 (whatever transformers makes of odd values)
        raise ValueError(f"{name}: transformers makes no {made.__name__} of its config.json: {error}") from None
    shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    uses = sum(parameter.numel() for _, parameter in model.named_parameters(remove_duplicate=False))
    tied = uses - sum(parameter.numel() for parameter in model.parameters())
    text = config.get_text_config()
    hidden = getattr(text, "hidden_size", None) or max(max(shape) for shape in shapes.values())
    return ModelShapes(name, shapes, int(hidden), items[dtype], tied)


def _class(config: Any, name: str, architecture: str | None) -> Any:
    import transformers

    if architecture is None:
        if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(
                f"{name}: expected the config of a causal language model, got {type(config).__name__}; another kind of "
                "model is planned with its class as architecture, such as BertForSequenceClassification"
            )
        return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    made: Any = getattr(transformers, architecture, None)
    if not isinstance(made, type) or not issubclass(made, transformers.PreTrainedModel):
        raise ValueError(
            f"architecture must be a model class of transformers, such as LlamaForSequenceClassification, got "
            f"{architecture!r}"
        )
    expected = getattr(made, "config_class", None)
    if expected is not None and not isinstance(config, expected):
        raise ValueError(
            f"architecture: {architecture} needs a {expected.__name__}, and {name} has a {type(config).__name__}"
        )
    return made
