"""What is true of a ticket on every causal architecture: planned, trained, applied to a folder, reverted, exported,
scored.

    python -m tests.delivery.architecture_table [--no-train] [NAME ...]

prints a line for each, with what is not as it must be. A cell is "ok", or the message of a refusal; "WRONG ..." is a
defect.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import lota
from lota.delivery.apply import apply_to_checkpoint, revert_checkpoint
from lota.delivery.base import check_base
from lota.delivery.peft import export_peft
from lota.evaluate.answer_loss import check_causal, score_answers
from lota.plan import read_model
from lota.selection import eligible
from lota.ticket import BaseTensor, Mask, Ticket
from lota.ticket.fingerprint import fingerprint, to_hex
from tests import architectures
from tests.delivery.test_apply import load_checkpoint


def ids() -> torch.Tensor:
    return torch.randint(5, 99, (2, 12), generator=torch.Generator().manual_seed(7), dtype=torch.int64)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    made: torch.Tensor = model.eval()(input_ids=ids()).logits
    return made


def load(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model.eval()


def identity(tensor: torch.Tensor) -> BaseTensor:
    flat = tensor.detach().contiguous().view(-1)
    return BaseTensor(str(tensor.dtype).removeprefix("torch."), to_hex(fingerprint(flat)))


def make_ticket(model: Any, names: list[str], density: float = 0.1) -> Ticket:
    """As training leaves it, with other values at a tenth of the entries of `names`; frozen tensors known."""
    generator = torch.Generator().manual_seed(0)
    parameters = dict(model.named_parameters())
    masks = {name: torch.rand(parameters[name].shape, generator=generator) < density for name in names}
    base = {name: identity(parameters[name]) for name in names}
    stored = {name: model.state_dict()[name] for name, _ in model.named_buffers() if name in model.state_dict()}
    frozen = {name: identity(tensor) for name, tensor in (stored | parameters).items() if name not in names}
    mask = Mask.from_dense(masks, base).with_base(base, frozen)
    before = {name: parameters[name].detach()[masks[name]] for name in names}
    values = {
        name: (tensor.float() + torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        for name, tensor in before.items()
    }
    return Ticket(mask, values, before, {"class": type(model).__name__})


def train_one_step(base: Path) -> str:
    """Calibrate on a gradient and train a step with DeepSpeed; the ticket, applied to the base, is the trained
    model."""
    import deepspeed

    from tests.zero import cases

    def engine_of(model: Any) -> Any:
        model.config.use_cache = False
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        return deepspeed.initialize(
            model=model, optimizer=optimizer, config=cases.config(1, 1, bf16={"enabled": True})
        )[0]

    def step(engine: Any) -> None:
        engine.train()
        engine.backward(engine(input_ids=ids(), labels=ids()).loss)
        engine.step()

    with lota.calibration_zero3(score="gradient", density=0.1) as run:
        engine = engine_of(load(base))
        step(engine)
        mask = run.mask()
        engine.destroy()
    with lota.sparse_zero3(mask) as run, tempfile.TemporaryDirectory() as folder:
        engine = engine_of(load(base))
        step(engine)
        run.save_ticket(Path(folder) / "ticket")
        trained = cases.gathered(engine.module)
        engine.destroy()
        model = load(base)
        lota.apply_(model, Ticket.load(Path(folder) / "ticket"))
        now = dict(model.named_parameters())
        wrong = [name for name, tensor in trained.items() if not torch.equal(tensor, now[name].detach())]
        return f"WRONG {wrong[0]}" if wrong else "ok"


def row(name: str, folder: Path, train: bool = True) -> dict[str, str]:
    """The columns for one architecture."""
    base = folder / "base"
    architectures.make_model(name).save_pretrained(base)
    cells: dict[str, str] = {}

    def cell(column: str, work: Callable[[], str]) -> None:
        try:
            cells[column] = work()
        except ValueError as error:
            cells[column] = " ".join(str(error).split())[:160]
        except Exception as error:  # noqa: BLE001 (a cell of the table)
            cells[column] = f"WRONG {type(error).__name__}: {' '.join(str(error).split())[:160]}"

    try:
        model = load(base)
        before = logits(model)
    except Exception as error:  # noqa: BLE001 (transformers' own: no auto class for a part of a model, not in bfloat16)
        return {"load": " ".join(str(error).split())[:160]}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def plan() -> str:
        planned = dict(read_model(str(base)).shapes)
        return "ok" if planned == shapes else f"WRONG {sorted(planned.keys() ^ shapes.keys())[:2]}"

    def is_base() -> str:
        check_base(str(base))
        return "ok"

    cell("plan", plan)
    cell("base", is_base)
    if train:
        cell("train", lambda: train_one_step(base))
    try:
        names = list(eligible(shapes))
    except ValueError as error:
        return cells | {"merged": " ".join(str(error).split())[:160]}
    ticket = make_ticket(model, names)
    lota.apply_(model, ticket)
    wanted = logits(model)

    def merged() -> str:
        apply_to_checkpoint(base, [ticket], folder / "merged")
        if torch.equal(wanted, before):
            return "WRONG the ticket changes nothing"
        return "ok" if torch.equal(logits(load(folder / "merged")), wanted) else "WRONG logits"

    def revert() -> str:
        revert_checkpoint(folder / "merged", [ticket], folder / "again")
        one, other = load_checkpoint(base), load_checkpoint(folder / "again")
        differ = [key for key in one if key not in other or not torch.equal(one[key], other[key])]
        return f"WRONG {differ[0]}" if differ or one.keys() != other.keys() else "ok"

    def peft() -> str:
        from peft import PeftModel

        notes: list[str] = []
        export_peft(ticket, base, folder / "adapter", say=notes.append)
        adapted = PeftModel.from_pretrained(load(base), str(folder / "adapter"))
        if not torch.equal(logits(adapted), wanted):
            return "WRONG logits"
        return "ok" if not any("not run" in note for note in notes) else notes[-1][:160]

    def scored() -> str:
        check_causal(model)
        figures = [score_answers(each, _Ids(), ROWS, 2).row_losses for each in (model, load(folder / "merged"))]
        return "ok" if figures[0] == figures[1] else "WRONG another loss of the merged folder"

    cell("merged", merged)
    cell("revert", revert)
    cell("peft", peft)
    if (folder / "merged").exists():
        cell("scored", scored)
    return cells


ROWS = [{"prompt": "abc", "completion": "de"}, {"prompt": "f", "completion": "ghij"}]


class _Ids:
    """A tokenizer of characters."""

    pad_token_id, eos_token_id, eos_token = 0, 2, "."

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [2 if letter == "." else ord(letter) - 80 for letter in text]}


def main(argv: list[str]) -> int:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    train = "--no-train" not in argv
    wanted = [word for word in argv if not word.startswith("-")] or architectures.names()
    num_made = num_wrong = 0
    for name in wanted:
        with tempfile.TemporaryDirectory() as folder:
            try:
                architectures.check_runs(name, ids())
            except Exception as error:  # noqa: BLE001 (not an architecture of a few sizes)
                print(f"{name:24} not made: {type(error).__name__}", flush=True)
                continue
            try:
                cells = row(name, Path(folder), train)
            except Exception as error:  # noqa: BLE001 (transformers' own: its class, or its files, do not fit)
                print(f"{name:24} does not load or run again: {' '.join(str(error).split())[:80]}", flush=True)
                continue
        num_made += 1
        num_wrong += any(text.startswith("WRONG") for text in cells.values())
        others = {column: text for column, text in cells.items() if text != "ok"}
        print(f"{name:24} {others or 'all ok'}", flush=True)
    print(f"{num_made} architectures, {num_wrong} with a wrong cell")
    return int(num_wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
