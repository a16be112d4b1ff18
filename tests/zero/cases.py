"""What ranks run in the tests of lota.zero, and a dense reference that shares no code with the library."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import lota

ROWS, WIDTH = 8, 24


class Block(nn.Module):
    """A layer with a weight that only flagged rows use, so that some ranks or micro batches may not use it at all."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 37, bias=False)
        self.down = nn.Linear(37, WIDTH)
        self.extra = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.2)

    def forward(self, x: torch.Tensor, flags: torch.Tensor) -> torch.Tensor:
        y = self.down(torch.tanh(self.up(self.norm(x))))
        if bool(flags.any()):
            y = y + torch.where(flags[:, None], F.linear(x, self.extra), torch.zeros_like(x))
        return x + y


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, WIDTH, bias=False)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 3, bias=False)

    def forward(self, x: torch.Tensor, flags: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        for depth, block in enumerate(self.blocks):
            h = block(h, flags[:, depth])
        return self.head(h)


def make_model(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(3)
    return Model().to(dtype)


def make_masks(density: float = 0.3) -> dict[str, torch.Tensor]:
    """Uneven over the tensor, as selected masks are: the first half of every tensor is twice as dense as the second."""
    generator = torch.Generator().manual_seed(11)
    masks = {}
    for name, param in make_model().named_parameters():
        if name.startswith("blocks") and param.dim() == 2:
            limit = torch.where(torch.arange(param.numel()) < param.numel() // 2, density * 4 / 3, density * 2 / 3)
            masks[name] = (torch.rand(param.numel(), generator=generator) < limit).view(param.shape)
    return masks


def micro_batches(step: int, accumulation: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Inputs, flags and targets of one step. The first weight `extra` is used by the first quarter of the rows only
    (one rank of four), the second one in every other micro batch only."""
    batches = []
    for micro in range(accumulation):
        generator = torch.Generator().manual_seed(1000 * step + micro)
        flags = torch.zeros(ROWS, 2, dtype=torch.bool)
        flags[: ROWS // 4, 0] = True
        flags[:, 1] = (step + micro) % 2 == 0
        batches.append(
            (torch.randn(ROWS, 5, generator=generator), flags, torch.randint(0, 3, (ROWS,), generator=generator))
        )
    return batches


SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
CLIP = 0.5


def reference(
    masks: dict[str, torch.Tensor], steps: int, accumulation: int
) -> tuple[dict[str, Any], dict[str, Any], list[float]]:
    """`dense_steps` of the model above on its micro batches."""
    model = make_model().double()
    parameters = {name: param for name, param in model.named_parameters() if name in masks}

    def losses(step: int) -> Iterator[torch.Tensor]:
        for x, flags, target in micro_batches(step, accumulation):
            yield F.cross_entropy(model(x.double(), flags), target) / accumulation

    first, norms = dense_steps(parameters, masks, steps, losses)
    return first, {name: param.detach() for name, param in model.named_parameters()}, norms


def dense_steps(
    parameters: dict[str, nn.Parameter],
    masks: dict[str, torch.Tensor],
    steps: int,
    losses: Callable[[int], Iterable[torch.Tensor]],
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Dense, one process, plain torch: masked gradients, norm over active entries, masked decay, in place.

    losses(step): losses whose sum's gradient is the step's. Returns the first step's gradients (before clipping) and
    the norms.
    """
    moments = {name: (torch.zeros_like(param), torch.zeros_like(param)) for name, param in parameters.items()}
    first: dict[str, torch.Tensor] = {}
    norms: list[float] = []
    for step in range(1, steps + 1):
        total = {name: torch.zeros_like(param) for name, param in parameters.items()}
        for loss in losses(step):
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    total[name] += gradient * masks[name]
        norm = torch.sqrt(sum((g**2).sum() for g in total.values()))
        norms.append(float(norm))
        if step == 1:
            first = {name: g.clone() for name, g in total.items()}
        clip = min(1.0, CLIP / (float(norm) + 1e-6))
        b1, b2 = SETTINGS["betas"]
        with torch.no_grad():
            for name, param in parameters.items():
                m, v = moments[name]
                g = total[name] * clip
                m.mul_(b1).add_(g * (1 - b1))
                v.mul_(b2).add_(g * g * (1 - b2))
                param.sub_(param * masks[name] * SETTINGS["lr"] * SETTINGS["weight_decay"])
                update = (m / (1 - b1**step)) / ((v / (1 - b2**step)).sqrt() + SETTINGS["eps"])
                param.sub_(update * SETTINGS["lr"] * masks[name])
    return first, norms


def config(accumulation: int, world: int, **overrides: Any) -> dict[str, Any]:
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 300} | overrides.pop("zero", {})
    return {
        "train_micro_batch_size_per_gpu": ROWS // world,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": CLIP,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        **overrides,
    }


def gathered(model: nn.Module) -> dict[str, torch.Tensor]:
    import deepspeed

    result = {}
    for name, param in model.named_parameters():
        with deepspeed.zero.GatheredParameters([param]):
            result[name] = param.detach().clone()
    return result


def sparse_run(
    masks: dict[str, torch.Tensor], steps: int, accumulation: int, ticket_path: str | None = None, **options: Any
) -> dict[str, Any]:
    """Train the model sparsely in a hand-written loop on this rank; returns what tests compare."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    dtype = options.pop("dtype", torch.float32)
    overrides = options.pop("config", {})
    make_optimizer = options.pop("make_optimizer", default_optimizer)
    model = make_model(dtype)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    rows = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    first: dict[str, torch.Tensor] = {}
    norms = []
    with lota.sparse_zero3(lota.Mask.from_dense(masks), **options) as run:
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=make_optimizer(model), config=config(accumulation, world, **overrides)
        )
        for step in range(1, steps + 1):
            for x, flags, target in micro_batches(step, accumulation):
                logits = engine(x[rows].to(dtype), flags[rows])
                engine.backward(F.cross_entropy(logits.float(), target[rows]))
                if engine.is_gradient_accumulation_boundary() and step == 1:
                    first = {
                        n: safe_get_full_grad(p).clone() for n, p in engine.module.named_parameters() if n in masks
                    }
                engine.step()
            norms.append(float(engine.get_global_grad_norm()))
        report = run.report()
        after = gathered(engine.module)
        saved = run.save_ticket(ticket_path) if ticket_path else None
        engine.destroy()
    return {
        "before": before,
        "first": first,
        "after": after,
        "norms": norms,
        "report": report,
        "saved": saved,
        "flags": {name: param.requires_grad for name, param in model.named_parameters()},
    }


def default_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **SETTINGS)


def allow_fp16_on_cpu() -> None:
    """DeepSpeed asks the accelerator before it trains in fp16, and its CPU one says no although torch's CPU can."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
