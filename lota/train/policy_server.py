"""A vLLM server that writes GRPO's answers in an environment of its own, and has the trainer's ticket at every step.

    before anything is loaded   it is there, is lota's, and gets its base back
    before the first step       it takes a ticket of the untrained values, which only a server of this base does
    after every step            it takes the ticket of that step, from a folder that both machines see
    before answers are asked    it still has that ticket: one that was started again has not
    now and then                its log-probabilities are compared with the trainer's own

Trainer and server share no process and no package but lota. The routes are OpenAI's completions, with vLLM's token ids,
and vLLM's weight transfer, which `lota.serve` drives.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from transformers import TrainerCallback

from lota.data.trained_tokens import IGNORED
from lota.ranks.agree import checked_together, from_rank_0, together
from lota.ranks.world import rank
from lota.run.folder import RunFolder
from lota.run.resolve import RunOptions, ServerOptions
from lota.serve import Server, status, switch

FOLDER = "served"
NUM_PROBES, PROBE_TOKENS = 2, 32
"""Prompts of each rank that are compared, and tokens of each answer."""


def connect(options: RunOptions) -> None:
    """ValueError or OSError on every rank where a rank does not reach the server, or it is not lota's. It has its base
    afterwards. Collective."""
    if options.server is None:
        return
    server = Server(options.server.url)
    with checked_together():
        _model_name(server)
    from_rank_0(lambda: switch(server, [], take_over=True))


def server_of(options: RunOptions, folder: RunFolder, run: Any = None) -> PolicyServer | None:
    """For one phase. run: the block's, whose ticket the server gets; None where the weights stay the base's."""
    return None if options.server is None else PolicyServer(options.server, folder.path / FOLDER, run)


class PolicyServer(TrainerCallback):
    """TRL's rollout function, and the callback that keeps the server at the trainer's step. All ranks have one."""

    def __init__(self, options: ServerOptions, folder: Path, run: Any) -> None:
        self._options, self._folder, self._run = options, folder, run
        self._server = Server(options.url)
        self._model: str | None = None
        self._ticket: Path | None = None
        self._next_check = 0
        self.differences: list[float] = []
        self.seconds: list[float] = []

    @property
    def facts(self) -> dict[str, Any]:
        """For the summary: how often it was compared and how far it was off at most; seconds of a step's update."""
        updates = self.seconds[1:] or self.seconds
        return {
            "url": self._options.url,
            "comparisons": len(self.differences),
            "largest_difference": max(self.differences, default=None),
            "updates": len(self.seconds),
            "seconds_an_update": round(sum(updates) / len(updates), 4) if updates else None,
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A server of another base refuses the ticket of this one, trained or not."""
        self._next_check = state.global_step
        self._update(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._update(state.global_step)

    def close(self) -> None:
        """Put the base back and remove the tickets. Collective."""
        if self._ticket is not None:
            from_rank_0(lambda: switch(self._server, []))
            if rank() == 0:
                shutil.rmtree(self._folder, ignore_errors=True)

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """An answer to each prompt, by the trainer's settings. Collective."""
        if trainer.state.global_step >= self._next_check:
            self._next_check = trainer.state.global_step + self._options.check_steps
            self._compare(prompts[:NUM_PROBES], trainer)
        ids = trainer.prompt_ids(prompts)
        settings = {
            "max_tokens": trainer.max_completion_length,
            "temperature": trainer.temperature,
            "top_p": trainer.top_p,
            "top_k": trainer.top_k,
            "min_p": trainer.min_p or 0.0,
            "repetition_penalty": trainer.repetition_penalty,
        }
        with together():
            answers, logprobs = self._ask(ids, trainer, settings)
        return {"prompt_ids": ids, "completion_ids": answers, "logprobs": logprobs}

    def _update(self, step: int) -> None:
        """Give the server the ticket of this step. A new folder each time: a file system may show an old one's files
        for a while. Collective."""
        if self._run is None:
            return
        started = time.perf_counter()
        before, path = self._ticket, self._folder / f"step-{step}"
        if rank() == 0:
            self._folder.mkdir(exist_ok=True)
        self._run.save_ticket(path, overwrite=True)
        from_rank_0(lambda: switch(self._server, [str(path.resolve())]))
        self._ticket = path
        if rank() == 0 and before is not None and before != path:
            shutil.rmtree(before, ignore_errors=True)
        self.seconds.append(time.perf_counter() - started)

    def _check_ticket(self) -> None:
        """The server has what it was given: it may have been started again, or switched by someone else."""
        wanted = () if self._ticket is None else (str(self._ticket.resolve()),)
        found = status(self._server)
        if found.tickets != wanted:
            held = found.version if found.tickets is None else ", ".join(found.tickets) or "its base"
            raise ValueError(
                f"{self._options.url} has {held}, and this run gave it {', '.join(wanted) or 'its base'}: it was "
                "started again, or something else switches it. Resume the run once the server is its own"
            )

    def _ask(
        self, ids: list[list[int]], trainer: Any, settings: dict[str, Any]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Token ids and log-probabilities of one answer to each prompt."""
        self._check_ticket()
        if self._model is None:
            self._model = _model_name(self._server)
        body = {
            "model": self._model,
            "prompt": ids,
            "logprobs": 0,
            "return_token_ids": True,
            "stop_token_ids": trainer.eos_token_ids,
            **settings,
        }
        choices = sorted(self._server.post("v1/completions", body)["choices"], key=lambda choice: choice["index"])
        if len(choices) != len(ids):
            raise ValueError(f"{self._options.url} gave {len(choices)} answers to {len(ids)} prompts")
        return [c["token_ids"] for c in choices], [c["logprobs"]["token_logprobs"] for c in choices]

    def _compare(self, prompts: list[Any], trainer: Any) -> None:
        """ValueError where server and trainer do not give the same answers the same log-probabilities. Collective.

        Drawn at the trainer's temperature and without any cut: at 1, raw and processed log-probabilities are the same.
        """
        ids = trainer.prompt_ids(prompts)
        tokens = min(PROBE_TOKENS, trainer.max_completion_length)
        settings = {"max_tokens": tokens, "temperature": trainer.temperature}
        with together():
            answers, theirs = self._ask(ids, trainer, settings)
        own = _log_probabilities(trainer.deepspeed, ids, answers)
        given = torch.tensor([value for row in theirs for value in row], dtype=torch.float64, device=own.device)
        sums = torch.stack([(own - given).abs().sum(), own.sum(), given.sum(), torch.ones_like(own).sum()])
        dist.all_reduce(sums)
        difference, ours, servers = (float(value / sums[3]) for value in sums[:3])
        self.differences.append(difference)
        if not difference <= self._options.tolerance:
            raise ValueError(
                f"{self._options.url} is not the model that is trained: of {int(sums[3])} tokens its mean "
                f"log-probability is {servers:.4f} and the trainer's {ours:.4f}, {difference:.4f} nats a token apart "
                f"(server_tolerance {self._options.tolerance:g}). Does it serve this base, in this dtype"
                + ("?" if trainer.temperature == 1 else ", with --logprobs-mode processed_logprobs?")
            )


@torch.no_grad()
def _log_probabilities(engine: Any, prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
    """float64, of all tokens of all answers, one after another, by the trainer's own model. Collective."""
    device = torch.device(get_accelerator().current_device_name())
    rows = [prompt + answer for prompt, answer in zip(prompts, answers)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.int64, device=device)
    lengths = torch.tensor([*map(len, rows)], dtype=torch.int64, device=device)
    mask = (torch.arange(longest, device=device) < lengths[:, None]).long()
    labels = torch.full_like(ids, IGNORED)
    for number, (prompt, answer) in enumerate(zip(prompts, answers)):
        ours = slice(len(prompt), len(prompt) + len(answer))
        labels[number, ours] = ids[number, ours]
    was_training = engine.module.training
    engine.module.eval()
    try:
        # As TRL calls it: ZeRO-3 fetches ahead by the order of the call before, which logits would end differently.
        found = engine(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs
    finally:
        engine.module.train(was_training)
    return found[labels[:, 1:] != IGNORED].double()


def _model_name(server: Server) -> str:
    return str(server.get("v1/models")["data"][0]["id"])
