"""The options that say which rows a run learns from: one data set, or a mixture of several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

from lota.messages import did_you_mean

FORMS = {
    "prompt": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
    "preference": ("prompt", "chosen", "rejected"),
    "question": ("prompt",),
}
"""The columns of every form of data. What a row is made of: a field of the same name, `X_field`, or `X_template`."""

TASKS = {"examples": ("prompt", "messages", "text"), "preferences": ("preference",), "prompts": ("question",)}
"""What a run learns from, and the forms that its rows may have. To prompts the model writes the answers itself."""

COLUMNS = tuple(dict.fromkeys(column for columns in FORMS.values() for column in columns))


@dataclass
class Source:
    """One data set: where its rows are, and what of a row is learnt. The options of the recipes have the same names."""

    train_file: list[str] | None = field(
        default=None, metadata={"help": "Local .jsonl, .json, .csv or .parquet files; patterns such as 'data/*.jsonl'."}
    )
    eval_file: list[str] | None = field(
        default=None, metadata={"help": "Local files for the answer loss, same fields."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the hub, instead of train_file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration name."})
    train_split: str = field(default="train", metadata={"help": "Split of dataset_name to train on."})
    eval_split: str | None = field(default=None, metadata={"help": "Split of dataset_name for the answer loss."})

    prompt_field: str | None = field(default=None, metadata={"help": "Field that is the prompt (prompt)."})
    prompt_template: str | None = field(
        default=None, metadata={"help": "Instead of prompt_field: text with {field} names, '{{' for a brace."}
    )
    completion_field: str | None = field(default=None, metadata={"help": "Field that is the answer (completion)."})
    completion_template: str | None = field(default=None, metadata={"help": "The same, instead of completion_field."})
    messages_field: str | None = field(default=None, metadata={"help": "Field with a conversation (messages)."})
    text_field: str | None = field(default=None, metadata={"help": "Field that is plain text to learn whole (text)."})
    text_template: str | None = field(default=None, metadata={"help": "The same, instead of text_field."})
    chosen_field: str | None = field(default=None, metadata={"help": "Preferences: field of the better answer."})
    chosen_template: str | None = field(default=None, metadata={"help": "The same, instead of chosen_field."})
    rejected_field: str | None = field(default=None, metadata={"help": "Preferences: field of the worse answer."})
    rejected_template: str | None = field(default=None, metadata={"help": "The same, instead of rejected_field."})
    skip_empty: bool = field(
        default=False,
        metadata={"help": "Leave out rows that lack a column (null, NaN, no text), instead of refusing them."},
    )
    as_chat: bool = field(
        default=False,
        metadata={"help": "Make prompt and answer a user's and an assistant's turn, under the chat template."},
    )

    def __post_init__(self) -> None:
        for name in ("train_file", "eval_file"):
            value = getattr(self, name)
            if isinstance(value, str):
                setattr(self, name, [value])

    def describe(self) -> str:
        """Its name in messages and records."""
        if self.train_file is not None:
            return ", ".join(self.train_file)
        config = f"/{self.dataset_config}" if self.dataset_config else ""
        return f"{self.dataset_name}{config} ({self.train_split})"


@dataclass
class DataArguments(Source):
    """The options of one data set, or a mixture, and where the evaluation rows come from."""

    mixture: list[Any] | str | None = field(
        default=None,
        metadata={"help": "List of data sets, each with these options and a weight. In the config file, or as YAML."},
    )
    mixture_rows: int | None = field(
        default=None, metadata={"help": "Rows of an epoch (the most that the weights allow without repeating a row)."}
    )
    eval_rows: int | None = field(default=None, metadata={"help": "Evaluation rows to take out of the training rows."})
    eval_fraction: float | None = field(default=None, metadata={"help": "The same, as a fraction of them."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.mixture, str):
            import yaml  # late: these options are declared, for --help, where only the core is installed

            self.mixture = yaml.safe_load(self.mixture)


@dataclass(frozen=True)
class Part:
    """One source of a run, and its weight in the mixture; None where no weights are given and all rows are taken."""

    source: Source
    weight: float | None = None


@dataclass(frozen=True)
class DataPlan:
    """Which rows a run learns from, settled: its sources, and how evaluation rows and an epoch are taken from them."""

    parts: tuple[Part, ...]
    is_mixture: bool
    mixture_rows: int | None
    eval_rows: int | None
    eval_fraction: float | None

    def describe(self) -> str | list[dict[str, Any]]:
        """The training data's names (and weights), for a ticket's provenance."""
        if not self.is_mixture:
            return self.parts[0].source.describe()
        return [{"data": part.source.describe(), "weight": part.weight} for part in self.parts]


def plan_data(args: DataArguments) -> DataPlan:
    """The options, parsed and checked. ValueError where they contradict each other or would be ignored."""
    found = _parts(args)
    _check_evaluation(args, [part.source for part in found])
    return DataPlan(tuple(found), args.mixture is not None, args.mixture_rows, args.eval_rows, args.eval_fraction)


def _parts(args: DataArguments) -> list[Part]:
    if args.mixture is None:
        if args.mixture_rows is not None:
            raise ValueError("mixture_rows is the size of an epoch of a mixture: give a mixture, or remove it")
        source = Source(**{entry.name: getattr(args, entry.name) for entry in fields(Source)})
        _check_source(source, "")
        return [Part(source)]
    given = [entry.name for entry in fields(Source) if getattr(args, entry.name) != entry.default]
    if given:
        raise ValueError(
            f"with a mixture, every entry has options of its own: move {', '.join(given)} into its entries"
        )
    if not isinstance(args.mixture, list) or not args.mixture:
        raise ValueError(f"mixture must be a list of data sets, got {args.mixture!r}")
    found = [_part(entry, f"mixture, entry {number}") for number, entry in enumerate(args.mixture, start=1)]
    weighted = [part.weight is not None for part in found]
    if any(weighted) and not all(weighted):
        raise ValueError(
            f"mixture, entry {weighted.index(False) + 1} has no weight: give every entry one, or none to take all rows"
        )
    if args.mixture_rows is not None:
        if not any(weighted):
            raise ValueError("mixture_rows needs a weight for every entry of the mixture")
        if args.mixture_rows < 1:
            raise ValueError(f"mixture_rows must be at least 1, got {args.mixture_rows}")
    return found


def _part(entry: Any, where: str) -> Part:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must hold options such as train_file and weight, got {entry!r}")
    known = [option.name for option in fields(Source)]
    for name in entry:
        if name not in (*known, "weight"):
            raise ValueError(f"{where}: unknown option {name!r}" + did_you_mean(name, [*known, "weight"]))
    weight = entry.get("weight")
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if weight is not None and not (is_number and math.isfinite(weight) and weight > 0):
        raise ValueError(f"{where}: weight must be above 0, got {weight!r}; to leave a data set out, remove its entry")
    kinds = {name: str(kind) for name, kind in get_type_hints(Source).items()}
    source = Source(**{n: _typed(n, value, kinds[n], where) for n, value in entry.items() if n != "weight"})
    _check_source(source, f"{where}: ")
    return Part(source, None if weight is None else float(weight))


def _typed(name: str, value: Any, kind: str, where: str) -> Any:
    """An entry's value as the same option of the top level would be read."""
    if kind == str(bool):
        words = {"true": True, "false": False, "yes": True, "no": False}
        known = value if isinstance(value, bool) else words.get(str(value).lower())
        if known is None:
            raise ValueError(f"{where}: {name} must be true or false, got {value!r}")
        return known
    if value is None and "None" in kind:
        return None
    if kind.startswith("list"):
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not items or not all(isinstance(item, str) for item in items):
            raise ValueError(f"{where}: {name} must be a path or a list of paths, got {value!r}")
        return items
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be text, got {value!r}: put it in quotes")
    return value


def _check_source(source: Source, where: str) -> None:
    if (source.train_file is None) == (source.dataset_name is None):
        raise ValueError(f"{where}give either train_file (local files) or dataset_name (on the hub)")
    if source.train_file is not None and source.eval_split is not None:
        raise ValueError(f"{where}eval_split belongs to dataset_name; with train_file give eval_file")
    if source.train_file is not None and source.dataset_config is not None:
        raise ValueError(f"{where}dataset_config belongs to dataset_name, and train_file is given: remove it")
    if source.eval_file is not None and source.eval_split is not None:
        raise ValueError(f"{where}give eval_file or eval_split, not both")
    for column in COLUMNS:
        name, template = getattr(source, f"{column}_field"), getattr(source, f"{column}_template", None)
        if name is not None and template is not None:
            raise ValueError(f"{where}give {column}_field or {column}_template, not both")
    asked = asked_columns(source)
    if not any(set(asked) <= set(columns) for columns in FORMS.values()):
        raise ValueError(
            f"{where}options for {', '.join(asked)} cannot stand together: a row is prompt and completion, or "
            "messages, or text, or prompt, chosen and rejected"
        )
    if source.as_chat and {"messages", "text"} & set(asked):
        raise ValueError(f"{where}as_chat is for prompt and completion, not for {asked[0]}: remove it")


def asked_columns(source: Source) -> list[str]:
    """The columns for which the source names a field or a template."""
    return [
        column
        for column in COLUMNS
        if getattr(source, f"{column}_field") is not None or getattr(source, f"{column}_template", None) is not None
    ]


def _check_evaluation(args: DataArguments, sources: Sequence[Source]) -> None:
    if args.eval_rows is not None and args.eval_fraction is not None:
        raise ValueError("give eval_rows or eval_fraction, not both")
    taken = "eval_rows" if args.eval_rows is not None else "eval_fraction"
    is_taken = args.eval_rows is not None or args.eval_fraction is not None
    if is_taken and any(source.eval_file or source.eval_split for source in sources):
        raise ValueError(f"{taken} takes the evaluation rows out of the training rows: remove it, or the eval set")
    if args.eval_rows is not None and args.eval_rows < 1:
        raise ValueError(f"eval_rows must be at least 1, got {args.eval_rows}")
    if args.eval_fraction is not None and not 0 < args.eval_fraction < 1:
        raise ValueError(f"eval_fraction must be in (0, 1), got {args.eval_fraction}")


@dataclass
class SourceArguments(DataArguments):
    """Data and model, the options that training and evaluation share."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Base model: a folder or a name on the hub."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the hub."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
