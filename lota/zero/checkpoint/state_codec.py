"""What an optimizer, a scheduler or a script remembers, as JSON that gives it back exactly.

None, booleans, numbers and text stand for themselves, lists for lists. Everything else is an object with one tag:

    {"map": {"step": 3}}                 a dict with text as keys
    {"pairs": [[2, 1]], "kind": "dict"}  any other dict (dict, OrderedDict, Counter)
    {"tuple": [0.9, 0.999]}
    {"float": "inf"}                     a float that JSON has no word for
    {"numpy": "float64", "value": 0.1}   a scalar of numpy
    {"dtype": "bfloat16"}                a torch.dtype
    {"tensor": "00004040", "dtype": "float32", "shape": [], "device": "cpu"}   a small tensor, by its bytes in hex
    {"entries": "float32"}               a tensor with an element for each weight: only its dtype is here

Devices are relative: `own` is the accelerator that the parameters are on, `cpu` the host, so that a checkpoint can be
resumed on another device of the kind. Whatever cannot be given back exactly raises ValueError, naming where it stands.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lota.ticket.container import DTYPE_CODES

MAX_TENSOR_BYTES = 1 << 16
"""Largest tensor that JSON holds: tables of constants fit, state that grows with the weights does not."""

_DICTS = {kind.__name__: kind for kind in (dict, OrderedDict, Counter)}
_CPU = torch.device("cpu")


def encode(value: Any, where: str = "value") -> Any:
    """JSON of a value. where: its name in the errors."""
    return _Encoder(None).encode(value, where)


def decode(kept: Any, own: torch.device = _CPU, *, all_on_own: bool = False) -> Any:
    """The value that `encode` was given. own: device of the parameters; all_on_own: every tensor goes there."""
    return _Decoder(None, own, all_on_own).decode(kept)


def encode_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """JSON of a parameter group but for its parameters."""
    return {str(key): encode(value, f"{key} of a parameter group") for key, value in group.items() if key != "params"}


def restore_group(group: dict[str, Any], kept: Mapping[str, Any], own: torch.device) -> None:
    """Give a parameter group its values back. A tensor of the same kind is filled: others may hold on to it."""
    for key, value in kept.items():
        restored, current = decode(value, own), group.get(key)
        if isinstance(current, Tensor) and isinstance(restored, Tensor) and _are_alike(current, restored):
            current.copy_(restored)
        else:
            group[key] = restored


def wants_own_device(group: Mapping[str, Any]) -> bool:
    """Whether an optimizer reads its step counts where the parameters are: a fused or capturable one takes them for
    addresses on that device, whatever device they are on."""
    return bool(group.get("fused")) or bool(group.get("capturable"))


def split(state: Mapping[str, Any], flat: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An optimizer's state of the 1-D tensor `flat`: as JSON, and by path its tensors of that shape, which JSON leaves
    out. A state that is not there yet is an empty one."""
    encoder = _Encoder(flat)
    kept = {_text(key): encoder.encode(value, _text(key)) for key, value in state.items()}
    return kept, encoder.entries


def join(kept: Mapping[str, Any], flat: Tensor, *, all_on_own: bool) -> dict[str, Any]:
    """The state that `split` was given, for another `flat`, with zeros for the tensors of its shape."""
    decoder = _Decoder(flat, flat.device, all_on_own)
    return {key: decoder.decode(value) for key, value in kept.items()}


class _Encoder:
    def __init__(self, flat: Tensor | None) -> None:
        self._flat, self.entries = flat, dict[str, Tensor]()

    def encode(self, value: Any, where: str) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if kind is list:
            return [self.encode(item, f"{where}.{number}") for number, item in enumerate(value)]
        if kind is tuple:
            return {"tuple": [self.encode(item, f"{where}.{number}") for number, item in enumerate(value)]}
        if kind in _DICTS.values():
            return self._encode_dict(value, where)
        if isinstance(value, (np.bool_, np.integer, np.floating)) and value.dtype.itemsize <= 8:
            return {"numpy": value.dtype.name, "value": self.encode(value.item(), where)}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if kind in (Tensor, torch.nn.Parameter):
            return self._encode_tensor(value.detach(), where)
        raise ValueError(
            f"a checkpoint keeps numbers, text, lists and dicts, got {kind.__name__} ({value!r:.80}) in {where}: leave "
            "it out or turn it into those"
        )

    def _encode_dict(self, value: Mapping[Any, Any], where: str) -> Any:
        if type(value) is dict and all(type(key) is str for key in value):
            return {"map": {key: self.encode(item, f"{where}.{key}") for key, item in value.items()}}
        pairs = [[self.encode(key, where), self.encode(item, f"{where}.{key}")] for key, item in value.items()]
        return {"pairs": pairs, "kind": type(value).__name__}

    def _encode_tensor(self, tensor: Tensor, where: str) -> Any:
        name = str(tensor.dtype).removeprefix("torch.")
        flat = self._flat
        is_plain = tensor.layout == torch.strided and not tensor.is_quantized and tensor.dtype in DTYPE_CODES
        if not is_plain or tensor.is_meta:
            raise ValueError(f"{where} is a tensor of {name}, {tensor.layout}, which a checkpoint cannot keep")
        if flat is not None and tensor.shape == flat.shape:
            if tensor.device != flat.device:
                raise ValueError(f"{where} lies on {tensor.device}, its weights on {flat.device}")
            self.entries[where] = tensor
            return {"entries": name}
        if tensor.nbytes > MAX_TENSOR_BYTES:
            raise ValueError(
                f"{where} is a tensor of shape {tuple(tensor.shape)}, neither one value for each weight nor small "
                f"(at most {MAX_TENSOR_BYTES} bytes), which a checkpoint cannot keep"
            )
        data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        device = "cpu" if tensor.device.type == "cpu" else "own"
        return {"tensor": data.hex(), "dtype": name, "shape": list(tensor.shape), "device": device}


class _Decoder:
    def __init__(self, flat: Tensor | None, own: torch.device, all_on_own: bool) -> None:
        self._flat, self._own, self._all_on_own = flat, own, all_on_own

    def decode(self, kept: Any) -> Any:
        if isinstance(kept, list):
            return [self.decode(item) for item in kept]
        if not isinstance(kept, dict):
            return kept
        if "map" in kept:
            return {key: self.decode(item) for key, item in kept["map"].items()}
        if "pairs" in kept:
            return _DICTS[kept["kind"]]({self.decode(key): self.decode(item) for key, item in kept["pairs"]})
        if "tuple" in kept:
            return tuple(self.decode(item) for item in kept["tuple"])
        if "float" in kept:
            return float(kept["float"])
        if "numpy" in kept:
            return np.dtype(kept["numpy"]).type(self.decode(kept["value"]))
        dtype = getattr(torch, kept.get("dtype") or kept["entries"])
        if "entries" in kept:
            assert self._flat is not None
            return torch.zeros(self._flat.shape, dtype=dtype, device=self._flat.device)
        if "tensor" in kept:
            return self._decode_tensor(kept, dtype)
        return dtype

    def _decode_tensor(self, kept: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
        data = torch.frombuffer(bytearray.fromhex(kept["tensor"]) or bytearray(1), dtype=torch.uint8)
        data = data[: len(kept["tensor"]) // 2]
        device = self._own if self._all_on_own or kept["device"] == "own" else _CPU
        return data.clone().view(dtype).reshape(kept["shape"]).to(device)


def _text(key: Any) -> str:
    if type(key) is not str:
        raise ValueError(f"expected text as the keys of an optimizer's state, got {key!r:.80}")
    return key


def _are_alike(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape
