"""Score a base model and tickets on it, with one load of the model: local rows, and tasks of lm-eval.

Every ticket is assigned into the loaded model and taken out again bit for bit; results are written after every part.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from lota.architecture import read_config
from lota.data.tokenizer import load_tokenizer
from lota.delivery.base import check_base, check_numbers
from lota.evaluate.answer_loss import check_causal
from lota.evaluate.lm_eval_tasks import Harness
from lota.evaluate.metrics import check_references
from lota.evaluate.options import DTYPES, EvaluateArguments, decoding, parse, task_settings
from lota.evaluate.results import Scoreboard
from lota.evaluate.rows import evaluation_rows, reference
from lota.evaluate.scoring import RowSettings, Switch, check_fit, score_rows
from lota.ranks.process import watch_ranks
from lota.ranks.world import print_once, rank, world_size
from lota.run.folder import versions
from lota.ticket import Ticket
from lota.ticket.hub import local_directory


@dataclass(frozen=True)
class Candidate:
    """The base with some tickets on it; none: the base itself."""

    name: str
    tickets: tuple[Ticket, ...]
    digests: tuple[str, ...]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    _join_ranks()
    watch_ranks()
    check_base(str(args.model_name_or_path), args.model_revision, trust_remote_code=args.trust_remote_code)
    how = RowSettings(tuple(args.metrics), decoding(args), args.batch_size, args.predictions)
    rows = evaluation_rows(args, args.seed)[: args.limit] if args.metrics else []
    check_references(args.metrics, [reference(row) for row in rows])
    candidates = list_candidates(args)
    harness = Harness(args.tasks, task_settings(args)) if args.tasks else None
    args.dtype = weights_dtype(args, candidates)
    board = _open_board(args, rows)
    entries = {candidate.name: board.entry(candidate.name, candidate.digests) for candidate in candidates}

    def is_done(candidate: Candidate) -> bool:
        entry = entries[candidate.name]
        return (not rows or entry["rows"] is not None) and set(args.tasks) <= set(entry["tasks"])

    todo = [candidate for candidate in candidates if not is_done(candidate)]
    if len(todo) < len(candidates):
        print_once(f"{len(candidates) - len(todo)} of {len(candidates)} models are in {args.output} already")
    if todo:
        model, tokenizer = load(args)
        check_causal(model)
        check_fit(model, tokenizer, rows, args.max_new_tokens if how.writes else 0)
        with Switch(model) as switch:
            for candidate in candidates:  # a ticket of another base should not be found after hours
                switch.to(candidate.tickets)
            for candidate in todo:
                switch.to(candidate.tickets, verify=False)
                score(candidate, entries[candidate.name], model, tokenizer, rows, how, harness, board)
    if rank() == 0:
        print(board.table([candidate.name for candidate in candidates]), flush=True)
        print_once(f"results in {args.output}")


def score(
    candidate: Candidate,
    entry: dict[str, Any],
    model: Any,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    how: RowSettings,
    harness: Harness | None,
    board: Scoreboard,
) -> None:
    """Fill in what `entry` lacks, and write it after every part."""
    if rows and entry["rows"] is None:
        with _timed(entry, "rows"):
            entry["rows"] = score_rows(model, tokenizer, rows, how, candidate.name)
        _put(board, candidate, entry)
    if harness is None:
        return
    for task in harness.tasks:
        if task not in entry["tasks"]:
            print_once(f"{candidate.name}: {task}")
            with _timed(entry, task):
                entry["tasks"][task] = harness.run(task, model, tokenizer, how.batch_rows)
            _put(board, candidate, entry)


def list_candidates(args: EvaluateArguments) -> list[Candidate]:
    """The base, then the tickets: alone, or together. Opens every ticket; ValueError for what is none."""
    paths = args.tickets or []
    if len({os.path.realpath(path) for path in paths}) != len(paths):
        raise ValueError(f"tickets: expected every folder once, got {' '.join(paths)}")
    opened = [(path, Ticket.load(path), _digest(path)) for path in paths]
    candidates = [] if args.no_base else [Candidate("base", (), ())]
    if args.together:
        names, tickets, digests = zip(*opened, strict=True)
        return [*candidates, Candidate(" + ".join(names), tickets, digests)]
    return [*candidates, *(Candidate(path, (ticket,), (digest,)) for path, ticket, digest in opened)]


def weights_dtype(args: EvaluateArguments, candidates: Sequence[Candidate]) -> str:
    """What `auto` means: the dtype that the tickets expect, or the checkpoint's where there is no ticket."""
    if args.dtype != "auto":
        return args.dtype
    found = {base.dtype for c in candidates for ticket in c.tickets for base in ticket.mask.base.values()}
    if len(found) == 1:
        return found.pop()
    config = read_config(
        str(args.model_name_or_path), revision=args.model_revision, trust_remote_code=args.trust_remote_code
    )
    return str(config.dtype or torch.float32).removeprefix("torch.")


def load(args: EvaluateArguments) -> tuple[Any, Any]:
    """The base, on this process's accelerator where there is one."""
    model, loaded = AutoModelForCausalLM.from_pretrained(
        args.model_name_or_path,
        revision=args.model_revision,
        trust_remote_code=args.trust_remote_code,
        output_loading_info=True,
        attn_implementation=args.attn_implementation,
        dtype=DTYPES[args.dtype],
        device_map=args.device_map,
    )
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise ValueError(
            f"{args.model_name_or_path} does not hold {missing[0]}, which {type(model).__name__} has: transformers "
            "filled it with random numbers, so every run would give other scores. Take a base that has it"
        )
    check_numbers(model, str(args.model_name_or_path))
    if args.device_map is None and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        assert device is not None
        torch.accelerator.set_device_index(_local_rank())
        model.to(f"{device.type}:{_local_rank()}")
    size = f"{model.num_parameters() / 1e6:.1f}M parameters"
    print_once(f"{args.model_name_or_path}: {size}, {model.dtype}, {model.device}")
    tokenizer = load_tokenizer(str(args.model_name_or_path), args.model_revision, args.trust_remote_code)
    if args.chat_template_path is not None:
        tokenizer.chat_template = Path(args.chat_template_path).read_text(encoding="utf-8")
    return model.eval(), tokenizer


def _settings(args: EvaluateArguments, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What two entries of one results file must have in common. Batch sizes, tickets and tasks may differ."""
    names = ("model_name_or_path", "model_revision", "attn_implementation", "chat_template_path")
    settings: dict[str, Any] = {name: getattr(args, name) for name in names}
    settings |= {"dtype": args.dtype, "metrics": args.metrics, "decoding": asdict(decoding(args))}
    settings["tasks"] = asdict(task_settings(args))
    content = "\n".join(json.dumps(row, sort_keys=True) for row in rows)
    settings["rows"] = hashlib.sha256(content.encode()).hexdigest() if rows else None
    return {name: value for name, value in settings.items() if value is not None}


def _digest(ticket: str) -> str:
    """Identifies a ticket's contents: its manifest holds the sha256 of every tensor."""
    return hashlib.sha256((local_directory(ticket) / "ticket.json").read_bytes()).hexdigest()


def _eval_versions() -> dict[str, str]:
    found = {}
    for name in ("lm-eval", "rouge-score"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _join_ranks() -> None:
    """Join the processes of a launcher. Only objects travel, over the CPU, and a rank may be far ahead of another."""
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=2))


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _open_board(args: EvaluateArguments, rows: list[dict[str, Any]]) -> Scoreboard:
    """The results file as rank 0 finds it, on every rank: other nodes may not see it, and all must do the same."""
    found: list[Any] = [None]
    if rank() == 0:
        try:
            found = [Scoreboard(args.output, _settings(args, rows), versions() | _eval_versions())]
        except ValueError as error:
            found = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    if isinstance(found[0], ValueError):
        raise found[0]
    assert isinstance(found[0], Scoreboard)
    return found[0]


def _put(board: Scoreboard, candidate: Candidate, entry: dict[str, Any]) -> None:
    if rank() == 0:
        board.put(candidate.name, entry)


@contextmanager
def _timed(entry: dict[str, Any], name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    entry["seconds"][name] = round(time.monotonic() - started, 2)
