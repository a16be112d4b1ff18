"""A real vLLM server answers as transformers does with exactly the tickets that were switched to, and its base returns.

Served in fp32 (the weights are bf16), so that greedy tokens can be compared: they must be equal, and logprobs within
1e-3, for sums in different orders. In bf16 two kernels differ by tenths, and near ties fall either way.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lota.cli import main
from lota.delivery.apply import apply_to_checkpoint
from lota.serve import Refused, Server, Unreachable, status, switch
from lota.ticket import Ticket
from tests.serve.servers import (
    ROOT,
    VLLM_PYTHON,
    ask,
    checksums,
    environment,
    has_vllm,
    logprobs_of,
    make_base,
    make_ticket,
    memory_mib,
    serving,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_vllm(), reason=f"needs vLLM in {VLLM_PYTHON} (make test-vllm)"),
]
TOLERANCE = 1e-3
PROMPTS = torch.randint(4, 128, (16, 9), generator=torch.Generator().manual_seed(3)).tolist()
STATES = ("", "A", "B", "AB")
KINDS = {"in_place": (False, True), "packed": (False, False), "packed_tied": (True, False)}
"""Whether the head is tied to the embeddings, and whether weights are computed with as they are."""


class Models:
    """A base, its tickets and what transformers answers with each; all made once."""

    def __init__(self, folder: Path, is_tied: bool) -> None:
        self.base, self.folder = folder / "base", folder
        model = make_base(self.base, is_tied=is_tied)
        make_ticket(model, 1, folder / "A", 0)
        make_ticket(model, 2, folder / "B", 1)
        make_ticket(make_base(folder / "other", seed=1, is_tied=is_tied), 1, folder / "wrong")
        self.references = {names: self._reference(names) for names in STATES}
        self.answers = {names: self._greedy(model) for names, model in self.references.items()}

    def paths(self, names: str) -> list[str]:
        return [str(self.folder / name) for name in names]

    def _reference(self, names: str) -> Any:
        from transformers import AutoModelForCausalLM

        source = self.base
        if names:
            source = self.folder / f"applied-{names}"
            apply_to_checkpoint(self.base, [Ticket.load(path) for path in self.paths(names)], source)
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()

    @staticmethod
    def _greedy(model: Any) -> list[list[int]]:
        tokens = model.generate(
            torch.tensor(PROMPTS), do_sample=False, max_new_tokens=16, min_new_tokens=16, eos_token_id=None
        )
        return tokens[:, len(PROMPTS[0]) :].tolist()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Models]:
    return {is_tied: Models(tmp_path_factory.mktemp("models"), is_tied) for is_tied in (False, True)}


@pytest.fixture(scope="module", params=KINDS)
def served(
    request: pytest.FixtureRequest, made: dict[bool, Models], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Models, Server, int, Path]]:
    is_tied, is_plain = KINDS[request.param]
    models, log = made[is_tied], tmp_path_factory.mktemp("log") / "server.log"
    with serving(models.base, 18811, log, "--dtype", "float32", is_plain=is_plain) as (server, process):
        yield models, server, process.pid, log
        assert ("entries, in place" in log.read_text()) is is_plain


def check_answers(models: Models, server: Server, names: str) -> None:
    """The server's tokens are the reference's, and their logprobs."""
    for prompt, wanted, (tokens, logprobs) in zip(PROMPTS, models.answers[names], ask(server, PROMPTS), strict=True):
        assert tokens == wanted
        expected, _ = logprobs_of(models.references[names], prompt, tokens)
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=TOLERANCE, rtol=0)


Served = tuple[Models, Server, int, Path]


def test_the_states_can_be_told_apart(made: dict[bool, Models]) -> None:
    for models in made.values():
        for one, other in itertools.combinations(STATES, 2):
            pairs = zip(models.answers[one], models.answers[other], strict=True)
            assert all(first != second for first, second in pairs)


def test_answers_of_every_state_and_the_base_again(served: Served) -> None:
    models, server, _, _ = served
    check_answers(models, server, "")
    before = checksums(server)
    for names in ("A", "B", "AB", "A", ""):
        switch(server, models.paths(names))
        check_answers(models, server, names)
        assert status(server).tickets == tuple(models.paths(names))
        assert (checksums(server) == before) is (names == "")


def test_a_wrong_base_is_refused_and_the_server_unharmed(served: Served) -> None:
    models, server, _, _ = served
    switch(server, models.paths("A"))
    before = checksums(server)
    for tickets, words in [
        ([models.folder / "wrong"], "belongs to another base model"),
        ([models.folder / "A", models.folder / "wrong"], "belongs to another base model"),
        ([models.folder / "nothing"], "finds no ticket there"),
    ]:
        with pytest.raises(Refused, match=words):
            switch(server, [str(ticket) for ticket in tickets])
        assert checksums(server) == before and not status(server).is_paused
        assert status(server).tickets == tuple(models.paths("A"))
    check_answers(models, server, "A")
    switch(server, [])
    check_answers(models, server, "")


def test_no_answer_is_made_by_two_models(served: Served) -> None:
    """Four clients ask while the server switches twelve times; every answer is wholly the base's or the ticket's."""
    models, server, _, _ = served
    wrong: list[str] = []
    counts = {"": 0, "A": 0}
    is_over = threading.Event()

    def client(number: int) -> None:
        for turn in itertools.count(number):
            if is_over.is_set():
                return
            prompt = turn % len(PROMPTS)
            (tokens, _), *_ = ask(server, [PROMPTS[prompt]])
            by = [names for names in counts if models.answers[names][prompt] == tokens]
            if not by:
                wrong.append(f"{prompt}: {tokens}")
            for names in by:
                counts[names] += 1

    clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in clients:
        thread.start()
    for names in ["A", ""] * 6:
        switch(server, models.paths(names))
        (tokens, _), *_ = ask(server, [PROMPTS[5]])
        assert tokens == models.answers[names][5]  # asked after the switch, while the others ask
    is_over.set()
    for thread in clients:
        thread.join()
    assert not wrong and min(counts.values()) > 0, (wrong[:3], counts)


def test_a_hundred_switches_take_no_memory(served: Served) -> None:
    models, server, pid, _ = served
    sizes = []
    for number in range(101):
        switch(server, models.paths(("A", "B", "AB", "")[number % 4]))
        if number in (20, 100):
            sizes.append(memory_mib(pid))
    assert sizes[1] - sizes[0] < 48, sizes  # the model is 10 MiB in fp32: 80 of them would be 800
    check_answers(models, server, "A")


def test_an_update_that_was_left_open_is_taken_over(served: Served) -> None:
    models, server, _, _ = served
    server.start()
    server.update({"step": "prepare", "tickets": models.paths("B")})
    server.pause()
    assert status(server).is_paused
    with pytest.raises(Refused, match="--take-over"):
        switch(server, models.paths("A"))
    switch(server, models.paths("A"), take_over=True)
    check_answers(models, server, "A")


def test_the_command(served: Served, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    models, server, _, _ = served
    monkeypatch.chdir(models.folder)
    assert main(["serve", server.url, "A", "B", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tickets"] == models.paths("AB")
    assert main(["serve", server.url]) == 0
    assert f"{models.folder / 'A'}, {models.folder / 'B'}" in capsys.readouterr().out
    assert main(["serve", server.url, "wrong"]) == 2
    assert "belongs to another base model" in capsys.readouterr().err
    assert main(["serve", server.url, "A", "A"]) == 2
    assert "every ticket once" in capsys.readouterr().err
    assert main(["serve", server.url, "--base"]) == 0
    assert "the base" in capsys.readouterr().out
    check_answers(models, server, "")


def test_the_recipe_asks_each_ticket_for_its_rows(served: Served, tmp_path: Path) -> None:
    models, server, _, _ = served
    rows = [
        {"ticket": str(models.folder / name) if name else None, "prompt": prompt}
        for prompt in PROMPTS[:4]
        for name in ("A", "", "B")
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    command = [sys.executable, str(ROOT / "recipes" / "ask_tickets.py"), server.url, str(tmp_path / "rows.jsonl")]
    subprocess.run([*command, str(tmp_path / "answers.jsonl"), "--max-tokens", "16"], check=True, cwd=ROOT)
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    for number, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        tokens = models.answers[("A", "", "B")[number % 3]][PROMPTS.index(row["prompt"])]
        words = [f"w{token - 4}" for token in tokens if token > 3]
        assert answer["prompt"] == row["prompt"] and answer["answer"].split() == words[: len(answer["answer"].split())]
    assert status(server).tickets == ()


def test_bf16_is_what_a_server_of_the_applied_folder_answers(made: dict[bool, Models], tmp_path: Path) -> None:
    """Same kernels, same weights, one request at a time: the same bits."""
    models = made[False]
    with serving(models.base, 18812, tmp_path / "log", "--dtype", "bfloat16") as (server, _):
        switch(server, models.paths("AB"))
        answers = [ask(server, [prompt]) for prompt in PROMPTS]
    with serving(models.folder / "applied-AB", 18812, tmp_path / "log", "--dtype", "bfloat16") as (server, _):
        assert [ask(server, [prompt]) for prompt in PROMPTS] == answers


@pytest.mark.parametrize("is_plain", [True, False])
def test_two_tensor_parallel_ranks(made: dict[bool, Models], tmp_path: Path, is_plain: bool) -> None:
    models, log = made[False], tmp_path / "log"
    options = ["--dtype", "float32", "--tensor-parallel-size", "2"]
    with serving(models.base, 18813, log, *options, is_plain=is_plain) as (server, _):
        before = checksums(server)
        for names in ("A", "AB", "B", ""):
            switch(server, models.paths(names))
            check_answers(models, server, names)
        assert checksums(server) == before
        with pytest.raises(Refused, match="belongs to another base model"):
            switch(server, [str(models.folder / "wrong")])
        check_answers(models, server, "")
    assert ("entries, in place" in log.read_text()) is is_plain


def test_a_model_in_the_same_process(made: dict[bool, Models], tmp_path: Path) -> None:
    models = made[False]
    states = ["A", "AB", "", "wrong", "B"]
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    paths = [[str(models.folder / "wrong")] if names == "wrong" else models.paths(names) for names in states]
    (tmp_path / "states.json").write_text(json.dumps(paths))
    command = [str(VLLM_PYTHON), str(ROOT / "tests" / "serve" / "offline.py"), str(models.base)]
    command += [str(tmp_path / "prompts.json"), str(tmp_path / "states.json")]
    ended = subprocess.run(command, env=environment(is_plain=False), capture_output=True, text=True, check=False)
    line = next((line for line in ended.stdout.splitlines() if line.startswith("ANSWERS ")), None)
    assert line is not None, ended.stderr[-3000:]
    for names, answers in zip(states, json.loads(line.removeprefix("ANSWERS ")), strict=True):
        if names == "wrong":
            assert "belongs to another base model" in answers
        else:
            assert answers == models.answers[names]


def test_a_server_without_the_backend(made: dict[bool, Models], tmp_path: Path, capsys: Any) -> None:
    models = made[False]
    with serving(models.base, 18814, tmp_path / "log", backend=None) as (server, _):
        assert main(["serve", server.url, *models.paths("A")]) == 2
        assert "no backend that switches tickets" in capsys.readouterr().err
        assert not status(server).is_paused
        ask(server, PROMPTS[:1])


def test_a_server_that_dies_in_an_update(made: dict[bool, Models], tmp_path: Path) -> None:
    """Killed at a random moment of many switches: the client reports that it ended."""
    models = made[False]
    with serving(models.base, 18815, tmp_path / "log") as (server, process):
        found: list[Exception] = []

        def client() -> None:
            try:
                for number in itertools.count():
                    switch(server, models.paths("AB"[number % 2]))
            except Exception as error:  # noqa: BLE001 (this is what is tested)
                found.append(error)

        thread = threading.Thread(target=client)
        thread.start()
        time.sleep(2)
        os.killpg(process.pid, signal.SIGKILL)
        thread.join(60)
        assert isinstance(found[0], Unreachable) and "it ended" in str(found[0])
        assert main(["serve", server.url]) == 2
