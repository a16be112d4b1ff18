"""Tasks of real text: local files, with what of a row is the prompt and what the answer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lota.data.dataset import read_jsonl

Row = dict[str, str]


@dataclass(frozen=True)
class TextTask:
    """Two .jsonl files of rows of the same fields, and the templates of prompt and answer."""

    train: str
    test: str
    prompt: str
    completion: str


KNOWN = {
    "math": TextTask("gsm8k_train.jsonl", "gsm8k_test.jsonl", "Question: {question}\nAnswer:", " {answer}"),
    "sql": TextTask("sql_train.jsonl", "sql_test.jsonl", "{context}\nQuestion: {question}\nSQL:", " {answer}"),
    "reasoning": TextTask("commonsense_train.jsonl", "commonsense_test.jsonl", "{instruction}\n", "{output}"),
    "summary": TextTask("summary_train.jsonl", "summary_test.jsonl", "{dialogue}\nSummary:", " {summary}"),
    "instruct": TextTask("instruct_train.jsonl", "instruct_test.jsonl", "{prompt}\n", "{completion}"),
}


class Texts:
    """The tasks of a folder that holds files of KNOWN, or of a YAML file: `name: {train, test, prompt, completion}`,
    with paths relative to it.

    Half of a task's training rows, at most, are there to be learned; the texts of the others are for pretraining.
    ValueError where nothing is found.
    """

    def __init__(self, data: Path, seed: int = 0) -> None:
        self._seed = seed
        if data.is_dir():
            self._folder, self.tasks = data, {n: task for n, task in KNOWN.items() if (data / task.train).is_file()}
            if not self.tasks:
                names = ", ".join(task.train for task in KNOWN.values())
                raise ValueError(f"{data} holds none of {names}: give their folder, or a YAML file that names others")
            return
        content = yaml.safe_load(data.read_text(encoding="utf-8"))
        try:
            self._folder, self.tasks = data.parent, {name: TextTask(**entry) for name, entry in content.items()}
        except (AttributeError, TypeError) as error:
            raise ValueError(
                f"{data}: expected tasks, each with train, test, prompt and completion ({error})"
            ) from error

    def rows(self, task: str, part: str) -> Iterator[Row]:
        """Rows of `train` (every other row of its file, in a shuffled order) or `test`."""
        found = self.tasks[task]
        read = self._halves(task)[0] if part == "train" else self._shuffled(found.test)
        for row in read:
            yield {"prompt": found.prompt.format_map(row), "completion": found.completion.format_map(row)}

    def pretraining(self) -> list[str]:
        """The texts of all other rows: the fields that the templates name, a line each, without the templates."""
        texts = []
        for name, task in self.tasks.items():
            fields = [name for name in self._halves(name)[1][0] if f"{{{name}}}" in task.prompt + task.completion]
            texts += ["\n".join(str(row[field]) for field in fields) for row in self._halves(name)[1]]
        random.Random(f"{self._seed} pretraining").shuffle(texts)
        return texts

    def _halves(self, task: str) -> tuple[list[Any], list[Any]]:
        rows = self._shuffled(self.tasks[task].train)
        return rows[::2], rows[1::2]

    def _shuffled(self, file: str) -> list[Any]:
        rows = read_jsonl(self._folder / file)
        random.Random(f"{self._seed} {file}").shuffle(rows)
        return rows
