"""Contract: a mask is what it was made from, holds encoded indices only, and says clearly what does not fit it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lota.ticket import BaseTensor, Mask

BASE = {name: BaseTensor("bfloat16", f"{number:016x}") for number, name in enumerate(["a", "b", "c", "d"])}


def dense_tensors(seed: int = 0, density: float = 0.1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.rand(40, 50, generator=generator) < density,
        "b": torch.zeros(3, 4, 5, dtype=torch.bool),
        "c": torch.ones(17, dtype=torch.bool),
        "d": torch.tensor(True),
    }


def test_dense_round_trip() -> None:
    dense = dense_tensors()
    mask = Mask.from_dense(dense)
    assert mask.names == ("a", "b", "c", "d")
    for name, tensor in dense.items():
        assert mask.shape(name) == tuple(tensor.shape)
        assert mask.numel(name) == tensor.numel()
        assert mask.active(name) == int(tensor.sum())
        assert torch.equal(mask.dense(name), tensor)
        assert torch.equal(mask.indices(name), tensor.flatten().nonzero().squeeze(1))
    assert mask.num_active == sum(int(tensor.sum()) for tensor in dense.values())
    assert mask.eligible == 2000 + 60 + 17 + 1
    assert mask.density == mask.num_active / mask.eligible
    assert mask.nbytes < 250
    assert mask.base == {}


def test_indices_and_dense_make_the_same_mask() -> None:
    dense = dense_tensors()
    mask = Mask.from_dense(dense)
    rows = {name: (tuple(tensor.shape), tensor.flatten().nonzero().squeeze(1)) for name, tensor in dense.items()}
    assert Mask.from_indices(rows) == mask
    assert Mask.from_indices((name, *row) for name, row in rows.items()).digest == mask.digest
    assert Mask.from_indices(dict(reversed(rows.items()))) == mask
    assert hash(Mask.from_indices(rows)) == hash(mask)


def test_one_tensor_at_a_time_is_asked_for() -> None:
    """The next tensor is not made before the one before was encoded and let go."""

    def rows() -> Iterator[tuple[str, tuple[int, ...], torch.Tensor]]:
        earlier: list[weakref.ref[torch.Tensor]] = []
        for number in range(4):
            assert all(reference() is None for reference in earlier), "an earlier tensor is still held"
            positions = torch.arange(0, 100, 7)
            earlier.append(weakref.ref(positions))
            yield f"t{number}", (10, 10), positions
            del positions

    assert Mask.from_indices(rows()).num_active == 60


@pytest.mark.parametrize("change", ["entry", "name", "shape", "missing"])
def test_masks_that_differ_are_not_equal(change: str) -> None:
    dense = dense_tensors()
    mask = Mask.from_dense(dense)
    if change == "entry":
        dense["a"][3, 3] ^= True
    elif change == "name":
        dense["e"] = dense.pop("d")
    elif change == "shape":
        dense["a"] = dense["a"].view(50, 40)
    else:
        del dense["b"]  # a tensor without active entries counts
    other = Mask.from_dense(dense)
    assert other != mask
    assert other.digest != mask.digest
    assert mask != "mask"


def test_overlap_counts_common_entries() -> None:
    one, other = dense_tensors(0, 0.3), dense_tensors(1, 0.05)
    other["e"] = torch.ones(3, dtype=torch.bool)
    expected = sum(int((one[name] & other[name]).sum()) for name in one)
    assert Mask.from_dense(one).overlap(Mask.from_dense(other)) == expected
    assert Mask.from_dense(other).overlap(Mask.from_dense(one)) == expected
    complement = {name: ~tensor for name, tensor in one.items()}
    assert Mask.from_dense(one).overlap(Mask.from_dense(complement)) == 0
    with pytest.raises(ValueError, match=r"a: expected the same shape in both masks"):
        Mask.from_dense(one).overlap(Mask.from_dense({"a": one["a"].t()}))


def test_large_tensor_needs_no_memory_of_its_size() -> None:
    positions = torch.tensor([5, 2**31 + 1, 3 * 2**31])
    mask = Mask.from_indices({"experts": ((64, 2**15, 2**12), positions)})
    assert mask.numel("experts") == 2**33
    assert torch.equal(mask.indices("experts"), positions)
    assert mask.nbytes < 32
    assert mask.overlap(Mask.from_indices({"experts": ((64, 2**15, 2**12), positions[1:])})) == 2


def test_save_and_load(tmp_path: Path) -> None:
    mask = Mask.from_dense(dense_tensors(), BASE)
    mask.save(tmp_path / "deep" / "mask", {"score": "magnitude"})
    loaded = Mask.load(tmp_path / "deep" / "mask")
    assert loaded == mask
    assert loaded.names == mask.names
    assert loaded.base == BASE
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["mask"]
    assert sorted(path.name for path in (tmp_path / "deep" / "mask").iterdir()) == ["ticket.json", "ticket.safetensors"]
    empty = Mask.from_dense({})
    empty.save(tmp_path / "empty")
    assert Mask.load(tmp_path / "empty") == empty
    assert empty.density == 0.0


def test_base() -> None:
    mask = Mask.from_dense(dense_tensors())
    based = mask.with_base(BASE)
    assert based.base == BASE
    assert based == mask  # a base is not part of which entries are active
    assert based.with_base({}).base == {}
    based.check_base("a", (40, 50), "torch.bfloat16", f"{0:016x}")
    based.check_base("a", [40, 50], "bfloat16", None)
    mask.check_base("a", (40, 50), "float32", f"{5:016x}")  # a mask made by hand knows no base
    with pytest.raises(ValueError, match=r"a: expected shape \(40, 50\), as in the mask, got \(50, 40\)"):
        based.check_base("a", (50, 40), "bfloat16", None)
    with pytest.raises(ValueError, match=r"expected base weights in bfloat16, got float32. Load the base model in bfl"):
        based.check_base("a", (40, 50), "float32", None)
    with pytest.raises(ValueError, match=r"fingerprint 0{16}, got 0{15}5.*another base model"):
        based.check_base("a", (40, 50), "bfloat16", f"{5:016x}")
    with pytest.raises(ValueError, match=r"for all 4 tensors or for none, none for d"):
        mask.with_base({name: BASE[name] for name in "abc"})
    with pytest.raises(ValueError, match=r"unknown tensor 'z'"):
        mask.with_base({**BASE, "z": BASE["a"]})
    with pytest.raises(ValueError, match=r"dtype must be bfloat16, float16, float32, .*got 'complex64'"):
        BaseTensor("complex64", "0" * 16)
    with pytest.raises(ValueError, match=r"16 lower-case hex digits"):
        BaseTensor("float32", "0x12")


def test_messages() -> None:
    mask = Mask.from_dense({"model.layers.0.mlp.up_proj.weight": torch.ones(2, 2, dtype=torch.bool)})
    for call in (mask.shape, mask.numel, mask.active, mask.indices, mask.dense):
        with pytest.raises(ValueError, match=r"unknown tensor.*Did you mean 'model.layers.0.mlp.up_proj.weight'\?"):
            call("layers.0.mlp.up_proj.weight")
    with pytest.raises(ValueError, match=r"a: expected a bool tensor.*got torch.int64"):
        Mask.from_dense({"a": torch.ones(3, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"a: expected a bool tensor.*got list"):
        Mask.from_dense({"a": [True]})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"a: positions must ascend strictly"):
        Mask.from_indices({"a": ((3, 3), torch.tensor([4, 2]))})
    with pytest.raises(ValueError, match=r"a: positions must lie in \[0, 9\), got 2 to 9"):
        Mask.from_indices({"a": ((3, 3), torch.tensor([2, 9]))})
    with pytest.raises(ValueError, match=r"a: expected every tensor once"):
        Mask.from_indices([("a", (3,), torch.tensor([0])), ("a", (3,), torch.tensor([1]))])
    with pytest.raises(ValueError, match=r"non-empty string"):
        Mask.from_dense({"": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"string of Unicode"):
        Mask.from_dense({"\ud800": torch.ones(1, dtype=torch.bool)})


def test_positions_outside_the_rows_that_take_part_are_refused_however_they_are_asked_for() -> None:
    mask = Mask.from_indices({"a": ((10, 4), torch.tensor([3, 5]))}, rows={"a": (1, 3)})
    for ask in (mask.indices, lambda name: list(mask.chunks(name))):
        with pytest.raises(ValueError, match=r"a: expected positions in 4:12, the rows that take part, got 3 to 5"):
            ask("a")
