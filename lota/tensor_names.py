"""Names of a model's tensors that differ only by what was wrapped around the model: DDP, torch.compile, FSDP, PEFT,
sentence-transformers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from lota.messages import did_you_mean

_WRAPPERS = re.compile(r"(?:(?<=^)|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_FIRST = re.compile(
    r"^(?:module\.)+|^(?:module\.)*0\.(?:auto_model|model)\.|^(?:module\.)*base_model\.model\.(?!.*lora_)"
)
_BASE_LAYER = re.compile(r"\.base_layer(?=\.)")


def unwrapped(name: str) -> str:
    """A tensor's name in the model itself, without what wrappers put before or into it."""
    name = _BASE_LAYER.sub("", _WRAPPERS.sub("", name))
    return _FIRST.sub("", name)


def find_names(names: Iterable[str], known: Collection[str], prefix: str | None = None) -> dict[str, str | None]:
    """For each of `names`, which of the `known` names means the same tensor; None where there is none.

    The same name, else the one that is equal without wrappers, else without (or with) `prefix`, the name under which a
    model with a head holds the model without one (`base_model_prefix` of transformers).
    """
    plain: dict[str, list[str]] = {}
    found: dict[str, str | None] = {}
    for name in names:
        if name in known:
            found[name] = name
            continue
        if not plain:
            for other in known:
                plain.setdefault(unwrapped(other), []).append(other)
        wanted = unwrapped(name)
        candidates = [wanted]
        if prefix:
            candidates += [wanted.removeprefix(f"{prefix}.")] * wanted.startswith(f"{prefix}.") + [f"{prefix}.{wanted}"]
        found[name] = next((plain[other][0] for other in candidates if len(plain.get(other, ())) == 1), None)
    return found


def need_names(names: Iterable[str], known: Collection[str], whose: str, prefix: str | None = None) -> dict[str, str]:
    """`find_names`; ValueError for the first name that `whose` tensors do not have."""
    found = find_names(names, known, prefix)
    needed: dict[str, str] = {}
    for name, other in found.items():
        if other is None:
            raise ValueError(f"the ticket names {name}, which {whose} does not have" + did_you_mean(name, known))
        needed[name] = other
    return needed
