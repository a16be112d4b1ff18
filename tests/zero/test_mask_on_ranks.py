"""Once the engine is built, only rank 0 keeps the mask's indices; on the other ranks their memory ends, and everything
that a run does afterwards works from the outline: reports, checkpoints, resuming, the ticket."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import lota
from lota.zero.compact.outline import MaskOutline
from tests.zero import cases


def _given(kind, folder):
    """The mask of the cases as a script may give it, and nothing else that refers to it."""
    mask = lota.Mask.from_dense(cases.make_masks())
    if kind == "mask":
        return mask
    if kind == "ticket":
        zeros = {name: torch.zeros(mask.active(name)) for name in mask.names}
        return lota.Ticket(mask, zeros, zeros)
    return folder


def _run(kind, folder, script_keeps):
    import deepspeed

    kept = _given(kind, folder) if script_keeps else None
    model = cases.make_model()
    with lota.sparse_zero3(kept if script_keeps else _given(kind, folder)) as run:
        encoded = weakref.ref(run.mask.encoded(run.mask.names[0]).data)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=cases.default_optimizer(model), config=cases.config(1, 2)
        )
        gc.collect()
        rank = torch.distributed.get_rank()
        result = {"encoded": encoded() is not None, "kind": type(run.mask).__name__}
        for x, flags, target in cases.micro_batches(1, 1):
            rows = slice(rank * 4, (rank + 1) * 4)
            engine.backward(torch.nn.functional.cross_entropy(engine(x[rows], flags[rows]), target[rows]))
            engine.step()
        engine.save_checkpoint(f"{folder}-checkpoint")
        engine.load_checkpoint(f"{folder}-checkpoint")
        result["report"] = run.report()
        result["saved"] = run.save_ticket(f"{folder}-ticket", overwrite=True)
        mask = run.mask
        result["facts"] = [mask.names, mask.num_active, mask.eligible, mask.density, mask.digest]
        result["facts"] += [(mask.shape(n), mask.numel(n), mask.active(n)) for n in mask.names]
        engine.destroy()
    return result


CASES = [("mask", False), ("mask", True), ("ticket", False), ("path", False)]


@pytest.mark.parametrize(("kind", "script_keeps"), CASES)
def test_only_rank_0_keeps_the_indices(ranks, tmp_path, kind, script_keeps):
    folder = str(tmp_path / "mask")
    mask = lota.Mask.from_dense(cases.make_masks())
    mask.save(folder)
    first, second = ranks(2).run(_run, kind, folder, script_keeps)
    assert first["encoded"] and first["kind"] == "Mask"
    assert second["kind"] == "MaskOutline"
    assert second["encoded"] == script_keeps, "what the script refers to is the script's"
    assert first["report"]["bytes_held"]["mask_host"] == mask.nbytes > 0
    assert second["report"]["bytes_held"]["mask_host"] == 0
    assert first["facts"] == second["facts"] and first["saved"] == second["saved"]
    assert lota.Ticket.load(f"{folder}-ticket").mask == mask


def test_an_outline_says_where_the_indices_are():
    mask = lota.Mask.from_dense(cases.make_masks())
    outline = MaskOutline(mask)
    for name in ("indices", "chunks", "dense", "encoded", "save", "overlap"):
        with pytest.raises(AttributeError, match=f"{name} is for the mask with its indices, which only rank 0 keeps"):
            getattr(outline, name)
    with pytest.raises(AttributeError, match="no attribute 'shapes'"):
        _ = outline.shapes
