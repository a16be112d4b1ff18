"""The demo: make a small base model, fine-tune it whole and as a ticket on two ranks, and compare what came out.

    lota demo                    from a checkout: make demo

Needs no network and no GPU. The base model (a small Llama trained on the spot, see lota/demo/world.py) is kept in
~/.cache/lota; everything else goes to output_dir, which is emptied first when it holds an earlier demo.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from lota.data.dataset import read_jsonl
from lota.delivery.live import apply_
from lota.demo.base import prepare
from lota.demo.small_model import SmallModelConfig
from lota.demo.world import EARLIER_TEMPLATES, NEW_TEMPLATES, WorldConfig, fill
from lota.evaluate.answer_loss import AnswerScore, score_answers
from lota.packaged import CONFIGS
from lota.ticket import Ticket

CONFIG_PATH = CONFIGS / "demo.yaml"
MARKER = ".lota-demo"
# Each method's learning rate is the best of an equal sweep (benchmarks/demo_rates.py); lota's is in the config file.
FULL_LEARNING_RATE = 1e-3
NUM_RANKS = 2


@dataclass(frozen=True)
class Outcome:
    """A model of the demo on both tasks, and what became of the base's bits."""

    new: AnswerScore
    earlier: AnswerScore
    num_changed: int
    num_changed_outside: int


def demo(output: Path) -> None:
    """All of it; `output` is emptied first where it holds an earlier demo."""
    output = output.resolve()
    started = time.monotonic()
    disable_progress_bar()
    _empty(output)

    torch.set_num_threads(1)  # tensors this small gain nothing from more, and lose much on a busy machine
    folder = prepare(WorldConfig(), SmallModelConfig(), say)
    for method, options in {"full": ["--learning_rate", str(FULL_LEARNING_RATE)], "lota": []}.items():
        say(f"{method}: fine-tuning on the new task, {NUM_RANKS} ranks")
        train(folder, output / method, ["--method", method, *options])
    say("scoring base, full fine-tuning and ticket on both tasks")
    summary = json.loads((output / "lota" / "summary.json").read_text(encoding="utf-8"))
    print(report(compare(folder, output), summary, folder / "model", output, time.monotonic() - started))


def say(text: str) -> None:
    print(f"[demo] {text}", flush=True)


def train(folder: Path, output: Path, options: list[str]) -> None:
    """Run train_lota.py on the demo's data; its own lines are shown, everything it prints is in output.log."""
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(NUM_RANKS)),
        *("--master_port", str(_free_port()), "--module", "lota.train", "--config", str(CONFIG_PATH)),
        *("--model_name_or_path", str(folder / "model"), "--train_file", str(folder / "train.jsonl")),
        *("--eval_file", str(folder / "test.jsonl"), "--output_dir", str(output), *options),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log_path = output.with_suffix(".log")
    with open(log_path, "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            if "[lota]" in line:
                print("  " + line[line.index("[lota]") :], end="", flush=True)
    if process.wait() != 0:
        tail = "".join(log_path.read_text(encoding="utf-8").splitlines(keepends=True)[-40:])
        raise SystemExit(f"{tail}\n[demo] training failed; all of its output is in {log_path}")


def compare(folder: Path, output: Path) -> dict[str, Outcome]:
    """Score base, full fine-tuning and ticket; count bits that moved; apply the ticket live and take it out again."""
    base_path = folder / "model"
    tokenizer = AutoTokenizer.from_pretrained(base_path)
    new = fill(NEW_TEMPLATES, read_jsonl(folder / "test.jsonl"))
    earlier = fill(EARLIER_TEMPLATES, read_jsonl(folder / "earlier_test.jsonl"))
    ticket = Ticket.load(output / "lota" / "ticket")

    outcomes = {}
    for name, path in {"base": base_path, "full": output / "full" / "merged"}.items():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        changed = changed_entries(base_path, path)
        outcomes[name] = Outcome(
            score_answers(model, tokenizer, new), score_answers(model, tokenizer, earlier), _count(changed), 0
        )
    model = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    applied = apply_(model, ticket)
    changed = changed_entries(base_path, output / "lota" / "merged")
    outside = sum(
        int((moved & ~ticket.mask.dense(name)).sum() if name in ticket.names else moved.sum())
        for name, moved in changed.items()
    )
    outcomes["lota"] = Outcome(
        score_answers(model, tokenizer, new), score_answers(model, tokenizer, earlier), _count(changed), outside
    )
    applied.revert()
    if not all(torch.equal(_bits(tensor), _bits(before[name])) for name, tensor in model.state_dict().items()):
        raise SystemExit("[demo] taking the ticket out did not restore the base: please report this")
    return outcomes


def changed_entries(base: Path, tuned: Path) -> dict[str, Tensor]:
    """Per tensor of two checkpoint folders of one file each: which entries differ in any bit (bool, in its shape)."""
    with (
        safe_open(base / "model.safetensors", framework="pt") as old,
        safe_open(tuned / "model.safetensors", framework="pt") as new,
    ):
        return {name: _bits(old.get_tensor(name)) != _bits(new.get_tensor(name)) for name in sorted(old.keys())}


def report(outcomes: dict[str, Outcome], summary: dict[str, Any], base: Path, output: Path, seconds: float) -> str:
    """The closing table."""
    mask, training, ticket = summary["mask"], summary["training"]["report"], summary["ticket"]
    held, held_dense = (sum(training[key].values()) for key in ("bytes_held", "bytes_held_dense"))
    sent, sent_dense = (training[key] / max(training["reductions"], 1) for key in ("bytes_sent", "bytes_sent_dense"))
    model_bytes = (base / "model.safetensors").stat().st_size
    columns = [outcomes[name] for name in ("base", "full", "lota")]

    def row(label: str, *cells: str) -> str:
        return f"  {label:<40}" + "".join(f"{cell:>18}" for cell in cells)

    rule = "  " + "-" * (40 + 3 * 18)
    lines = [
        "",
        row("", "base", "full fine-tuning", f"LoTA at {mask['density_asked']:.0%}"),
        rule,
        row("new task (reformed Vokar), exact match", *(f"{outcome.new.exact:.1%}" for outcome in columns)),
        row("  answer loss, nats per token", *(f"{outcome.new.loss:.3f}" for outcome in columns)),
        row("earlier task (Selan), exact match", *(f"{outcome.earlier.exact:.1%}" for outcome in columns)),
        row("  answer loss, nats per token", *(f"{outcome.earlier.loss:.3f}" for outcome in columns)),
        rule,
        row("weights that changed", "0", *(f"{outcome.num_changed:,}" for outcome in columns[1:])),
        row("  of them outside the ticket's mask", "", "", f"{columns[2].num_changed_outside:,}"),
        row("to store", "", _size(model_bytes), _size(ticket["bytes"])),
        row("held per rank for model states", "", _size(held_dense), _size(held)),
        row("gradient bytes sent per rank and step", "", _size(sent_dense), _size(sent)),
        rule,
        f"  density asked {mask['density_asked']:g}, reached {mask['density']:.7f}: "
        f"{mask['num_active']:,} of {mask['eligible']:,} eligible weights",
        f"  {ticket['num_changed']:,} of the {ticket['num_active']:,} trained weights really changed "
        f"({ticket['num_changed'] / ticket['num_active']:.1%}); bfloat16 swallows the smallest moves",
        "  applied to the live model and taken out again: every bit of the base is back",
        f"  the ticket: {output / 'lota' / 'ticket'}",
        f"  {seconds:.0f} s in all, of which calibration {summary['seconds']['calibration']:.0f} s and sparse training "
        f"{summary['seconds']['training']:.0f} s",
    ]
    return "\n".join(lines)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def _count(changed: dict[str, Tensor]) -> int:
    return sum(int(moved.sum()) for moved in changed.values())


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.2f} MiB"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _empty(output: Path) -> None:
    """Make room: only a folder that a demo made is ever removed."""
    if output.exists() and any(output.iterdir()):
        if not (output / MARKER).exists():
            raise SystemExit(f"[demo] {output} holds something that is not a demo: choose another --output_dir")
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).touch()
