"""The base's tensors under the names of the loaded model, read from its checkpoint one at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from lota.architecture import tied_names
from lota.checkpoint_keys import CheckpointKeys
from lota.delivery.model_folder import read_tensor, tensor_files
from lota.messages import did_you_mean


def base_weights(
    folder: Path, skeleton: nn.Module, names: Collection[str], dtype: torch.dtype | None
) -> Callable[[str], Tensor]:
    """A function that gives the tensor of a parameter or buffer by name, cast to `dtype` (None: as stored), with the
    rows that the checkpoint has. A tensor that the model makes of several (fused experts) is made when it is asked for.

    skeleton: the model without weights; names: those that must be there, else ValueError.
    """
    state = skeleton.state_dict(keep_vars=True)
    homes = tensor_files(folder)
    keys = CheckpointKeys(skeleton, homes)
    tied = tied_names(skeleton)
    stored = {name: next((alias for alias in tied.get(name, [name]) if alias in keys.of_name), None) for name in state}
    for name in names:
        if name not in state:
            raise ValueError(f"the ticket names {name}, which the model does not have" + did_you_mean(name, state))
        if stored[name] is None:
            raise ValueError(f"{folder} does not hold {name}")

    def read(name: str) -> Tensor:
        known = stored[name]
        if known is None:
            raise ValueError(f"{folder} does not hold {name}")
        origin = keys.of_name[known]
        tensor = keys.to_model(origin, {key: read_tensor(homes[key], key) for key in origin.keys})[known]
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    return read
