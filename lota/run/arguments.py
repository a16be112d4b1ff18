"""The options of a run that are not TRL's: declared without torch, for `--help`, completion and docs/options.md."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lota import choices
from lota.data.options import SourceArguments


@dataclass
class LotaArguments(SourceArguments):
    """Data, model, and what is LoTA's own. None means: not given, the default in the help applies."""

    method: str = field(
        default="lota",
        metadata={"help": "lota (calibrate, select, train a ticket), or full (all weights) or lora for comparison."},
    )
    density: float | None = field(
        default=None, metadata={"help": f"Fraction of the eligible weights to train ({choices.DENSITY})."}
    )
    budget: str | None = field(default=None, metadata={"help": "global or per_tensor (global)."})
    score: str | None = field(
        default=None, metadata={"help": f"What ranks the weights: {', '.join(choices.SCORES)} ({choices.SCORE})."}
    )
    calibration_steps: int | None = field(
        default=None,
        metadata={"help": f"Optimizer steps, or global batches for gradients ({choices.CALIBRATION_STEPS})."},
    )
    calibration_learning_rate: float | None = field(
        default=None, metadata={"help": "For score task_vector (a tenth of learning_rate)."}
    )
    mask: str | None = field(default=None, metadata={"help": "A mask or ticket to train on; skips calibration."})
    tickets: list[str] | None = field(
        default=None,
        metadata={"help": "Tickets of earlier tasks, on the base when the run begins; their entries are protected."},
    )
    overlap: bool = field(
        default=False, metadata={"help": "Entries of these tickets may be chosen again, and are then overwritten."}
    )
    retain: list[Any] | str | None = field(
        default=None,
        metadata={
            "help": "Earlier tasks to be pulled to: tickets with their importance, or rows, as {train_file: FILE, ...}."
        },
    )
    pull: float | None = field(
        default=None, metadata={"help": f"How strongly, with retain ({choices.PULL:g}; try 3 and 30)."}
    )
    kept: list[Any] | str | None = field(
        default=None,
        metadata={
            "help": "Rows of what is to be kept, as [{name: sql, data: FILE, ...}], measured at points between the "
            "values at the start and the trained ones."
        },
    )
    alphas: list[float] | None = field(
        default=None, metadata={"help": f"These points ({' '.join(f'{alpha:g}' for alpha in choices.ALPHAS)})."}
    )
    forget_budget: float | None = field(
        default=None,
        metadata={"help": "Deliver the largest at which no kept loss rises by more than this (nats per token)."},
    )
    keep_importance: bool = field(
        default=False, metadata={"help": "Keep in the ticket what this task needs of all weights, for retain later on."}
    )
    fisher: str = field(
        default="empirical",
        metadata={"help": "By whose answers: empirical (the rows'), or true (tokens sampled from the model)."},
    )
    importance_batches: int = field(
        default=choices.IMPORTANCE_BATCHES,
        metadata={"help": f"Micro-batches for that, of at most {choices.IMPORTANCE_ROWS} rows."},
    )
    protect: list[str] | None = field(default=None, metadata={"help": "Tickets whose entries must not be chosen."})
    protect_from: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "base, tuned, density: protect the share of entries that tuned (the model to train) moved most."
        },
    )
    keep_ranking: bool = field(
        default=False,
        metadata={"help": "Write ranking/, from which lota mask --ranking cuts masks of lower densities."},
    )
    include: list[str] | None = field(
        default=None,
        metadata={"help": "Patterns of tensors, or rows name[a:b], instead of (`default`) all matrices of the blocks."},
    )
    exclude: list[str] | None = field(default=None, metadata={"help": "Patterns of tensor names to leave out."})
    dense: list[str] | None = field(
        default=None, metadata={"help": "Patterns of tensors, or rows name[a:b], to also train and store whole."}
    )
    global_batch_size: int | None = field(
        default=None, metadata={"help": "Rows a step over all ranks; gradient_accumulation_steps follows from it."}
    )
    shard_group_size: str | None = field(
        default=None, metadata={"help": "Ranks that share one copy of the weights: a number, node or world (world)."}
    )
    gradient_reduction: str = field(
        default="auto",
        metadata={
            "help": "compact sends active entries and needs the whole index on each rank; dense sends all and needs a "
            "share of it; auto decides by memory."
        },
    )
    kernels: str = field(default="auto", metadata={"help": "auto, torch or triton."})
    max_skipped_steps: int = field(
        default=choices.MAX_SKIPPED_STEPS,
        metadata={"help": "Stop after this many consecutive steps with non-finite gradients, naming the first tensor."},
    )
    rounding_seed: int | None = field(
        default=None,
        metadata={"help": "Round fp32 masters into bf16 weights stochastically, by this seed (none: to nearest even)."},
    )
    ticket_dtype: str | None = field(default=None, metadata={"help": "float32 keeps masters (the weights' own dtype)."})
    reference: str | None = field(
        default=None,
        metadata={
            "help": "Of preferences and GRPO: ticket (the base's values put back for a forward pass), model (a second "
            "one) or, of preferences, precompute (ticket for method lota, else model)."
        },
    )
    reward: list[str] | None = field(
        default=None,
        metadata={
            "help": "Of GRPO: FILE.py:function, called as f(prompts, completions, **columns) for a list of numbers; "
            "several are summed by TRL's reward_weights."
        },
    )
    server: str | None = field(
        default=None,
        metadata={"help": "Of GRPO: address of a vLLM server that writes the answers and gets the ticket every step."},
    )
    server_check_steps: int | None = field(
        default=None,
        metadata={
            "help": "Compare its log-probabilities with the trainer's every so many steps "
            f"({choices.SERVER_CHECK_STEPS})."
        },
    )
    server_tolerance: float | None = field(
        default=None,
        metadata={"help": f"How far they may be apart, in nats a token ({choices.SERVER_TOLERANCE:g})."},
    )
    ticket_form: str = field(
        default="plain",
        metadata={"help": "plain; packed: about half of the bytes, read beside the base; values: readable without it."},
    )
    lora_r: int | None = field(default=None, metadata={"help": "Rank of the adapter (16)."})
    lora_alpha: int | None = field(default=None, metadata={"help": "The adapter is scaled by alpha / r (32)."})
    lora_dropout: float | None = field(default=None, metadata={"help": "Dropout before the adapter (0.05)."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that get an adapter (all-linear: every linear layer but the head)."}
    )
    use_rslora: bool | None = field(default=None, metadata={"help": "Scale by alpha / sqrt(r) instead (false)."})
    merged: bool = field(default=False, metadata={"help": "Also write the trained model to output_dir/merged."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.retain, self.kept = _listed(self.retain), _listed(self.kept)
        if isinstance(self.reward, str):  # of the config file
            self.reward = [self.reward]


def _listed(given: list[Any] | str | None) -> list[Any] | None:
    """YAML on the command line; one item is a list of one."""
    if not isinstance(given, str):
        return given
    import yaml  # late, as in DataArguments

    read = yaml.safe_load(given)
    return read if isinstance(read, list) else [read]
