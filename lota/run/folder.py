"""What a run leaves behind: resolved config, metrics, summary. Rank zero writes, to a temporary name, then renames."""

from __future__ import annotations

import json
import platform
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import accelerate
import deepspeed
import torch
import transformers
import trl
import yaml

from lota.data.options import DataPlan
from lota.delivery.card import write_ticket_card
from lota.files import naming_disk_full, naming_odd, only_writer, read_json_object, write_text
from lota.ranks.agree import checked_together, from_rank_0, together
from lota.ranks.process import begun
from lota.ranks.world import print_once, rank, world_size
from lota.run import resume_checks
from lota.run.batch import Batch
from lota.run.options import Config
from lota.run.resolve import RunOptions
from lota.run.resume import Resume, wants_resume
from lota.ticket import Mask

_FOLDER_OF = {"calibrate": "calibration"}

LEFT_BY_A_RUN = (
    *("config.yaml", "examples.txt", "metrics.jsonl", "summary.json", "report.png", "calibration.json"),
    *("calibration", "protected", "retained", "ranking", "mask", "ticket", "adapter", "merged", "served"),
)


class RunFolder:
    """The folder `output_dir` of one run. All ranks build it, together; only rank 0 writes.

    options, config: as resolved, written to config.yaml, which --config takes again. resume: decided here, for all
    phases.
    """

    def __init__(self, options: RunOptions, config: Config, plan: DataPlan) -> None:
        """Refuse a folder that already holds a run, unless it is this very run and is asked to resume. Collective: what
        rank 0 sees holds for all. config.yaml then holds the options in force from here on."""
        self.path = Path(str(config.output_dir))
        self.is_writer = rank() == 0
        self._held = ExitStack()
        self.resume = from_rank_0(lambda: self._begin(options, config, plan))
        begun()

    def close(self) -> None:
        """Let another run have the folder; a process that ends does so too."""
        self._held.close()

    def _begin(self, run: RunOptions, config: Config, plan: DataPlan) -> Resume:
        """ValueError where there is another run, or one that may not be resumed, or a process that runs it now."""
        self._held.enter_context(only_writer(self.path.absolute(), "runs in"))
        try:
            return self._decide(run, config, plan)
        except BaseException:
            self.close()
            raise

    def _decide(self, run: RunOptions, config: Config, plan: DataPlan) -> Resume:
        options, facts = resolved(run, config), resume_checks.facts(plan, config, world_size())
        found = [name for name in LEFT_BY_A_RUN if (self.path / name).exists()]
        if found and not wants_resume(config.resume_from_checkpoint):
            raise ValueError(
                f"output_dir {self.path} already holds a run ({', '.join(found)}): choose another, remove it first, or "
                "resume it with --resume_from_checkpoint true"
            )
        before, facts_before = self._begun() if found else (None, None)
        if before is not None:
            resume_checks.check_options(before, options, self.path)
            options.pop("resume_from_checkpoint", None)  # the file is for a run from the start
            options |= {name: before[name] for name in ("resume_from_checkpoint",) if name in before}
        resume = Resume.decide(config.resume_from_checkpoint, self.path)
        if resume.batch is not None:
            resume_checks.check_ranks(resume.batch, Batch.of(config, world_size()), run.method, config)
        if facts_before is not None:
            resume_checks.check_facts(facts_before, facts, self.path)
        if self.is_writer:
            # The file that says there is a run is the last one.
            self.path.mkdir(parents=True, exist_ok=True)
            remove_unfinished(self.path)
            _update(self.path / "run.json", json.dumps(facts, indent=2) + "\n")
            _update(self.path / "config.yaml", yaml.safe_dump(options, sort_keys=False, allow_unicode=True))
        return resume

    def _begun(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """config.yaml and run.json of the run in this folder; ValueError where it is complete or lacks one of them."""
        if (self.path / "summary.json").is_file():
            raise ValueError(f"output_dir {self.path} holds a complete run, so there is nothing to resume")
        try:
            with naming_odd(f"output_dir {self.path}"):
                options = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
                return dict(options.items()), read_json_object(self.path / "run.json")
        except yaml.YAMLError as error:
            raise ValueError(f"output_dir {self.path}: config.yaml is not YAML: {str(error)[:200]}") from None
        except FileNotFoundError as error:
            missing = Path(error.filename).name
            raise ValueError(f"output_dir {self.path} holds a run without {missing}: choose another") from None

    def checkpoints_of(self, phase: str) -> Path:
        """Where the checkpoints of a phase are."""
        return self.path if phase == "train" else self.path / _FOLDER_OF.get(phase, phase)

    def save_mask(self, mask: Mask, facts: dict[str, Any], provenance: dict[str, Any]) -> None:
        """Keep what calibration gave, so that a run which is resumed does not calibrate again. Collective."""
        with together():
            if self.is_writer:
                write_text(self.path / "calibration.json", json.dumps(facts, indent=2) + "\n")
                with naming_disk_full(self.path / "mask"):
                    mask.save(self.path / "mask", provenance)
                shutil.rmtree(self.path / "calibration", ignore_errors=True)

    def saved_mask(self) -> tuple[Mask, dict[str, Any]] | None:
        """The mask that this run selected before it was stopped, and the facts about its calibration. Collective."""
        if not from_rank_0((self.path / "mask").is_dir):
            return None
        with checked_together():
            facts = read_json_object(self.path / "calibration.json")
            return Mask.load(self.path / "mask"), facts

    def write_summary(self, summary: dict[str, Any]) -> None:
        """summary.json, the last thing a run writes: where it is, the run is complete."""
        if self.is_writer:
            write_text(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")

    def write_card(self, facts: dict[str, Any]) -> None:
        """The model card of ticket/; facts: rows beside what the ticket itself tells."""
        if self.is_writer:
            write_ticket_card(self.path / "ticket", facts)

    def draw_report(self, summary: dict[str, Any]) -> None:
        """report.png. If drawing fails the run only warns."""
        if self.is_writer:
            try:
                from lota.run.report import draw_report

                draw_report(self.path, summary)
            except Exception as error:  # noqa: BLE001 (logged; the run continues)
                print_once(f"report.png was not drawn ({error!r}); try again: lota report {self.path}")

    def keep_metrics(self, phase: str, last_step: int) -> list[dict[str, Any]]:
        """Cut from metrics.jsonl what a phase logged after `last_step`; return what it logged until then.

        Collective."""
        path = self.path / "metrics.jsonl"
        with checked_together():  # and no rank reads after the first has written
            lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        rows = [row for line in lines if (row := _row(line)) is not None]
        kept = [row for row in rows if row["phase"] != phase or (row["step"] <= last_step and last_step > 0)]
        if self.is_writer and len(kept) < len(lines):
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        return [row for row in kept if row["phase"] == phase]

    @property
    def has_examples(self) -> bool:
        """Whether examples.txt is written."""
        return (self.path / "examples.txt").exists()

    def write_examples(self, text: str) -> None:
        """examples.txt: what the trainer sees of the first rows."""
        if self.is_writer:
            write_text(self.path / "examples.txt", text)

    def add_metrics(self, row: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""
        if self.is_writer:
            path = self.path / "metrics.jsonl"
            with naming_disk_full(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def remove_unfinished(folder: Path) -> None:
    """Remove what a run that was killed left half written under hidden names, in its folder and its calibration's."""
    for marker in folder.glob(".seen-*"):
        marker.unlink(missing_ok=True)
    for place in (folder, folder / "calibration"):
        for name in ("checkpoint-*", "run.json", *LEFT_BY_A_RUN):
            for ending in ("partial*", "tmp-*", "old-*"):
                for path in place.glob(f".{name}.{ending}"):
                    if path.is_dir():
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        path.unlink(missing_ok=True)


def resolved(run: RunOptions, config: Config) -> dict[str, Any]:
    """The options that differ from their defaults, as YAML holds them."""
    options = dict(run.given)
    for name, entry in type(config).__dataclass_fields__.items():
        value = getattr(config, name, None)
        value = getattr(value, "value", value)
        if name in _ALWAYS_WRITTEN or (entry.init and _is_plain(value) and value != entry.default):
            options[name] = value
    if "global_batch_size" in options:
        options.pop("gradient_accumulation_steps", None)  # follows from it
    if options.get("steps_per_generation") == config.gradient_accumulation_steps:
        del options["steps_per_generation"]  # likewise
    if options.get("deepspeed", "") is None:
        del options["deepspeed"]  # accelerate's, which the launch brings again
    for name in _FILLED_IN:
        options.pop(name, None)
    for name in _EMPTIED:
        if not options.get(name):
            options.pop(name, None)
    return yaml.safe_load(yaml.safe_dump(options))


_ALWAYS_WRITTEN = ("learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm", "seed", "max_length")
# Filled in by TrainingArguments from the machine or from other options; they resolve again when the file is used.
_FILLED_IN = (
    "generation_batch_size",
    *("use_cpu", "local_rank", "disable_tqdm", "dataloader_pin_memory"),
    *("activation_checkpointing", "include_for_metrics", "debug"),
    "hub_token",  # a secret
)
# Likewise where they are empty: "none" becomes an empty list, "auto" None.
_EMPTIED = ("report_to", "pad_to_multiple_of")


def versions() -> dict[str, str]:
    """What ran."""
    modules = (torch, deepspeed, transformers, trl, accelerate)
    return {"python": platform.python_version()} | {module.__name__: module.__version__ for module in modules}


def _update(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def _row(line: str) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None for one that a killed run, or a full disk, cut short."""
    try:
        return dict(json.loads(line))
    except json.JSONDecodeError:
        return None


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
