"""Real vLLM servers on this machine's CPUs, in vLLM's own environment, and what transformers answers for comparison."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lota.serve import Server, Unreachable
from lota.ticket import BaseTensor, Mask, Ticket, fingerprint, to_hex

ROOT = Path(__file__).resolve().parents[2]
VLLM_PYTHON = Path(os.environ.get("LOTA_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
BACKEND = '{"backend": "lota"}'
_START_SECONDS = 600


def make_base(folder: Path, seed: int = 0, *, is_tied: bool = False) -> Any:
    """A random Llama of 2.4M weights whose answers differ from prompt to prompt, with a word tokenizer; the model."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(124))])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,
        tie_word_embeddings=is_tied,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model.save_pretrained(folder)
    return model


def make_ticket(model: Any, seed: int, folder: Path, parity: int | None = None) -> Ticket:
    """Random values for 2.5% of all matrices, embeddings and head too. parity: of the flat positions: tickets of 0 and
    1 share none."""
    generator = torch.Generator().manual_seed(seed)
    masks, values, before = {}, {}, {}
    identities = {
        name: BaseTensor(str(weight.dtype).removeprefix("torch."), to_hex(fingerprint(weight.detach().flatten())))
        for name, weight in model.named_parameters()
    }
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            chosen = torch.rand(weight.shape, generator=generator) < 0.05
            if parity is not None:
                chosen.view(-1)[1 - parity :: 2] = False
            masks[name], before[name] = chosen, weight.detach()[chosen]
            noise = 0.1 * torch.randn(before[name].shape, generator=generator)
            values[name] = (before[name].float() + noise).to(weight.dtype)
    frozen = {name: identity for name, identity in identities.items() if name not in masks}
    mask = Mask.from_dense(masks).with_base({name: identities[name] for name in masks}, frozen)
    ticket = Ticket(mask, values, before)
    ticket.save(folder, overwrite=True)
    return ticket


def environment(*, is_plain: bool) -> dict[str, str]:
    """Of a process with vLLM. is_plain: see `serving`."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "serve" / "plain_cpu")] * is_plain + [str(ROOT)]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_SERVER_DEV_MODE": "1",
    }


@contextmanager
def serving(
    model: Path, port: int, log: Path, *options: str, backend: str | None = BACKEND, is_plain: bool = False
) -> Iterator[tuple[Server, subprocess.Popen[bytes]]]:
    """A server of `model`, which it calls `base`. is_plain: linear layers compute with their weights as they are, as on
    GPUs, instead of with packed copies (a plugin, see `plain_cpu`)."""
    command = [str(VLLM_PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--port", str(port)]
    command += ["--host", "127.0.0.1", "--max-model-len", "128", "--max-num-seqs", "16"]
    command += ["--enforce-eager", "--served-model-name", "base", *options]
    command += ["--weight-transfer-config", backend] if backend else []
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, env=environment(is_plain=is_plain), stdout=output, stderr=output, start_new_session=True
        )
        server = Server(f"http://127.0.0.1:{port}", timeout=300)
        try:
            _wait(server, process, log)
            yield server, process
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()


def _wait(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            server.get("v1/models")
            return
        except (Unreachable, ValueError):
            time.sleep(1)
    raise AssertionError(f"the server did not start:\n{log.read_text(errors='replace')[-4000:]}")


def ask(server: Server, prompts: Sequence[Sequence[int]], num_tokens: int = 16) -> list[tuple[list[int], list[float]]]:
    """Greedy token ids and their logprobs, for every prompt of token ids."""
    body = {"model": "base", "prompt": [list(prompt) for prompt in prompts], "max_tokens": num_tokens}
    body |= {"temperature": 0, "logprobs": 0, "return_token_ids": True, "ignore_eos": True}
    choices = sorted(server.post("v1/completions", body)["choices"], key=lambda choice: choice["index"])
    return [(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices]


@torch.no_grad()
def logprobs_of(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """After a prompt, transformers' logprobs of the answer's tokens `[n]`, and of the likeliest ones `[n]`."""
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].float()
    logprobs = torch.log_softmax(logits, -1)
    return logprobs.gather(1, torch.tensor(answer)[:, None])[:, 0], logprobs.max(1).values


def checksums(server: Server) -> dict[str, str]:
    """vLLM's own sums of every parameter of every rank."""
    return dict(server.post("weight_checker", {"action": "checksum"})["checksums"])


def memory_mib(pid: int) -> float:
    """Resident memory of a server, all of its processes."""
    import psutil

    parent = psutil.Process(pid)
    return sum(each.memory_info().rss for each in [parent, *parent.children(recursive=True)]) / 2**20


def has_vllm() -> bool:
    return VLLM_PYTHON.exists()
