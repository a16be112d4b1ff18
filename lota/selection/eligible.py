"""Which tensors of a model may be trained: weight matrices of attention and MLP blocks, or whatever patterns say."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

# Words that mark an attention or MLP block somewhere in a dotted name (lower case): `self_attn`, `SelfAttention`,
# `mlp`, `block_sparse_moe`, `experts`, `DenseReluDense` (T5), and OPT's `fc1`, `fc2`, which have no block of their own.
_BLOCK = re.compile(r"attn|attention|mlp|ffn|feed_?forward|expert|moe|denserelu|^fc\d?$")
# What lives inside such blocks and is still left out, whatever its number of dimensions.
_LEFT_OUT = re.compile(r"bias|norm|embed|rotary|router|^gate$|expert_gate$")


def eligible(
    named_shapes: Mapping[str, Sequence[int]],
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> list[str]:
    """Names of the tensors among which selection chooses entries, in the order of `named_shapes`.

    By default: every tensor with two or more dimensions inside an attention or MLP block, stacked mixture-of-experts
    tensors included. Embeddings, heads, norms and biases stay out; so do routers (`mlp.gate`, `router`,
    `shared_expert_gate`): they are a thousandth of the weights, and moving one of their entries changes which expert
    runs for every input, which is how a sparse change stops being a small one.

    `include` replaces that rule: exactly the tensors (of any shape) whose full name matches one of its patterns.
    `exclude` then takes away what matches one of its patterns. Patterns are globs over the whole dotted name, case
    sensitive, and `*` crosses dots: `*.mlp.*`, `model.layers.[0-3].*`, `*q_proj.weight`.

    named_shapes: the full (unsharded) shape of every parameter, under the names that masks will use; a tied tensor
    appears once, under its first name, as in `named_parameters()`.

    Pure; no rank talks to another. ValueError: a pattern that matches no tensor (with the closest names), a bare
    string in place of a list of patterns, or nothing left to train.
    """
    names = list(named_shapes)
    included = matching(names, include, "include")
    excluded = matching(names, exclude, "exclude") or set()
    if included is None:
        included = {name for name in names if _is_block_weight(name, named_shapes[name])}
    chosen = [name for name in names if name in included and name not in excluded]
    if not chosen:
        reason = (
            "every tensor that `include` names is taken away by `exclude`"
            if include is not None
            else "`exclude` takes away every weight matrix of the attention and MLP blocks"
            if included
            else "no tensor with two or more dimensions in a block named like attention or MLP was found"
        )
        raise ValueError(
            f"expected at least one tensor to train among {len(names)}, got none: {reason}. "
            f"Name the tensors with include=[...]; the model has {_examples(names)}."
        )
    return chosen


def _is_block_weight(name: str, shape: Sequence[int]) -> bool:
    parts = name.lower().split(".")
    in_block = any(_BLOCK.search(part) for part in parts)
    return len(shape) >= 2 and in_block and not any(_LEFT_OUT.search(part) for part in parts)


def matching(names: list[str], patterns: Sequence[str] | None, option: str) -> set[str] | None:
    if patterns is None:
        return None
    if isinstance(patterns, str):
        raise ValueError(f'{option} must be a list of patterns, got the string "{patterns}". Write ["{patterns}"].')
    matched: set[str] = set()
    for pattern in patterns:
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            raise ValueError(
                f'{option} pattern "{pattern}" matches none of the {len(names)} tensors. '
                f"Patterns are globs over the whole name, where * crosses dots. {_close(pattern, names)}"
            )
        matched.update(found)
    return matched


def _close(pattern: str, names: list[str]) -> str:
    core = pattern.strip("*.")
    close = difflib.get_close_matches(core, names, n=3, cutoff=0.5)
    parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
    for word in core.split("."):
        close += [f"*{part}*" for part in difflib.get_close_matches(word, parts, n=2, cutoff=0.6)]
    if close:
        return "Close: " + ", ".join(dict.fromkeys(close)) + "."
    return f"The names look like {_examples(names)}."


def _examples(names: list[str]) -> str:
    shown = names[:1] + names[len(names) // 2 : len(names) // 2 + 1] + names[-1:]
    return ", ".join(dict.fromkeys(shown)) or "no tensors at all"
