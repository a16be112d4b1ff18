"""The configuration of a sequence: a YAML file and the command line become frozen values, before anything runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from lota import choices
from lota.messages import did_you_mean
from lota.run.options import LotaArguments, RecipeConfig, YamlParser, names_on_command_line, refuse_unknown
from lota.sequence.arguments import OF_A_TASK, SequenceArguments

CONFIG_NAME = "config.yaml"
BASE = "base"
"""What the stage before the first task is called, so no task may be."""
Options = dict[str, Any]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_OWN = tuple(entry.name for entry in fields(SequenceArguments))
_OF_ALL = (
    *("output_dir", "method", "model_name_or_path", "model_revision", "trust_remote_code", "attn_implementation"),
    *("bf16", "fp16", "env"),
)
"""What all tasks have in common: they share one model."""
_SET_HERE = {
    "tickets": "a sequence puts its own earlier tickets on the base; apply others to the base first",
    "overlap": "a task whose entries may be those of earlier ones has disjoint: false",
    "keep_importance": "a sequence keeps what later tasks are pulled to",
}
_DENSE = (
    "dense trains tensors whole, so that no later task could have entries of its own there; include chooses among them"
)


@dataclass(frozen=True)
class Task:
    """One task. options: of `lota train`, those of all tasks included. pull: the option of that name, where it is
    given (0: none); it goes to the run only where there is something to be pulled to."""

    name: str
    options: Options
    disjoint: bool
    retain_earlier: bool
    pull: float | None

    @property
    def keeps_old(self) -> bool:
        """Whether the run is pulled to what earlier tasks need."""
        return bool(self.pull) and self.retain_earlier


@dataclass(frozen=True)
class SequenceConfig:
    """A sequence as it was asked for. words: the options of the command line, which stand in the tasks' too. content:
    all of it, as config.yaml in the folder of the sequence holds it."""

    output_dir: Path
    method: str
    tasks: tuple[Task, ...]
    eval_rows_limit: int
    keep_models: bool
    words: tuple[str, ...]
    content: Mapping[str, Any]

    @property
    def is_sparse(self) -> bool:
        """Whether every task becomes a ticket."""
        return self.method == "lota"


def read(argv: Sequence[str]) -> SequenceConfig:
    """`CONFIG [--option value ...]`, where CONFIG is a YAML file or the folder of a sequence; also `--config CONFIG`.

    Options on the command line hold for all tasks and win. ValueError for what cannot be meant.
    """
    path, words = _config_path(argv)
    content = _read_yaml(path / CONFIG_NAME if path.is_dir() else path)
    _refuse_unknown_keys(content)
    if "tasks" in names_on_command_line(words):
        raise ValueError("tasks is a list, which only the file can hold: remove --tasks")
    given = _typed(words)
    content = {name: value for name, value in content.items() if name not in given} | given
    content["tasks"] = [{key: value for key, value in task.items() if key not in given} for task in content["tasks"]]
    if path.is_dir() and "output_dir" not in given:
        content["output_dir"] = str(path)
    # A run resumes by itself here, so that the option of the other jobs changes nothing.
    resume = str(content.pop("resume_from_checkpoint", None)).lower()
    if resume not in ("none", "true", "false", ""):
        raise ValueError(
            f"resume_from_checkpoint: a sequence resumes from the newest checkpoint by itself, got {resume}: remove it"
        )
    return _settle(content, given, tuple(words))


def folder_named(argv: Sequence[str]) -> Path:
    """The folder of the sequence that a command line names, by itself or by its configuration."""
    path, words = _config_path(argv)
    if words:
        raise ValueError(f"expected nothing but the sequence, got {' '.join(words)!r:.80}")
    if path.is_dir():
        return path
    folder = _read_yaml(path).get("output_dir")
    if not folder:
        raise ValueError(f"{path} names no output_dir: give the folder of the sequence instead")
    return Path(str(folder))


def _config_path(argv: Sequence[str]) -> tuple[Path, list[str]]:
    """The configuration that is named, and the words without it."""
    words = [word for word in argv if not word.startswith("--local_rank")]  # DeepSpeed's launcher adds it
    if words and not words[0].startswith("-"):
        named, words = words[0], words[1:]
    elif "--config" in words:
        place = words.index("--config")
        named = "".join(words[place + 1 : place + 2])
        del words[place : place + 2]
    else:
        named = ""
    if not named or not Path(named).exists():
        raise ValueError(f"name the sequence's YAML file, or its folder: expected one that exists, got {named!r}")
    return Path(named), words


def _read_yaml(path: Path) -> Options:
    if not path.is_file():
        raise ValueError(f"{path.parent} is no folder of a sequence: it has no {path.name}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} must hold options with their values (a YAML mapping)")
    return content


def _parser() -> tuple[Any, set[str]]:
    """TRL's parser for all options that there are, and their names."""
    parser = YamlParser((SequenceArguments, LotaArguments, RecipeConfig))
    return parser, {name.removeprefix("--") for action in parser._actions for name in action.option_strings}


def _refuse_unknown_keys(content: Options) -> None:
    _, known = _parser()
    refuse_unknown(list(content), known | {"env"})
    tasks = content.get("tasks")
    if not isinstance(tasks, list) or not tasks:
        raise ValueError(f"tasks must be a list of tasks, each with a name and its options, got {tasks!r:.80}")
    for number, task in enumerate(tasks, start=1):
        if not isinstance(task, dict) or not all(isinstance(key, str) for key in task):
            raise ValueError(f"tasks, entry {number} must hold a name and options, got {task!r:.80}")
        where = f"task {task.get('name', number)}"
        of_all = (*_OF_ALL, *(name for name in _OWN if name not in OF_A_TASK))
        for name in task:
            if name == "resume_from_checkpoint":
                raise ValueError(f"{where}: a sequence resumes by itself: remove resume_from_checkpoint")
            if name in of_all:
                raise ValueError(f"{where}: {name} is the same for all tasks: move it out of the task")
            if name not in known | {"name"}:
                raise ValueError(f"{where}: unknown option {name!r}" + did_you_mean(name, known))


def _typed(words: Sequence[str]) -> Options:
    """The options of a command line, of the types that they have in a file."""
    if not words:
        return {}
    parser, known = _parser()
    names = names_on_command_line(words)
    refuse_unknown(names, known)
    namespace, rest = parser.parse_known_args(list(words))
    if rest:
        raise ValueError(f"expected options as --name value, got {' '.join(rest)!r:.80}")
    actions = {name: action.dest for action in parser._actions for name in action.option_strings}
    given = {actions[f"--{name}"]: getattr(namespace, actions[f"--{name}"]) for name in names}
    return {name: getattr(value, "value", value) for name, value in given.items()}


def _settle(content: Options, given: Options, words: tuple[str, ...]) -> SequenceConfig:
    if not content.get("output_dir"):
        raise ValueError("output_dir is missing: name a new folder for this sequence, such as --output_dir runs/mine")
    method = choices.check_choice("method", content.get("method", "lota"), choices.METHODS)
    idle = [name for name in given if name in (("keep_models",) if method == "lota" else (*OF_A_TASK, "pull"))]
    if idle:
        raise ValueError(f"method: {method} does not use {', '.join(idle)}: remove it")
    limit = content.get("eval_rows_limit", 256)
    if type(limit) is not int or limit < 1:
        raise ValueError(f"eval_rows_limit must be an integer of at least 1, got {limit!r}")
    common = {name: value for name, value in content.items() if name not in (*_OWN, "output_dir")}
    common["method"] = method
    tasks: list[Task] = []
    for number, entry in enumerate(content["tasks"], start=1):
        name = _check_name(entry.get("name"), number, [task.name for task in tasks])
        own = {key: value for key, value in entry.items() if key != "name"}
        flags = {key: own.pop(key, content.get(key, True)) for key in OF_A_TASK}
        tasks.append(_task(name, common | own, flags))
    if method == "lota":
        _check_room(tasks)
    return SequenceConfig(
        Path(str(content["output_dir"])),
        method,
        tuple(tasks),
        limit,
        _flag("keep_models", content.get("keep_models", False)),
        words,
        content,
    )


def _task(name: str, options: Options, flags: Options) -> Task:
    for option, reason in _SET_HERE.items():
        if options.get(option):
            raise ValueError(f"task {name}: {option} would be overwritten: {reason}. Remove it")
    if options.get("ticket_form") == "packed":
        raise ValueError(
            f"task {name}: ticket_form: packed would be read beside its whole base, and later tasks begin on it: leave "
            "it out, and pack tickets afterwards (lota pack)"
        )
    if options.get("dense"):
        raise ValueError(f"task {name}: {_DENSE}. Remove it")
    options = dict(options)
    pull = options.pop("pull", None)
    if options["method"] != "lota":
        pull = None  # the rivals are trained as they are known
    number = _number(pull)
    if pull is not None and (number is None or number < 0):
        raise ValueError(f"task {name}: pull must be a number above 0 (or 0 for none), got {pull!r}")
    disjoint, retain_earlier = (_flag(key, flags[key]) for key in OF_A_TASK)
    return Task(name, options, disjoint, retain_earlier, number)


def _check_name(name: Any, number: int, before: Sequence[str]) -> str:
    if not isinstance(name, str):
        hint = (
            "give it a name" if name is None else f"expected text, got {name!r}, which YAML reads so: put it in quotes"
        )
        raise ValueError(f"tasks, entry {number}: name: {hint}")
    if not _NAME.fullmatch(name) or name == BASE:
        raise ValueError(
            f"tasks, entry {number}: name {name!r} cannot be a folder's: use letters, digits, '-', '_' and '.', and "
            f"not {BASE}"
        )
    if name in before:
        raise ValueError(f"tasks, entry {number}: there is a task {name} already: every task needs a name of its own")
    return name


def _check_room(tasks: Sequence[Task]) -> None:
    """ValueError where disjoint tasks ask for more than there is, found now and not after the tasks before."""
    total: dict[str, float] = {}
    for task in tasks:
        density = _number(task.options.get("density", choices.DENSITY))
        if not task.disjoint or task.options.get("mask") or density is None:
            continue
        among = str((task.options.get("include"), task.options.get("exclude")))
        total[among] = total.get(among, 0.0) + density
        if total[among] > 1 + 1e-9:
            raise ValueError(
                f"task {task.name}: disjoint tasks cannot have more than all weights, and up to here they ask for "
                f"{total[among]:g} of them: lower density, or let a task overlap (disjoint: false)"
            )


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


def _number(value: Any) -> float | None:
    """A number, also one that YAML 1.1 reads as text (1e-3); None where it is none."""
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
