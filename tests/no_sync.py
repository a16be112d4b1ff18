"""A dispatch mode under which asking the device raises: in it, code that runs never waits for an accelerator."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal")


class NoSync(TorchDispatchMode):
    """Raises on values read back to the host, on shapes that depend on values, and on copies from device to host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in _ASKING:
            raise AssertionError(f"{name} waits for the device")
        result = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_"):
            devices = [leaf.device.type for leaf in tree_leaves((result, args)) if isinstance(leaf, torch.Tensor)]
            if devices[0] == "cpu" and any(device != "cpu" for device in devices):
                raise AssertionError(f"{name} copies from the device to the host")
        return result
