"""Mutated files of every kind that we read: each is read in bounded time and memory, or refused in one line.

    python -m tests.soak_inputs [--number 20000] [--seed 0] [--kind KIND]

Files are cut, overwritten, swapped for pipes, links and folders, and their JSON is changed: other types, absurd
numbers, deep nesting, missing and strange keys; where a file is signed, it is signed again. Anything but success,
ValueError or OSError is a defect, as is a hang, growth, or a file that was written elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lota.cli import main as cli
from lota.data.dataset import load
from lota.data.options import plan_data
from lota.evaluate.results import Scoreboard
from lota.run import checkpoint_manifest
from lota.run.batch import Batch
from lota.run.options import LotaArguments, parse
from lota.ticket import Mask
from lota.zero.checkpoint import state_codec, vectors

SECONDS = 20
MEMORY_BYTES = 3 << 30
NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 7, 1 << 31, 1 << 62, 1 << 63, 1 << 64, 10**30, -(10**18), 0.5, -0.0, 1e308, True, False, 100_000,
)  # fmt: skip
TEXTS = ("", "a", "../x", "/etc/passwd", "\x00", "\x1b[2J", "é" * 50, "x" * 5000, "t.safetensors", "bfloat16", "NaN")


class Hung(BaseException):
    pass


def change(value: Any, random_: random.Random) -> Any:
    """JSON with one thing in it changed."""
    if isinstance(value, dict) and value and random_.random() < 0.85:
        made = dict(value)
        key = random_.choice(list(made))
        kind = random_.random()
        if kind < 0.08:
            del made[key]
        elif kind < 0.14:
            made[random_.choice(TEXTS)] = made[key]
        elif kind < 0.2:
            made[key + random_.choice("x .\x00")] = made.pop(key)
        else:
            made[key] = change(made[key], random_)
        return made
    if isinstance(value, list) and value and random_.random() < 0.85:
        made_list = list(value)
        place = random_.randrange(len(made_list))
        kind = random_.random()
        if kind < 0.1:
            del made_list[place]
        elif kind < 0.2:
            made_list.append(made_list[place])
        else:
            made_list[place] = change(made_list[place], random_)
        return made_list
    choices: list[Callable[[], Any]] = [
        lambda: random_.choice(NUMBERS),
        lambda: random_.choice(TEXTS),
        lambda: None,
        list,
        dict,
        lambda: [value, value],
        lambda: {"a": value},
        lambda: _deep(random_.choice((20, 300, 3000)), random_.random() < 0.5),
    ]
    if isinstance(value, str) and value:
        choices += [lambda: value[:-1], lambda: value + "0", lambda: value.upper(), lambda: value[::-1]]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        choices += [lambda: value + 1, lambda: -value, lambda: value * 1000, lambda: str(value)] * 2
    return random_.choice(choices)()


def _deep(levels: int, is_list: bool) -> Any:
    made: Any = 1
    for _ in range(levels):
        made = [made] if is_list else {"k": made}
    return made


def damage(path: Path, random_: random.Random) -> None:
    """Change a file's bytes, or put something else in its place."""
    data = path.read_bytes()
    kind = random_.random()
    if kind < 0.3:
        path.write_bytes(data[: random_.randrange(len(data) + 1)])
    elif kind < 0.7:
        changed = bytearray(data)
        for _ in range(random_.choice((1, 1, 3, 20))):
            if changed:
                changed[random_.randrange(len(changed))] = random_.randrange(256)
        path.write_bytes(bytes(changed))
    elif kind < 0.8:
        place = random_.randrange(len(data) + 1)
        path.write_bytes(data[:place] + random_.randbytes(random_.choice((1, 8, 400))) + data[place:])
    else:
        path.unlink()
        if kind < 0.84:
            os.mkfifo(path)
        elif kind < 0.88:
            path.mkdir()
        elif kind < 0.92:
            path.symlink_to(path.name)
        elif kind < 0.96:
            path.symlink_to("/dev/zero")


def change_json(path: Path, random_: random.Random, sign: Callable[[Any], str] = json.dumps) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    for _ in range(random_.choice((1, 1, 1, 2, 4))):
        content = change(content, random_)
    with contextlib.suppress(RecursionError, TypeError, AttributeError, ValueError):
        path.write_text(sign(content), encoding="utf-8", errors="surrogatepass")


def sign_ticket(content: Any) -> str:
    """ticket.json: a line with the sha256 of all that follows it."""
    body = json.dumps({key: value for key, value in content.items() if key != "sha256"})[1:] + "\n"
    return '{"sha256": "' + hashlib.sha256(body.encode()).hexdigest() + '",\n' + body


def sign_body(content: Any) -> str:
    content = {key: value for key, value in content.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return json.dumps({**content, "sha256": hashlib.sha256(text.encode()).hexdigest()})


def change_header(path: Path, random_: random.Random) -> None:
    """The JSON header of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.dumps(change(json.loads(data[8 : 8 + length]), random_)).encode()
    except (RecursionError, TypeError):
        return
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


class World:
    """Sound files of every kind, and what reads them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base, self.ticket, self.tuned = folder / "base", folder / "ticket", folder / "tuned"
        self._make_model()
        self._make_checkpoint()
        (folder / "rows.jsonl").write_text(
            "\n".join(json.dumps({"prompt": f"p{n}", "completion": f"c{n}"}) for n in range(4)) + "\n"
        )
        (folder / "table.csv").write_text("prompt,completion\np,c\np,d\n")
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        (folder / "talk.json").write_text(json.dumps([{"messages": talk, "tools": [{"name": "t"}]}] * 3))
        (folder / "run.yaml").write_text("output_dir: x\nlearning_rate: 1.0e-4\nmixture:\n- train_file: a.jsonl\n")
        board = Scoreboard(folder / "results.json", {"a": 1}, {"lota": "1"})
        board.put("base", {"digests": [], "rows": {"loss": 1.0}, "tasks": {"t": {"t": {"acc": 1.0}}}, "seconds": {}})
        self.kinds: dict[str, tuple[Path, Callable[[Path, random.Random], None], Callable[[Path], Any]]] = {
            "ticket.json": (self.ticket / "ticket.json", self._signed(sign_ticket), self._read_ticket),
            "ticket.safetensors": (self.ticket / "ticket.safetensors", self._header, self._read_ticket),
            "config.json": (self.base / "config.json", self._signed(json.dumps), self._read_base),
            "tuned config.json": (self.tuned / "config.json", self._signed(json.dumps), self._read_tuned),
            "index.json": (self.base / "model.safetensors.index.json", self._signed(json.dumps), self._read_base),
            "weights": (next(self.base.glob("model-00001*")), self._header, self._read_base),
            "checkpoint.json": (folder / "step" / "checkpoint.json", self._signed(sign_body), self._read_checkpoint),
            "state": (folder / "step" / "state-00001-of-00001.safetensors", self._header, self._read_checkpoint),
            "contents.json": (folder / "run" / "contents.json", self._signed(sign_body), self._read_contents),
            "results.json": (folder / "results.json", self._signed(json.dumps), self._read_results),
            "rows.jsonl": (folder / "rows.jsonl", self._rows, self._read_rows),
            "table.csv": (folder / "table.csv", damage, self._read_rows),
            "talk.json": (folder / "talk.json", self._signed(json.dumps), self._read_rows),
            "run.yaml": (folder / "run.yaml", damage, self._read_yaml),
        }

    def _make_model(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).to(torch.bfloat16)
        model.save_pretrained(self.base, max_shard_size="2KB")
        from tests.delivery.architecture_table import make_ticket

        make_ticket(model, [name for name, _ in model.named_parameters() if "proj" in name]).save(self.ticket)
        assert cli(["apply", "--base", str(self.base), str(self.ticket), "--out", str(self.tuned)]) == 0

    def _make_checkpoint(self) -> None:
        step = self.folder / "step"
        step.mkdir()
        held = [vectors.Vector.of("w.master", 0, torch.arange(5, dtype=torch.float32))]
        record = {"name": "state-00001-of-00001.safetensors", "vectors": {}}
        record["vectors"] = vectors._write_vectors(step / str(record["name"]), held)
        group = state_codec.encode_group({"lr": 0.1, "betas": (0.9, 0.999), "params": []})
        vectors._write_manifest(
            step / "checkpoint.json",
            {
                "identity": {"kind": "sparse training", "base": {"w": "bfloat16 0"}, "global_batch": 2},
                "progress": {
                    "counters": {"global_steps": 3},
                    "param_groups": [group],
                    "loss_scaler": {"cur_scale": 1.0},
                    "lr_scheduler": state_codec.encode({"last_epoch": 3, "base_lrs": [0.1]}),
                },
                "client_state": state_codec.encode({"x": torch.ones(2)}),
                "numbers": {"steps": [3]},
                "files": [record],
            },
        )
        run = self.folder / "run"
        run.mkdir()
        (run / "a.bin").write_bytes(b"abc")
        checkpoint_manifest.write(run, Batch(1, 1, 1), [checkpoint_manifest.list_files(run)])

    def _signed(self, sign: Callable[[Any], str]) -> Callable[[Path, random.Random], None]:
        def apply(path: Path, random_: random.Random) -> None:
            if random_.random() < 0.75:
                change_json(path, random_, sign)
            else:
                damage(path, random_)

        return apply

    def _header(self, path: Path, random_: random.Random) -> None:
        (change_header if random_.random() < 0.6 else damage)(path, random_)

    def _rows(self, path: Path, random_: random.Random) -> None:
        if random_.random() < 0.4:
            damage(path, random_)
            return
        lines = path.read_text().splitlines()
        place = random_.randrange(len(lines))
        with contextlib.suppress(RecursionError, TypeError):
            lines[place] = json.dumps(change(json.loads(lines[place]), random_))
        path.write_text("\n".join(lines) + "\n", errors="surrogatepass")

    def _command(self, *words: object) -> None:
        error = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
            status = cli([str(word) for word in words])
        last = error.getvalue().strip().splitlines()
        if status not in (0, 2) or (status == 2 and not last[-1].startswith("lota: ")):
            raise AssertionError(f"status {status}: {last[-1:]}")

    def _read_ticket(self, _: Path) -> None:
        self._command("inspect", self.ticket)
        self._command("inspect", self.ticket, "--verify", "--json")
        self._command("apply", "--base", self.base, self.ticket, "--out", self.folder / "out")
        Mask.load(self.ticket)

    def _read_base(self, _: Path) -> None:
        self._command("plan", self.base)
        self._command("apply", "--base", self.base, self.ticket, "--out", self.folder / "out")

    def _read_tuned(self, _: Path) -> None:
        self._command("revert", "--tuned", self.tuned, self.ticket, "--out", self.folder / "out")

    def _read_checkpoint(self, path: Path) -> None:
        stored = vectors.Stored(path.parent)
        stored.verify(0, 1)
        from lota.files import naming_odd
        from lota.zero.checkpoint.progress import check_same

        check_same(stored.facts["identity"], {"kind": "sparse training", "base": {}, "global_batch": 2}, path.parent)
        with naming_odd("checkpoint"):
            state_codec.decode(stored.facts["client_state"])

    def _read_contents(self, path: Path) -> None:
        checkpoint_manifest.verify(path.parent)

    def _read_results(self, path: Path) -> None:
        board = Scoreboard(path, {"a": 1}, {})
        if "base" in board.models:
            board.entry("base", [])
            board.table(["base"])

    def _read_rows(self, path: Path) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            load(plan_data(LotaArguments(train_file=[str(path)])))

    def _read_yaml(self, path: Path) -> None:
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                plan_data(parse(["--config", str(path)])[0])
            except SystemExit as error:  # argparse's own way
                assert error.code == 2


def run(number: int, seed: int, only: str | None = None, progress: bool = False) -> Counter[str]:
    """How many mutations of each kind were read ("ok") or refused. AssertionError, with the seed, for anything else."""
    counts: Counter[str] = Counter()
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        inside = Path(name) / "inside"
        inside.mkdir()
        world = World(inside)
        kinds = [only] if only else list(world.kinds)
        before = {path: path.stat().st_mtime_ns for path in Path(name).rglob("*") if path.is_file()}
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.signal(signal.SIGALRM, _hung)
        for case in range(number):
            kind = kinds[case % len(kinds)]
            path, mutate, read = world.kinds[kind]
            kept = path.read_bytes()
            random_ = random.Random(f"{seed} {case}")
            try:
                mutate(path, random_)
                signal.alarm(SECONDS)
                read(path)
                outcome = "ok"
            except (ValueError, OSError) as error:
                outcome = "refused"
                if not 0 < len(str(error)) < 5000:
                    failures[f"{kind}: a message of {len(str(error))} characters"] = f"seed {seed}, case {case}"
            except (Exception, Hung) as error:  # noqa: BLE001 (counted as failures)
                frame = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(frame.filename).name}:{frame.lineno}"
                failures[f"{kind}: {type(error).__name__} at {where}"] = f"seed {seed}, case {case}: {error!s:.150}"
                outcome = "FAILED"
            finally:
                signal.alarm(0)
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                path.unlink(missing_ok=True)
                path.write_bytes(kept)
                shutil.rmtree(inside / "out", ignore_errors=True)
            counts[f"{kind}: {outcome}"] += 1
            if progress and (case + 1) % 500 == 0:
                grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held
                print(f"{case + 1} of {number}, {grown / 1024:.0f} MiB more than at the start", flush=True)
        after = {path for path in Path(name).rglob("*") if path.is_file()}
        assert after == before.keys(), f"files appeared or went: {sorted(after ^ before.keys())[:4]}"
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held
        assert grown * 1024 < MEMORY_BYTES, f"{grown / 1024:.0f} MiB more than at the start"
    assert not failures, "\n".join(f"{what} ({example})" for what, example in failures.items())
    return counts


def _hung(*_: Any) -> None:
    raise Hung(f"longer than {SECONDS} s")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--number", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    for line, count in sorted(run(args.number, args.seed, args.kind, progress=True).items()):
        print(f"{line:40}{count:8}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
