"""What kind of tensor a name and a shape speak of: a weight matrix of a repeated block, or something else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

BLOCK = "block"
EMBEDDING = "embedding"
NORM = "norm, bias or vector"
ROUTER = "router"
KERNEL = "depthwise convolution or state matrix"
TOWER = "tower"
OUTSIDE = "outside the blocks"
EMPTY = "empty"

IN_BLOCKS = (BLOCK, KERNEL, TOWER)
"""Kinds of what computes inside blocks."""

# What has one of these words in its name takes part wherever it lies: blocks that are no entry of a numbered list.
_BLOCK = re.compile(r"attn|attention|mlp|ffn|feed_?forward|expert|moe|denserelu|^fc\d$")
# Tables of tokens and positions, and the layers that turn pixels or a waveform into the first hidden states.
_EMBEDDING = re.compile(r"embed|(^|_)emb$|^w[tp]e$|^shared$|feature_(extractor|encoder)")
_NORM = re.compile(r"norm|bias|rotary")
_ROUTER = re.compile(r"router|^gate$|expert_gate$")
# Another sense beside a language model, and what joins the two.
_TOWER = re.compile(
    r"vision|visual|audio|image|img_|video|pixel|codec|vq_?model|tokenizer|"
    r"projector|connector|merger|aligner|resampler|perceiver_|q_?former|abstractor"
)


def kinds(named_shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """The kind of every tensor, in the order of `named_shapes`.

    `BLOCK` is a weight matrix of a block: two or more dimensions larger than one, inside an entry of a numbered list of
    blocks (`layers.0.mixer.in_proj.weight`, fused experts included) or in a module named like attention or MLP. A
    numbered layer by itself (`classifier.0.weight`) is no block.
    `TOWER` is the same inside a vision or audio encoder, or in a projector, that stands beside a language model. Where
    nothing else would be trained the tower is the model, and its matrices are `BLOCK`. So is the encoder of a sequence
    to sequence model for speech (`model.encoder`): it has no language model beside it.
    """
    has_language_model = any(".language_model." in f".{name}" for name in named_shapes)
    found = {name: _kind(name.lower().split("."), shape, has_language_model) for name, shape in named_shapes.items()}
    if BLOCK not in found.values():
        found = {name: BLOCK if kind == TOWER else kind for name, kind in found.items()}
    return found


def _kind(parts: list[str], shape: Sequence[int], has_language_model: bool) -> str:
    # A number at the very front is a place in a chain of whole models, not in a list of blocks.
    number = next((place for place, part in enumerate(parts) if place and part.isdigit()), None)
    # The name of a whole model or of a list of blocks says nothing about a tensor in it: `roberta_prelayernorm`.
    inner = parts if number is None else parts[number + 1 :]
    if 0 in shape:
        return EMPTY
    if any(_EMBEDDING.search(part) for part in parts):
        return EMBEDDING
    if any(_NORM.search(part) for part in inner) or sum(size > 1 for size in shape) < 2:
        return NORM
    if any(_ROUTER.search(part) for part in inner):
        return ROUTER
    if (len(shape) > 2 and shape[1] == 1) or "a_log" in parts:
        return KERNEL
    is_in_list = number is not None and inner != ["weight"]
    if not is_in_list and not any(_BLOCK.search(part) for part in parts):
        return OUTSIDE
    return TOWER if _is_tower(parts[:number], has_language_model) else BLOCK


def _is_tower(path: list[str], has_language_model: bool) -> bool:
    """path: the parts of a name up to the number of its block, where a language model's own parts end."""
    if any(_TOWER.search(part) for part in path):
        return True
    return has_language_model and "language_model" not in path and any("encoder" in part for part in path)
