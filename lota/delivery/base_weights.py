"""The base's tensors under the names of the loaded model, read from its checkpoint one at a time if possible."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lota.architecture import tied_names, without_zero3
from lota.delivery.model_folder import tensor_files
from lota.messages import did_you_mean


def base_weights(
    folder: Path, skeleton: nn.Module, names: Collection[str], dtype: torch.dtype | None, say: Callable[[str], None]
) -> Callable[[str], Tensor]:
    """A function that gives the tensor of a parameter or buffer by name, cast to `dtype` (None: as stored), with the
    rows that the checkpoint has.

    skeleton: the model without weights; names: those that must be there, else ValueError. Where the checkpoint names
    its tensors otherwise than the model does (mixtures of experts), transformers loads it whole.
    """
    state = skeleton.state_dict(keep_vars=True)
    for name in names:
        if name not in state:
            raise ValueError(f"the ticket names {name}, which the model does not have" + did_you_mean(name, state))
    homes = tensor_files(folder)
    tied = tied_names(skeleton)
    stored = {name: next((alias for alias in tied.get(name, [name]) if alias in homes), None) for name in state}
    if all(stored[name] is not None for name in names):

        def read(name: str) -> Tensor:
            key = stored[name]
            if key is None:
                raise ValueError(f"{folder} does not hold {name}")
            with safe_open(homes[key], framework="pt") as source:
                tensor = source.get_tensor(key)
            return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

        return read
    say(f"{folder} names its tensors otherwise than the model does: loading it whole with transformers")
    known: Any = type(skeleton)
    with without_zero3():
        loaded = known.from_pretrained(folder, dtype=dtype or "auto").state_dict()
    return lambda name: loaded[name].detach()
