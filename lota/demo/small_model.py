"""A small Llama and its SentencePiece tokenizer, made on the spot from lines of text, on one process.

    python lota/demo/small_model.py --text FILE.jsonl --fields question,answer --output_dir runs/small --steps 600

For the demo and for trying recipes where no model can be downloaded. What it makes is a transformers folder: bfloat16
weights, and a tokenizer whose ids are SentencePiece's own.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # recipes run from the checkout, under any launcher

import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from lota.data.sentencepiece_tokenizer import wrap_sentencepiece
from lota.evaluate.answer_loss import collate

UNKNOWN, BEGIN, END, PADDING = range(4)


@dataclass(frozen=True)
class SmallModelConfig:
    """Sizes and training of a small Llama. Two equal configurations on equal text give equal models."""

    vocab_size: int = 448
    hidden_size: int = 192
    num_layers: int = 4
    head_size: int = 32
    max_length: int = 128
    steps: int = 400
    batch_rows: int = 32
    learning_rate: float = 2e-3
    seed: int = 0


Row = tuple[list[int], int]
"""Token ids, and how many of them at the start are a prompt without loss."""


def train_tokenizer(lines: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-pair SentencePiece model of `lines`, as a transformers tokenizer that gives the same ids and adds <s>."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=file,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=UNKNOWN,
        bos_id=BEGIN,
        eos_id=END,
        pad_id=PADDING,
        pad_piece="<pad>",
        num_threads=1,
        minloglevel=2,
    )
    return wrap_sentencepiece(file.getvalue())


def pretrain(
    config: SmallModelConfig, vocab_size: int, batches: Iterable[Sequence[Row]], say: Callable[[str], None] = print
) -> LlamaForCausalLM:
    """Train a fresh Llama for config.steps on `batches`, in fp32 on this process; returned in bfloat16."""
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=3 * config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.hidden_size // config.head_size,
            max_position_embeddings=config.max_length,
            bos_token_id=BEGIN,
            eos_token_id=END,
            pad_token_id=PADDING,
        )
    )
    say(f"base model: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {config.steps} steps")
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 30) * max(0.05, 1 - step / config.steps)
    )
    started = time.monotonic()
    for step, rows in zip(range(1, config.steps + 1), batches):
        input_ids, labels = collate(rows, PADDING)
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == config.steps:
            say(f"base model: step {step}, loss {float(loss.detach()):.3f}, {time.monotonic() - started:.0f} s")
    return model.to(torch.bfloat16)


def save_atomically(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """A transformers folder at `path`, by one rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    temporary.mkdir(parents=True)
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if not path.exists():
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _main() -> None:
    from lota.data.dataset import read_jsonl

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", required=True, help=".jsonl files")
    parser.add_argument("--fields", required=True, help="comma-separated: their text, joined by a space")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch_rows", type=int, default=16)
    args = parser.parse_args()
    if args.output_dir.exists():
        raise ValueError(f"{args.output_dir} exists already: choose another folder, or remove it first")
    names = args.fields.split(",")
    lines = [" ".join(str(row[name]) for name in names) for path in args.text for row in read_jsonl(path)]
    config = SmallModelConfig(
        args.vocab_size, args.hidden_size, args.num_layers, max_length=args.max_length,
        steps=args.steps, batch_rows=args.batch_rows, learning_rate=1e-3,
    )  # fmt: skip
    random.Random(config.seed).shuffle(lines)
    tokenizer = train_tokenizer(lines[:20000], config.vocab_size)
    rows = [([*tokenizer(line)["input_ids"], END][: config.max_length], 0) for line in lines]
    count = config.batch_rows
    batches = ([rows[(step * count + k) % len(rows)] for k in range(count)] for step in range(config.steps))
    save_atomically(pretrain(config, len(tokenizer), batches), tokenizer, args.output_dir)
    print(f"small model in {args.output_dir}")


if __name__ == "__main__":
    _main()
