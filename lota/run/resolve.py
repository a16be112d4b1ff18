"""Options become the frozen settings of a run: every default filled in, every value checked, before anything runs."""

from __future__ import annotations

import copy
import importlib.util
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import yaml

from lota import choices
from lota.architecture import check_is_name
from lota.data.options import DataArguments, DataPlan, plan_data
from lota.kernels import using
from lota.messages import did_you_mean
from lota.ranks.world import world_size
from lota.retention import Importance
from lota.run import ds_config
from lota.run.batch import set_accumulation
from lota.run.options import (
    Config,
    LotaArguments,
    PolicyConfig,
    PreferenceConfig,
    keys_of_config,
    names_on_command_line,
)
from lota.ticket import Mask, Ticket
from lota.zero.compact.groups import check_shard_group_size


@dataclass(frozen=True)
class Calibration:
    """How the mask is found. learning_rate: of score task_vector, which takes optimizer steps; None for the others."""

    density: float
    budget: str
    score: str
    steps: int
    learning_rate: float | None
    protect: tuple[str, ...]
    protect_from: tuple[str, str, float] | None
    keep_ranking: bool
    include: list[str] | None
    exclude: list[str] | None


@dataclass(frozen=True)
class Keeping:
    """What earlier tasks are kept by. tickets: on the base when the run begins. retain: paths of tickets (or importance
    files), or rows. pull: None for none. importance_batches: from how many micro-batches an importance is collected,
    and fisher by whose answers (`choices.FISHERS`).
    keep_importance: whether this run leaves its own. kept: by name, rows to measure at the points `alphas` between old
    and new values, of which the largest within `forget_budget` (nats per token; None: 1) is delivered."""

    tickets: tuple[str, ...]
    overlap: bool
    retain: tuple[str | DataPlan, ...]
    pull: float | None
    keep_importance: bool
    importance_batches: int
    fisher: str
    kept: Mapping[str, DataPlan]
    alphas: tuple[float, ...]
    forget_budget: float | None


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, by PEFT's names."""

    r: int
    lora_alpha: int
    lora_dropout: float
    target_modules: tuple[str, ...]
    use_rslora: bool


@dataclass(frozen=True)
class ServerOptions:
    """A server that writes the answers: its address, and how often and how closely it is held against the trainer."""

    url: str
    check_steps: int
    tolerance: float


@dataclass(frozen=True)
class RunOptions:
    """What a run is, besides TRL's configuration and its rows; settled once, and read by all that comes after.

    task: of `lota.data.options.TASKS`.
    calibration: None where a mask is given, and for the methods without one. adapter: of method lora. reference: of
    preferences and of GRPO with a beta, one of `choices.REFERENCES`; None without, and for an adapter, which is
    switched off instead. rewards: of GRPO, as FILE.py:function. server: None where the model generates by itself.
    given: the options as config.yaml holds them. notes: for the user, options of the config file that this method
    does not use.
    """

    method: str
    model: str
    revision: str
    attn_implementation: str | None
    trust_remote_code: bool
    task: str
    calibration: Calibration | None
    mask: str | None
    dense: list[str] | None
    shard_group_size: str | None
    gradient_reduction: str
    kernels: str
    max_skipped_steps: int
    rounding_seed: int | None
    ticket_dtype: str | None
    ticket_form: str
    reference: str | None
    rewards: tuple[str, ...]
    server: ServerOptions | None
    adapter: Adapter | None
    keeping: Keeping
    merged: bool
    given: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def is_policy(self) -> bool:
        """Whether the model writes answers to prompts, and a reward judges them."""
        return self.task == "prompts"

    @property
    def is_sparse(self) -> bool:
        """Whether the run ends in a ticket, or a mask."""
        return self.method == "lota"


def resolve(
    args: LotaArguments, config: Config, *, mask_only: bool = False, argv: list[str] | None = None
) -> RunOptions:
    """Check what was given and fill in what was not; ValueError where it cannot work. Every rank, before collectives.

    An option of the config file that this method does not use becomes a note. The same on the command line is an error,
    so that one file serves `--method lota`, `--method full` and `--mask PATH`. `config` gets its
    gradient_accumulation_steps where global_batch_size asks for it.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = copy.copy(args)
    unused = _Unused(args, argv)
    if not args.model_name_or_path:
        raise ValueError("model_name_or_path is missing: give a folder or a name on the hub")
    _check_values(config)
    if config.save_only_model and config.save_strategy != "no":
        raise ValueError(
            "save_only_model would leave checkpoints that hold neither the ticket nor anything to resume from: remove "
            "it; the ticket is written at the end, and the whole model with merged: true"
        )
    if config.push_to_hub:
        raise ValueError(
            "push_to_hub would upload the Trainer's folders and not the ticket: remove it, and upload RUN/ticket "
            "when the run is done"
        )
    if config.enable_jit_checkpoint:
        raise ValueError(
            "enable_jit_checkpoint is the Trainer's way to save on SIGTERM: remove it; here SIGTERM and SIGUSR1 save a "
            "checkpoint always (docs/cluster.md)"
        )
    if config.save_on_each_node:
        raise ValueError(
            "save_on_each_node would let every node write the same checkpoint in output_dir, which all of them share: "
            "remove it"
        )
    if config.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size would change the rows of a step during the run: remove it, and give "
            "per_device_train_batch_size"
        )
    idle = unused.on_command_line & {"save_steps", "save_total_limit"} if config.save_strategy == "no" else set()
    if idle:
        raise ValueError(
            f"save_strategy is 'no', so {', '.join(sorted(idle))} would be ignored: add --save_strategy steps"
        )
    if isinstance(config, PolicyConfig):
        _check_policy(args, config, {*keys_of_config(argv), *unused.on_command_line})
    if args.global_batch_size is not None:
        in_file = set(keys_of_config(argv))
        if "global_batch_size" in unused.on_command_line and "gradient_accumulation_steps" in in_file:
            note = "global_batch_size is given; not used from the config file: gradient_accumulation_steps"
            unused.notes.append(note)
            in_file = set()
        set_accumulation(config, args.global_batch_size, world_size(), unused.on_command_line | in_file)
    choices.check_choice("method", args.method, choices.METHODS)
    ds_config.check(config, is_sparse=args.method == "lota" and not mask_only)
    if args.ticket_dtype not in (None, "float32"):
        raise ValueError(f"ticket_dtype must be float32 or left out (the weights' own), got {args.ticket_dtype!r}")
    choices.check_choice("ticket_form", args.ticket_form, choices.TICKET_FORMS)
    if args.ticket_form != "plain" and args.ticket_dtype is not None:
        raise ValueError(
            f"ticket_form: {args.ticket_form} stores differences of the weights' own bits, and ticket_dtype: "
            "float32 stores masters: leave one of them out"
        )
    choices.check_max_skipped_steps(args.max_skipped_steps)
    choices.check_choice("gradient_reduction", args.gradient_reduction, choices.GRADIENT_REDUCTIONS)
    check_shard_group_size(args.shard_group_size, world_size())
    with using(args.kernels, config.device):
        pass  # refused now, not after calibration
    if args.method != "lora":
        unused.drop(f"method: {args.method} has no adapter", _LORA)
    if args.method in ("full", "lora"):
        if mask_only:
            raise ValueError(f"method: {args.method} has no mask to calibrate; use method: lota")
        what = "every weight" if args.method == "full" else "an adapter"
        ours = (*_CALIBRATION, "mask", "dense", *_SPARSE, *_PULL, "overlap", "max_skipped_steps")
        unused.drop(f"method: {args.method} trains {what}", ours)
    elif args.mask is not None:
        if mask_only:
            raise ValueError("mask is given, so there is nothing to calibrate; remove it")
        unused.drop("mask skips calibration", _CALIBRATION)
        Mask.load(args.mask)
    calibration = adapter = None
    if args.method == "lora":
        adapter = _adapter(args)
    elif args.method == "lota" and args.mask is None:
        calibration = _calibration(args, config, unused)
    if mask_only:
        unused.drop("the run ends with the mask", (*_SPARSE, *_PULL, "merged"))
    _check_rounding(args.rounding_seed, config)
    for path in args.protect or ():
        Mask.load(path)
    keeping = _keeping(args, config, unused)
    rewards, server = _policy(args, config, unused, calibration)
    return RunOptions(
        method=args.method,
        model=args.model_name_or_path,
        revision=args.model_revision,
        attn_implementation=args.attn_implementation,
        trust_remote_code=config.trust_remote_code,
        task=config.task,
        calibration=calibration,
        mask=args.mask,
        dense=args.dense,
        shard_group_size=args.shard_group_size,
        gradient_reduction=args.gradient_reduction,
        kernels=args.kernels,
        max_skipped_steps=args.max_skipped_steps,
        rounding_seed=args.rounding_seed,
        ticket_dtype=args.ticket_dtype,
        ticket_form=args.ticket_form,
        reference=_reference(args, config, unused),
        rewards=rewards,
        server=server,
        adapter=adapter,
        keeping=keeping,
        merged=args.merged,
        given={name: value for name, value in asdict(args).items() if value is not None},
        notes=tuple(unused.notes),
    )


_AT_LEAST_ONE = (
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *(
        "max_length",
        "max_completion_length",
        "save_steps",
        "eval_steps",
        "logging_steps",
        "max_prompt_length",
        "save_total_limit",
    ),
)
_NOT_NEGATIVE = ("weight_decay", "max_grad_norm", "warmup_steps", "warmup_ratio", "label_smoothing_factor")


def _check_values(config: Config) -> None:
    """ValueError for numbers that nobody can mean, which the Trainer takes without a word."""
    for name in _AT_LEAST_ONE:
        value = getattr(config, name, None)
        is_fraction = name.endswith("_steps") and isinstance(value, float) and 0 < value < 1  # of all steps
        if value is not None and not value >= 1 and not is_fraction:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name in _NOT_NEGATIVE:
        value = getattr(config, name, None)
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{name} must be 0 or above, got {value}")
    if not 0 < config.learning_rate < math.inf:
        raise ValueError(f"learning_rate must be above 0, got {config.learning_rate}")
    if config.max_steps == 0 or config.max_steps < -1:
        raise ValueError(f"max_steps must be at least 1 (or -1 for whole epochs), got {config.max_steps}")
    if config.max_steps == -1 and not 0 < config.num_train_epochs < math.inf:
        raise ValueError(f"num_train_epochs must be above 0, got {config.num_train_epochs}")


_CALIBRATION = (
    "density", "budget", "score", "calibration_steps", "calibration_learning_rate", "protect", "protect_from",
    "keep_ranking", "include", "exclude",
)  # fmt: skip

_SPARSE = ("shard_group_size", "gradient_reduction", "kernels", "rounding_seed", "ticket_dtype", "ticket_form")

_PULL = ("retain", "pull", "keep_importance", "importance_batches", "fisher", "kept", "alphas", "forget_budget")

_LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora")


def _reference(args: LotaArguments, config: Config, unused: _Unused) -> str | None:
    """Where the reference model comes from. Sets TRL's own option where it is precomputed."""
    if not isinstance(config, (PreferenceConfig, PolicyConfig)):
        unused.drop("only preferences and GRPO have a reference", ("reference",))
        return None
    if isinstance(config, PolicyConfig) and config.beta == 0:
        unused.drop("beta is 0, so there is no reference", ("reference",))
        return None
    if args.method == "lora":
        unused.drop("method: lora switches its adapter off for the reference", ("reference",))
        return None
    can_precompute = isinstance(config, PreferenceConfig)  # there are no answers yet to compute them of
    precomputed = can_precompute and config.precompute_ref_log_probs
    is_free = args.method == "lota" and not config.sync_ref_model
    usual = "precompute" if precomputed else "ticket" if is_free else "model"
    known = choices.REFERENCES if can_precompute else tuple(n for n in choices.REFERENCES if n != "precompute")
    chosen = choices.check_choice("reference", args.reference or usual, known)
    if precomputed and chosen != "precompute":
        raise ValueError(f"reference: {chosen} and precompute_ref_log_probs: true: leave one of them out")
    if chosen == "ticket" and args.method != "lota":
        raise ValueError(f"reference: ticket needs method: lota; method: {args.method} takes {' or '.join(known[1:])}")
    if config.sync_ref_model and chosen != "model":
        raise ValueError(f"sync_ref_model moves a model of its own: set reference: model, got {chosen}")
    if isinstance(config, PreferenceConfig):
        config.precompute_ref_log_probs = chosen == "precompute"
    return chosen


_SERVER = ("server_check_steps", "server_tolerance")


def _check_policy(args: LotaArguments, config: PolicyConfig, given: set[str]) -> None:
    """ValueError for options of TRL's GRPO that are not read here, or cannot be. given: names that the user gave."""
    refused = {
        "use_vllm": "TRL's vLLM lives in the trainer's environment: give server: URL",
        "use_transformers_continuous_batching": "it moves the gathered weights, which ZeRO-3 shares out again",
        "use_transformers_paged": "it moves the gathered weights, which ZeRO-3 shares out again",
        "cast_lm_head_to_fp32": "it changes the dtype of a weight under ZeRO-3",
        "generation_batch_size": "it follows from steps_per_generation",
        "global_batch_size": "give gradient_accumulation_steps",
        "train_sampling_strategy": "prompts are shuffled by shuffle_dataset",
        "model_init_kwargs": "the model is loaded by lota's own options",
    } | {name: "it belongs to use_vllm" for name in given if name.startswith("vllm_")}
    if args.server is not None:
        refused |= dict.fromkeys(
            ("generation_kwargs", "cache_implementation", "ds3_gather_for_generation"),
            "the server writes the answers",
        )
    for name in sorted(given & refused.keys()):
        value = getattr(args, name, None) if hasattr(args, name) else getattr(config, name)
        if value not in (None, False):
            raise ValueError(f"{name} is not for lota grpo: {refused[name]}. Remove it")
    keeping = {"keep_importance": args.keep_importance, "kept": args.kept, "fisher": args.fisher != "empirical"}
    for name, is_given in keeping.items():
        if is_given:
            raise ValueError(f"{name} measures losses of given answers, and here the model writes them: remove it")
    if any(isinstance(item, dict) for item in args.retain or ()):
        raise ValueError("retain takes tickets with their importance here: rows have no loss without answers")


def _policy(
    args: LotaArguments, config: Config, unused: _Unused, calibration: Calibration | None
) -> tuple[tuple[str, ...], ServerOptions | None]:
    """The rewards and the server of GRPO; of other jobs neither."""
    if not isinstance(config, PolicyConfig):
        unused.drop("only lota grpo trains on a reward", ("reward", "server", *_SERVER))
        return (), None
    if not args.reward:
        raise ValueError("reward is missing: give FILE.py:function, called as f(prompts, completions, **columns)")
    weights = config.reward_weights
    if weights is not None and len(weights) != len(args.reward):
        raise ValueError(f"reward_weights has {len(weights)} numbers, and reward {len(args.reward)} functions")
    if args.server is None:
        unused.drop("no server is given", _SERVER)
        return tuple(args.reward), None
    if args.method != "lota":
        raise ValueError(f"server gets a ticket every step, and method: {args.method} has none: remove one of them")
    if calibration is not None and calibration.score == "task_vector":
        raise ValueError(
            "server holds the base during calibration, and score: task_vector trains all weights: use score: gradient"
        )
    if args.tickets:
        raise ValueError("server and tickets: apply the tickets to the base first (lota apply), and serve that")
    steps = choices.SERVER_CHECK_STEPS if args.server_check_steps is None else args.server_check_steps
    tolerance = choices.SERVER_TOLERANCE if args.server_tolerance is None else args.server_tolerance
    if steps < 1:
        raise ValueError(f"server_check_steps must be at least 1, got {steps}")
    if not 0 < tolerance < math.inf:
        raise ValueError(f"server_tolerance must be above 0, in nats a token, got {tolerance}")
    return tuple(args.reward), ServerOptions(args.server, steps, tolerance)


def _keeping(args: LotaArguments, config: Config, unused: _Unused) -> Keeping:
    """Check what is to be kept of earlier tasks; opens the tickets and the importance files."""
    tickets = [Ticket.load(path) for path in args.tickets or ()]
    for path, ticket in zip(args.tickets or (), tickets, strict=True):
        if ticket.is_packed:
            raise ValueError(f"{path} is packed, and read beside its whole base: unpack it first (lota unpack)")
        if not ticket.has_base_values:
            raise ValueError(f"{path} holds no base values, so nobody knows what it changes: make it with them")
    choices.check_choice("fisher", args.fisher, choices.FISHERS)
    if args.overlap and not tickets:
        unused.drop("no tickets are given", ("overlap",))
    if args.fisher == "true" and isinstance(config, PreferenceConfig):
        raise ValueError("fisher: true samples answers to examples, and preferences have none: remove it")
    retain = tuple(_retained(item) for item in args.retain or ())
    if retain and args.pull is None:
        args.pull = choices.PULL
    choices.check_pull(args.pull, retain)
    if args.importance_batches < 1:
        raise ValueError(f"importance_batches must be at least 1, got {args.importance_batches}")
    if not args.keep_importance and all(isinstance(item, str) for item in retain):
        reason = "no importance is collected (neither keep_importance nor rows to retain)"
        unused.drop(reason, ("importance_batches", "fisher"))
    pull = None if args.pull is None else float(args.pull)
    return Keeping(
        tuple(args.tickets or ()),
        args.overlap,
        retain,
        pull,
        args.keep_importance,
        args.importance_batches,
        args.fisher,
        *_dial(args, unused),
    )


def _dial(args: LotaArguments, unused: _Unused) -> tuple[dict[str, DataPlan], tuple[float, ...], float | None]:
    """The rows that are measured, the points at which, and the budget."""
    if not args.kept:
        unused.drop("no rows to keep are given (kept)", ("alphas", "forget_budget"))
        return {}, (), None
    plans: dict[str, DataPlan] = {}
    for number, item in enumerate(args.kept):
        if not isinstance(item, dict):
            raise ValueError(f"kept takes rows as {{name: NAME, data: FILE, ...}}, got {item!r:.120}")
        entry = dict(item)
        name = str(entry.pop("name", f"kept{number + 1}"))
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name in plans or name == "eval":
            raise ValueError(f"kept: every entry needs a name of its own, of letters and digits, got {name!r}")
        plans[name] = _rows("kept", entry)
    alphas = tuple(sorted({choices.check_alpha(alpha) for alpha in args.alphas or choices.ALPHAS}))
    budget = args.forget_budget
    if budget is not None and not 0 <= budget < math.inf:
        raise ValueError(f"forget_budget must be 0 or above, in nats per token, got {budget}")
    return plans, alphas, budget


def _retained(item: Any) -> str | DataPlan:
    """A path whose importance can be read, or the plan of rows."""
    if isinstance(item, str):
        Importance.load(item)
        return item
    if not isinstance(item, dict):
        raise ValueError(f"retain takes tickets, or rows as {{train_file: FILE, ...}}, got {item!r:.120}")
    return _rows("retain", dict(item))


def _rows(option: str, entry: dict[str, Any]) -> DataPlan:
    """Rows named by the options of a data set; `data` is short for `train_file`."""
    if "data" in entry:
        entry["train_file"] = entry.pop("data")
    known = [option.name for option in fields(DataArguments) if not option.name.startswith("eval")]
    for name in entry:
        if name not in known:
            raise ValueError(f"{option}: unknown option {name!r}" + did_you_mean(str(name), known))
    return plan_data(DataArguments(**entry))


def _adapter(args: LotaArguments) -> Adapter:
    """TRL's defaults, on every linear layer: LoTA may choose from all of them, too."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError("method: lora needs PEFT, which is not installed: pip install 'peft>=0.19'")
    args.lora_r = 16 if args.lora_r is None else args.lora_r
    args.lora_alpha = 32 if args.lora_alpha is None else args.lora_alpha
    args.lora_dropout = 0.05 if args.lora_dropout is None else args.lora_dropout
    args.lora_target_modules = args.lora_target_modules or ["all-linear"]
    args.use_rslora = bool(args.use_rslora)
    for name in ("lora_r", "lora_alpha"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(args, name)}")
    if not 0 <= args.lora_dropout < 1:
        raise ValueError(f"lora_dropout must be in [0, 1), got {args.lora_dropout}")
    return Adapter(args.lora_r, args.lora_alpha, args.lora_dropout, tuple(args.lora_target_modules), args.use_rslora)


def _calibration(args: LotaArguments, config: Config, unused: _Unused) -> Calibration:
    """Fill in `args`, which config.yaml is made from, and check them."""
    args.density = choices.check_density(choices.DENSITY if args.density is None else args.density)
    args.budget = choices.check_budget(args.budget or choices.BUDGET)
    usual = choices.REWARD_SCORE if isinstance(config, PolicyConfig) else choices.SCORE
    args.score = choices.check_choice("score", args.score or usual, choices.SCORES)
    if args.score in choices.STATIC_SCORES:
        unused.drop(f"score: {args.score} looks at the weights only", ("calibration_steps",))
        args.calibration_steps = 1
    elif args.calibration_steps is None:
        args.calibration_steps = choices.CALIBRATION_STEPS
    if args.calibration_steps < 1:
        raise ValueError(f"calibration_steps must be at least 1, got {args.calibration_steps}")
    if args.score != "task_vector":
        unused.drop(f"score: {args.score} takes no optimizer step", ("calibration_learning_rate",))
    elif args.calibration_learning_rate is None:
        args.calibration_learning_rate = config.learning_rate / choices.CALIBRATION_RATE_DIVISOR
    if args.calibration_learning_rate is not None and not args.calibration_learning_rate > 0:
        raise ValueError(f"calibration_learning_rate must be above 0, got {args.calibration_learning_rate}")
    if args.keep_ranking and args.dense:
        raise ValueError("keep_ranking and dense: a ranking holds chosen entries only. Leave one of them out")
    return Calibration(
        args.density,
        args.budget,
        args.score,
        args.calibration_steps,
        args.calibration_learning_rate,
        tuple(args.protect or ()),
        _protect_from(args.protect_from),
        args.keep_ranking,
        args.include,
        args.exclude,
    )


def _protect_from(given: Any) -> tuple[str, str, float] | None:
    """The two models, and the part of the entries that the second moved most."""
    if given is None:
        return None
    if isinstance(given, str):
        given = yaml.safe_load(given)
    if not isinstance(given, dict) or given.keys() != {"base", "tuned", "density"}:
        raise ValueError(f"protect_from must hold base, tuned and density, got {given!r:.120}")
    for name in ("base", "tuned"):
        check_is_name(str(given[name]))
    return str(given["base"]), str(given["tuned"]), choices.check_density(given["density"])


_WITH_ROUNDING = ("adam", "adamw", "adamw_torch", "adamw_torch_fused", "adamw_apex_fused", "rmsprop")


def _check_rounding(seed: int | None, config: Config) -> None:
    """What sparse training would refuse, before calibration."""
    if choices.check_rounding_seed(seed) is None:
        return
    if not config.bf16:
        raise ValueError(
            f"rounding_seed: {seed} rounds bf16 weights stochastically, and this run does not train in "
            "bf16: add --bf16 true, or remove it"
        )
    own = ds_config.content(config).get("optimizer", {}).get("type")
    chosen = str(own or getattr(config.optim, "value", config.optim))
    if chosen.lower() not in _WITH_ROUNDING:
        raise ValueError(
            f"rounding_seed: {seed} rounds stochastically in the kernels of AdamW and RMSprop, and the "
            f"optimizer is {chosen}: use one of those, or remove it"
        )


class _Unused:
    """Options that a method does not use: an error from the command line, dropped with a note from the config file."""

    def __init__(self, args: LotaArguments, argv: list[str]) -> None:
        self.args = args
        self.on_command_line = set(names_on_command_line(argv))
        self._defaults = {entry.name: entry.default for entry in fields(args)}
        self.notes: list[str] = []

    def drop(self, reason: str, names: Sequence[str]) -> None:
        given = [name for name in names if getattr(self.args, name) != self._defaults[name]]
        refused = [name for name in given if name in self.on_command_line]
        if refused:
            raise ValueError(
                f"{reason}, so {', '.join(refused)} would be ignored: remove {'it' if len(refused) == 1 else 'them'}"
            )
        for name in given:
            setattr(self.args, name, self._defaults[name])
        if given:
            self.notes.append(f"{reason}; not used from the config file: {', '.join(given)}")
