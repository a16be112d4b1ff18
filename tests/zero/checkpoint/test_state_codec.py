"""Whatever an optimizer, a scheduler or a script remembers comes back from JSON exactly: type, dtype, shape, bits and
device; what cannot come back is refused by name."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from lota.zero.checkpoint import state_codec, vectors

META = torch.device("meta")


def _through_json(value: Any) -> Any:
    return json.loads(json.dumps(value, allow_nan=False))


def _assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape, one.device) == (other.dtype, other.shape, other.device)
        assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    elif isinstance(one, dict):
        assert [type(key) for key in one] == [type(key) for key in other]
        assert list(one) == list(other)
        for key in one:
            _assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for mine, yours in zip(one, other):
            _assert_same(mine, yours)
    else:
        assert repr(one) == repr(other)


VALUES = [
    *(None, True, False, 0, 3, -(2**70), 0.1, -0.0, 5e-324, float("inf"), float("-inf"), float("nan"), "", "ü\n"),
    *([], [1, [2.0]], (), (0.9, 0.999), [(1,), [1]], {}, {"a": (1, None)}, {"tensor": 1, "map": {"tuple": [1]}}),
    *({1: "a", "1": "b"}, {(1, 2): 3}, Counter({2: 1, 9: 3}), OrderedDict([("b", 1), ("a", 2)]), {None: {True: 1}}),
    *(np.float64(0.1), np.float32(0.1), np.int64(-5), np.bool_(True), np.float64("nan")),
    *(torch.bfloat16, torch.float32, torch.int8, [torch.bool]),
    *(torch.tensor(5.0), torch.tensor(5), torch.tensor([5.0]), torch.zeros(2, 0, 3), torch.tensor(True)),
    *(torch.tensor(float("nan")), torch.tensor([-0.0, 1e-45]), torch.randn(3, 4).t(), torch.tensor(0.1).bfloat16()),
    *(torch.arange(6, dtype=torch.int8).view(2, 3), torch.tensor(0.3, dtype=torch.float64), torch.tensor(2**62)),
    *(torch.tensor([1.5, 2.0]).to(torch.float8_e4m3fn), torch.tensor([False, True]), torch.tensor(0.1).half()),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_come_back(value):
    _assert_same(state_codec.decode(_through_json(state_codec.encode(value))), value)


def test_parameter_groups_come_back_and_tensors_are_filled_in_place():
    group = {"params": [1], "lr": torch.tensor(0.1), "betas": (0.9, 0.99), "dtype": torch.bfloat16, "k": 3, "no": None}
    kept = _through_json(state_codec.encode_group(group))
    fresh = {"params": [2], "lr": torch.tensor(7.0), "betas": (0.1, 0.1), "dtype": None, "mine": 1}
    lr = fresh["lr"]
    state_codec.restore_group(fresh, kept, torch.device("cpu"))
    assert fresh["lr"] is lr, "schedulers and graphs hold on to it"
    assert fresh.pop("mine") == 1 and fresh.pop("params") == [2]
    _assert_same(fresh, {key: value for key, value in group.items() if key != "params"})
    other = {"params": [], "lr": 0.5}
    state_codec.restore_group(other, kept, torch.device("cpu"))
    _assert_same(other["lr"], group["lr"])


class _Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), r"got object .* in rest\.a: leave it out"),
        ({1, 2}, r"got set"),
        (lambda: 1, r"got function"),
        (torch.zeros(3).to_sparse(), r"rest\.a is a tensor of float32, torch\.sparse_coo"),
        (torch.zeros(3, dtype=torch.complex64), r"complex64"),
        (torch.zeros(3, device="meta"), r"cannot keep"),
        (torch.zeros(1 << 14 | 1), r"shape \(16385,\), neither one value for each weight nor small"),
        (torch.zeros(3).as_subclass(_Subclass), r"got _Subclass"),
        (torch.device("cpu"), r"got device"),
    ],
)
def test_what_cannot_come_back_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        state_codec.encode({"a": [1, value][1]}, "rest")
    with pytest.raises(ValueError, match=r"a is a tensor|got"):
        state_codec.split({"a": value}, torch.zeros(5))


def test_state_is_split_into_json_and_tensors_of_the_shape():
    flat = torch.randn(6)
    state = {
        "step": torch.tensor(3.0),
        "exp_avg": torch.randn(6),
        "low": torch.randn(6).bfloat16(),
        "codes": torch.arange(6, dtype=torch.int8),
        "history": [torch.randn(6), (torch.ones(6), 1)],
        "table": torch.randn(4),
        "flag": None,
    }
    kept, entries = state_codec.split(state, flat)
    assert set(entries) == {"exp_avg", "low", "codes", "history.0", "history.1.0"}
    longer = torch.zeros(9)
    joined = state_codec.join(_through_json(kept), longer, all_on_own=False)
    again, places = state_codec.split(joined, longer)
    assert again == kept
    for path, values in entries.items():
        assert places[path].shape == (9,) and places[path].dtype == values.dtype and not places[path].any()
        places[path][:6] = values
    _assert_same(joined["history"][1][0][:6], state["history"][1][0])
    for key in ("step", "table", "flag"):
        _assert_same(joined[key], state[key])


@pytest.mark.parametrize(
    ("group", "device"),
    [
        ({}, "cpu"),
        ({"fused": None, "capturable": False}, "cpu"),
        ({"fused": True}, "meta"),
        ({"fused": None, "capturable": True}, "meta"),
    ],
)
def test_step_counts_are_where_the_optimizer_reads_them(group, device):
    """A checkpoint of an optimizer whose counts were on the host, resumed by one with these settings; the parameters'
    device is a stand-in."""
    kept, _ = state_codec.split({"step": torch.tensor(3.0), "exp_avg": torch.zeros(5)}, torch.zeros(5))
    on_own = state_codec.wants_own_device(group)
    joined = state_codec.join(kept, torch.zeros(5, device=META), all_on_own=on_own)
    assert joined["step"].device.type == device
    assert joined["exp_avg"].device.type == "meta"


def test_counts_that_were_on_the_device_return_there():
    kept = {"tensor": "00004040", "dtype": "float32", "shape": []}
    assert state_codec.decode({**kept, "device": "own"}, META).is_meta
    assert float(state_codec.decode({**kept, "device": "cpu"}, META)) == 3


def test_vectors_of_any_dtype_are_files_that_safetensors_reads(tmp_path):
    """Narrow and wide ones in any order stay aligned."""
    values = {
        "a": torch.tensor([True, False, True]),
        "b": torch.randn(5),
        "c": torch.arange(3, dtype=torch.int8),
        "d": torch.randn(2).double(),
        "e": torch.randn(3).bfloat16(),
        "f": torch.arange(7, dtype=torch.int64),
        "g": torch.randn(4).to(torch.float8_e5m2),
    }
    path = tmp_path / "state.safetensors"
    written = vectors._write_vectors(path, [vectors.Vector.of(key, 0, value) for key, value in values.items()])
    with safe_open(path, "pt") as file:
        for key, value in values.items():
            _assert_same(file.get_tensor(key), value)
            assert written[key][0] == value.numel()
    with pytest.raises(ValueError, match=r"x is torch\.complex64, which no checkpoint holds"):
        vector = vectors.Vector.of("x", 0, torch.zeros(2, dtype=torch.complex64))
        vectors._write_vectors(tmp_path / "other", [vector])
