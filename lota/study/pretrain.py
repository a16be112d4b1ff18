"""A small Llama, pretrained on the spot from texts; stopped at any time, it resumes from its last save."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lota.demo.small_model import BEGIN, END, PADDING, save_atomically


@dataclass(frozen=True)
class BaseConfig:
    """Sizes and training of a base. Equal configurations on equal texts give equal bases, on one kind of machine."""

    vocab_size: int = 1024
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    max_length: int = 128
    steps: int = 1500
    batch_rows: int = 16
    learning_rate: float = 2e-3
    save_every: int = 250
    seed: int = 0

    @property
    def num_parameters(self) -> int:
        """About: matrices and embeddings."""
        layer = 4 * self.hidden_size**2 + 3 * self.hidden_size * self._intermediate
        return self.num_layers * layer + self.vocab_size * self.hidden_size

    @property
    def _intermediate(self) -> int:
        return self.hidden_size * 11 // 64 * 16

    def model(self, vocab_size: int) -> LlamaForCausalLM:
        """A fresh one."""
        torch.manual_seed(self.seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=self.hidden_size,
                intermediate_size=self._intermediate,
                num_hidden_layers=self.num_layers,
                num_attention_heads=self.num_heads,
                max_position_embeddings=self.max_length,
                tie_word_embeddings=True,
                bos_token_id=BEGIN,
                eos_token_id=END,
                pad_token_id=PADDING,
            )
        )


def pretrain(
    config: BaseConfig, tokenizer: Any, texts: Iterable[str], folder: Path, say: Callable[[str], None]
) -> float:
    """Write the base to `folder`/model; the mean loss of its last steps. Sequences are packed, every token counts.

    What is saved on the way stays in `folder` until the base is complete.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = device or torch.device("cpu")
    sequences = packed(tokenizer, texts, config.max_length)
    model = config.model(len(tokenizer)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    first = _load(folder / "partial.safetensors", model, optimizer)
    size = f"{model.num_parameters() / 1e6:.2f}M parameters, {len(sequences)} sequences"
    say(f"base: {size}, steps {first} to {config.steps}")
    losses: list[Tensor] = []
    started = time.monotonic()
    for step in range(first, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (step + 1) / 50) * max(0.02, 1 - step / config.steps)
        rows = torch.from_numpy(sequences[_chosen(len(sequences), step, config)].astype(np.int64)).to(device)
        with torch.autocast(device.type, torch.bfloat16) if device.type != "cpu" else nullcontext():
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().clone())  # the loss itself would keep the logits
        if (step + 1) % 100 == 0:
            mean = float(torch.stack(losses[-100:]).mean())
            say(f"base: step {step + 1}, loss {mean:.3f}, {time.monotonic() - started:.0f} s")
        if (step + 1) % config.save_every == 0 and step + 1 < config.steps:
            _save(folder / "partial.safetensors", model, optimizer, step + 1)
            say(f"base: step {step + 1} saved")
    shutil.rmtree(folder / "model", ignore_errors=True)
    save_atomically(model.cpu(), tokenizer, folder / "model")
    (folder / "partial.safetensors").unlink(missing_ok=True)
    return float(torch.stack(losses[-100:]).mean()) if losses else float("nan")


def packed(tokenizer: Any, texts: Iterable[str], length: int) -> np.ndarray:
    """All texts, each between its begin and end token, cut into rows of `length` ids (int32); the rest is left out."""
    ids: list[np.ndarray] = []
    part: list[str] = []

    def encode() -> None:
        ids.extend(np.array([*found, END], np.int32) for found in tokenizer(part)["input_ids"])
        part.clear()

    for text in texts:
        part.append(text)
        if len(part) == 2000:
            encode()
    if part:
        encode()
    flat = np.concatenate(ids)
    return flat[: len(flat) // length * length].reshape(-1, length)


def _chosen(count: int, step: int, config: BaseConfig) -> np.ndarray:
    """The rows of a step: every sequence once a round, in a new order each."""
    per_round = max(1, count // config.batch_rows)
    order = np.random.default_rng((config.seed, step // per_round)).permutation(count)
    at = step % per_round * config.batch_rows
    return order[at : at + config.batch_rows]


def _save(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Weights and moments, by one rename."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        tensors |= {
            name: parameter.detach(),
            f"exp_avg {name}": state["exp_avg"],
            f"exp_avg_sq {name}": state["exp_avg_sq"],
        }
    temporary = path.with_name(f".{path.name}.partial")
    save_file(tensors, temporary, metadata={"step": json.dumps(step)})
    temporary.replace(path)


def _load(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put back what was saved; the number of steps that were done."""
    if not path.is_file():
        return 0
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        step = int(json.loads(file.metadata()["step"]))
    tensors = load_file(path)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[name])
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step), dtype=torch.float32),
            "exp_avg": tensors[f"exp_avg {name}"].to(parameter.device),
            "exp_avg_sq": tensors[f"exp_avg_sq {name}"].to(parameter.device),
        }
    return step
