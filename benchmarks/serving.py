"""Seconds of a switch of a served model on this machine: a vLLM server, a random Llama, tickets of 1% of its matrices.

    LOTA_VLLM_PYTHON=.venv-vllm/bin/python OMP_NUM_THREADS=1 python -m benchmarks.serving --folder /tmp/serving

Prepared: reading and verifying, while requests are not paused. Paused: from the pause to the answer to the resume.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from lota.serve import Server, switch
from lota.ticket import BaseTensor, Mask, Ticket, fingerprint, to_hex
from tests.serve.servers import serving


def make_base(folder: Path, hidden: int, layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    return model


def make_ticket(model: Any, seed: int, density: float, folder: Path) -> int:
    generator = torch.Generator().manual_seed(seed)
    tensors, base, values, before, frozen = {}, {}, {}, {}, {}
    for name, parameter in model.named_parameters():
        flat = parameter.detach().view(-1)
        identity = BaseTensor("bfloat16", to_hex(fingerprint(flat)))
        if "_proj" not in name:
            frozen[name] = identity
            continue
        where = torch.randint(flat.numel(), (int(flat.numel() * density),), generator=generator).unique()
        tensors[name], base[name], before[name] = (tuple(parameter.shape), where), identity, flat[where]
        values[name] = (before[name].float() + 1e-3 * torch.randn(where.shape, generator=generator)).bfloat16()
    ticket = Ticket(Mask.from_indices(tensors, base).with_base(base, frozen), values, before)
    ticket.save(folder, overwrite=True)
    return ticket.num_active


def measure(server: Server, what: str, tickets: list[list[str]]) -> None:
    found = [switch(server, wanted) for wanted in tickets]
    prepared, paused = (
        statistics.median(times)
        for times in zip(*((s.prepare_seconds or 0.0, s.pause_seconds or 0.0) for s in found), strict=True)
    )
    print(f"  {what:34} prepared {prepared:7.3f} s   paused {paused:7.3f} s", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--port", type=int, default=18820)
    args = parser.parse_args(argv)
    base, a, b = (args.folder / name for name in ("base", "a", "b"))
    model = make_base(base, args.hidden, args.layers)
    num_active = [make_ticket(model, seed, args.density, folder) for seed, folder in ((1, a), (2, b))]
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    print(f"{num_weights / 1e6:,.0f}M weights in bf16, {num_active[0]:,} entries a ticket; torch {torch.__version__}")
    del model
    for is_plain in (True, False):
        print("in place" if is_plain else "by loading again (weights packed)")
        options = ["--dtype", "bfloat16", "--skip-tokenizer-init"]
        with serving(base, args.port, args.folder / "server.log", *options, is_plain=is_plain) as (server, _):
            measure(server, "a ticket for the first time", [[str(a)]])
            measure(server, "another for the first time", [[str(b)]])
            measure(server, "between the two", [[str(a)], [str(b)]] * args.rounds)
            measure(server, "off", [[]])
            measure(server, "the base on the base", [[]] * args.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
