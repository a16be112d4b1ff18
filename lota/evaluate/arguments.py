"""The options of an evaluation, declared without torch, for `--help`, completion and docs/options.md."""

from __future__ import annotations

from dataclasses import dataclass, field

from lota.data.options import SourceArguments


@dataclass
class EvaluateArguments(SourceArguments):
    """What to score, on what, by which metrics. The data options are those of the training recipes."""

    tickets: list[str] | None = field(default=None, metadata={"help": "Tickets to score, each alone."})
    together: bool = field(default=False, metadata={"help": "All tickets at once instead; they must share no entry."})
    no_base: bool = field(default=False, metadata={"help": "Leave the base itself out."})
    metrics: list[str] = field(
        default_factory=list, metadata={"help": "For the rows: loss, exact, number, rouge (default: loss)."}
    )
    tasks: list[str] = field(default_factory=list, metadata={"help": "Tasks of lm-eval."})
    output: str = field(default="results.json", metadata={"help": "Results file; an existing one is continued."})
    predictions: str | None = field(default=None, metadata={"help": "Folder for the models' answers, one .jsonl each."})
    dtype: str = field(default="auto", metadata={"help": "auto: that of the tickets' base, or of the checkpoint."})
    device_map: str | None = field(default=None, metadata={"help": "auto spreads a model over this process's GPUs."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the Python code in the model's folder."}
    )
    batch_size: int = field(default=8, metadata={"help": "Rows in one forward pass."})
    limit: int | None = field(default=None, metadata={"help": "Only the first rows of the data and of every task."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer to generate, in tokens."})
    temperature: float = field(default=0.0, metadata={"help": "0 decodes greedily, a larger value samples."})
    stop: list[str] | None = field(default=None, metadata={"help": "Texts that end an answer, beside the end token."})
    # The Trainer's default, so that rows set aside by it are the same ones.
    seed: int = field(default=42, metadata={"help": "For rows set aside, sampling, lm-eval's choice of examples."})
    num_fewshot: int | None = field(default=None, metadata={"help": "Examples in a task's prompt (the task's own)."})
    apply_chat_template: bool = field(default=False, metadata={"help": "Put tasks' prompts into the chat template."})
    chat_template_path: str | None = field(
        default=None, metadata={"help": "A .jinja file in place of the tokenizer's chat template, as in training."}
    )
    tasks_path: str | None = field(default=None, metadata={"help": "Folder with task files of your own for lm-eval."})
