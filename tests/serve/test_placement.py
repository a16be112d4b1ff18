"""Every entry of a checkpoint's tensor is found where the loader puts it, and looking writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from lota.delivery.stacking import Entries
from lota.serve.placement import Copy, NotPlainError, place, record_copies, whole_memory
from tests.serve.fused import FusedModel

SHAPES = {
    "layers.0.self_attn.q_proj.weight": (8, 6),
    "layers.0.self_attn.k_proj.weight": (4, 6),
    "layers.0.self_attn.v_proj.weight": (4, 6),
    "layers.0.self_attn.o_proj.weight": (6, 8),
    "layers.0.mlp.gate_proj.weight": (10, 6),
    "layers.0.mlp.up_proj.weight": (10, 6),
    "layers.0.norm.weight": (6,),
}
Loader = Callable[[Iterable[tuple[str, Tensor]]], object]


def numbered(shape: tuple[int, ...], start: int = 0) -> Tensor:
    """Every entry has a value of its own, which fp32 holds exactly."""
    return torch.arange(start, start + torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def find_all(load: Loader, name: str, tensor: Tensor) -> tuple[list[Copy], int]:
    """Places every entry, and checks that the number there is its own; how many were found."""
    copies = record_copies(load, name, tensor.shape, tensor.dtype)
    flat, found = tensor.flatten(), 0
    for copy in copies:
        part = place(copy, Entries(torch.arange(flat.numel()), -flat, flat))
        assert torch.equal(whole_memory(copy.target)[part.positions.long()], part.base)
        assert torch.equal(part.values, -part.base) and part.positions.dtype == torch.int32
        found += part.positions.numel()
    return copies, found


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_fused_and_cut_parameters(num_ranks: int) -> None:
    checkpoint = {name: numbered(shape, 1000 * i) for i, (name, shape) in enumerate(SHAPES.items())}
    models = [FusedModel(checkpoint, rank, num_ranks) for rank in range(num_ranks)]
    for model in models:
        model.load_weights(checkpoint.items())
    for name, tensor in checkpoint.items():
        found = [find_all(model.load_weights, name, tensor)[1] for model in models]
        is_cut = any(part in name for part in ("_proj",))
        assert found == [tensor.numel() // num_ranks if is_cut else tensor.numel()] * num_ranks


def test_looking_writes_nothing() -> None:
    checkpoint = {name: numbered(shape) for name, shape in SHAPES.items()}
    model = FusedModel(checkpoint)
    for name, tensor in checkpoint.items():
        record_copies(model.load_weights, name, tensor.shape, tensor.dtype)
    assert all(bool(parameter.isnan().all()) for parameter in model.parameters())


@pytest.mark.parametrize(
    "piece",
    [
        lambda t: t.t(),
        lambda t: t[2:5, 1:4],
        lambda t: t.view(4, 2, 6)[:, 1],
        lambda t: t.view(4, 2, 6).transpose(0, 1)[1:],
        lambda t: t[3],
        lambda t: t[:, 5:6],
        lambda t: t[7:8, 5:6],
        lambda t: t[::2],
        lambda t: t[4:4],
        lambda t: t.flatten()[5:29].view(4, 6),
    ],
)
def test_any_view(piece: Callable[[Tensor], Tensor]) -> None:
    tensor = numbered((8, 6), 7)
    room = torch.full((3, *piece(tensor).shape), torch.nan)

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        for _, weight in weights:
            room[1].copy_(piece(weight))

    load([("w", tensor)])
    assert find_all(load, "w", tensor)[1] == piece(tensor).numel()


def doubled(parameter: Tensor, weight: Tensor) -> None:
    parameter.data.copy_(weight * 2)


def cast(parameter: Tensor, weight: Tensor) -> None:
    parameter.data.copy_(weight.to(torch.bfloat16))


def assigned(parameter: Tensor, weight: Tensor) -> None:
    parameter.data[:] = weight + 0


def filled(parameter: Tensor, weight: Tensor) -> None:
    parameter.data.fill_(1.0)


def filled_from(parameter: Tensor, weight: Tensor) -> None:
    parameter.data.fill_(weight[0, 0].item())


def added(parameter: Tensor, weight: Tensor) -> None:
    parameter.data.add_(weight)


def asserted(parameter: Tensor, weight: Tensor) -> None:
    raise AssertionError("shapes")


@pytest.mark.parametrize("loader", [doubled, cast, assigned, filled, filled_from, added, asserted])
def test_a_loader_that_does_more_than_copy_is_noticed_before_it_writes(
    loader: Callable[[Tensor, Tensor], None],
) -> None:
    parameter = nn.Parameter(torch.full((4, 3), torch.nan), requires_grad=False)
    with pytest.raises(NotPlainError, match=r"w: "):
        record_copies(lambda weights: [loader(parameter, weight) for _, weight in weights], "w", (4, 3), torch.float32)
    assert bool(parameter.isnan().all())


def test_padding_is_no_entry() -> None:
    weight, parameter = numbered((4, 3), 1), nn.Parameter(torch.full((6, 3), torch.nan), requires_grad=False)

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        for _, loaded in weights:
            parameter.data[: loaded.shape[0]].copy_(loaded)
            parameter[loaded.shape[0] :].data.fill_(0)

    assert len(record_copies(load, "w", (4, 3), torch.float32)) == 1 and bool(parameter.isnan().all())
    load([("w", weight)])
    assert find_all(load, "w", weight)[1] == weight.numel()


def test_a_server_in_another_dtype_holds_what_its_loader_casts() -> None:
    weight = torch.tensor([1.0, 1 / 3, 2 / 3])
    parameter = nn.Parameter(torch.empty(3, dtype=torch.bfloat16), requires_grad=False)

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        for _, loaded in weights:
            parameter.data.copy_(loaded)

    load([("w", weight)])
    (copy,) = record_copies(load, "w", (3,), torch.float32)
    part = place(copy, Entries(torch.tensor([1, 2]), weight[:2], weight[1:]))
    assert torch.equal(part.base, parameter[1:]) and torch.equal(part.values, weight[:2].bfloat16())


def test_memory_with_other_values_is_noticed() -> None:
    """The server permuted the rows after loading."""
    tensor = numbered((4, 3))
    parameter = nn.Parameter(torch.empty(4, 3), requires_grad=False)

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        for _, weight in weights:
            parameter.data.copy_(weight)

    load([("w", tensor.flip(0))])
    (copy,) = record_copies(load, "w", (4, 3), torch.float32)
    with pytest.raises(NotPlainError, match="base's values"):
        place(copy, Entries(torch.tensor([0]), tensor.flatten()[:1], tensor.flatten()[:1]))
