"""Which tensors of a model may be trained: the weight matrices of its blocks, or whatever patterns say."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from lota.selection.kinds import BLOCK, kinds
from lota.selection.left_out import left_out

DEFAULT = "default"
"""In place of a pattern of `include`: what is eligible without patterns."""


def eligible(
    named_shapes: Mapping[str, Sequence[int]],
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> list[str]:
    """Names of the tensors among which selection chooses entries, in the order of `named_shapes`.

    By default: every weight matrix of the model's blocks (`kinds.kinds` says what that is): attention, MLP and
    state-space mixers, convolutions that mix channels, stacked mixture-of-experts tensors. Embeddings, heads, norms,
    biases and depthwise kernels stay out, and so do vision and audio towers beside a language model. So do routers
    (`mlp.gate`, `router`, `shared_expert_gate`): they are a thousandth of the weights, and moving one of their entries
    changes which expert runs for every input, which is how a sparse change stops being a small one.

    `include` replaces that rule: exactly the tensors (of any shape) whose full name matches one of its patterns;
    `default` among them stands for the rule, so `["default", "lm_head.weight"]` adds to it. `exclude` then takes away
    what matches one of its patterns. Patterns are globs over the whole dotted name, case sensitive, and `*` crosses
    dots: `*.mlp.*`, `model.layers.[0-3].*`, `*q_proj.weight`. A tensor without elements is never eligible.

    named_shapes: the full (unsharded) shape of every parameter, under the names that masks will use; a tied tensor
    appears once, under its first name, as in `named_parameters()`.

    Pure; no rank talks to another. ValueError: a pattern that matches no tensor (with the closest names), a bare
    string in place of a list of patterns, or nothing left to train.
    """
    included = _included(named_shapes, include)
    excluded = matching(list(named_shapes), exclude, "exclude")
    chosen = [name for name in named_shapes if name in included and name not in excluded]
    if not chosen:
        raise ValueError(_nothing_left(named_shapes, include, bool(included)))
    return chosen


def _included(named_shapes: Mapping[str, Sequence[int]], include: Sequence[str] | None) -> set[str]:
    patterns = _checked([DEFAULT] if include is None else include, "include")
    named = matching(list(named_shapes), [pattern for pattern in patterns if pattern != DEFAULT], "include")
    if DEFAULT in patterns:
        named |= {name for name, kind in kinds(named_shapes).items() if kind == BLOCK}
    return {name for name in named if 0 not in named_shapes[name]}


def _nothing_left(
    named_shapes: Mapping[str, Sequence[int]], include: Sequence[str] | None, takes_all_away: bool
) -> str:
    if not named_shapes:
        return (
            "expected at least one tensor to train, got none: no parameter of the model has requires_grad. "
            "Call model.requires_grad_(True), or set it on what may be trained."
        )
    names = list(named_shapes)
    message = f"expected at least one tensor to train among {len(names)}, got none: "
    if include is None and not takes_all_away:
        matrices = [row.pattern for row in left_out(named_shapes, ()) if row.is_matrix][:3]
        message += "no weight matrix inside a block was found (no numbered list of blocks, no attention, no MLP). "
        return message + (f"Name tensors, such as the largest: include={matrices}." if matrices else "")
    reason = "`include` names no tensor"
    if takes_all_away:
        what = "weight matrix of the blocks" if include is None else "tensor that `include` names"
        reason = f"`exclude` takes away every {what}"
    return message + f"{reason}. Name the tensors with include=[...]; the model has {_examples(names)}."


def _checked(patterns: Sequence[str], option: str) -> Sequence[str]:
    if isinstance(patterns, str):
        raise ValueError(f'{option} must be a list of patterns, got the string "{patterns}". Write ["{patterns}"].')
    return patterns


def matching(names: list[str], patterns: Sequence[str] | None, option: str) -> set[str]:
    matched: set[str] = set()
    for pattern in _checked(patterns or (), option):
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
