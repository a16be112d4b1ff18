"""Every room of lota/ imports only rooms below it; private names of others have one room; nothing imports recipes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# room -> rooms of ours that it may import, ground first: a room may name only rooms that stand above it here. A room is
# a package or a module directly under lota/; zero has three rooms of its own.
MAY_IMPORT: dict[str, set[str]] = {
    "files": set(),
    "messages": set(),
    "packaged": set(),
    "progress": set(),
    "schedule": set(),
    "tensor_names": {"messages"},
    "architecture": {"files", "tensor_names"},
    "checkpoint_keys": {"architecture"},
    "choices": {"messages"},
    "kernels": {"choices"},
    "ranks": set(),
    "ticket": {"choices", "files", "messages", "kernels"},
    "data": {"architecture", "messages", "packaged", "ranks"},
    "plan": {"architecture", "choices", "ticket", "kernels"},
    "selection": {"choices", "files", "ticket", "kernels"},
    "ranking": {"files", "ranks", "selection", "ticket"},
    "optim": {"messages", "schedule", "ticket", "kernels"},
    "retention": {"files", "messages", "selection", "ticket", "kernels"},
    "delivery": {
        *("architecture", "checkpoint_keys", "choices", "files", "messages", "progress", "retention", "tensor_names"),
        *("ticket",),
    },
    "algebra": {"architecture", "checkpoint_keys", "delivery", "progress", "selection", "tensor_names", "ticket"},
    "zero.checkpoint": {"files", "ranks", "ticket"},
    "zero.compact": {"choices", "zero.checkpoint", "plan", "retention", "schedule", "ticket", "kernels"},
    "zero.deepspeed": {"zero.checkpoint", "zero.compact", "delivery", "files"},
    "zero": {
        *("zero.checkpoint", "zero.compact", "zero.deepspeed"),
        *("architecture", "checkpoint_keys", "choices", "delivery", "plan", "ranks", "ticket", "kernels", "files"),
        *("messages", "retention"),
    },
    "blocks": {
        *("zero", "zero.compact", "zero.deepspeed"),
        *("choices", "ranking", "retention", "selection", "ticket", "ranks", "kernels", "messages"),
    },
    "run": {
        *("architecture", "choices", "blocks", "data", "delivery", "selection", "ticket", "kernels", "ranks", "files"),
        *("messages", "packaged", "retention", "zero", "zero.compact"),
    },
    "serve": {"choices", "delivery", "files", "messages", "progress", "ticket"},
    "train": {
        *("run", "algebra", "blocks", "choices", "data", "delivery", "plan", "retention", "selection", "ticket"),
        *("ranks", "files", "messages", "packaged", "serve", "zero"),
        *("zero.compact", "zero.deepspeed"),
    },
    "evaluate": {"run", "architecture", "data", "delivery", "ticket", "ranks", "files", "messages"},
    "sequence": {
        *("train", "evaluate", "run", "algebra", "choices", "data", "delivery", "ticket", "ranks", "files", "messages"),
        *("progress", "retention"),
    },
    "demo": {"evaluate", "data", "delivery", "packaged", "ticket"},
    "study": {
        *("demo", "sequence", "train", "evaluate", "retention", "algebra", "delivery", "data", "selection", "ticket"),
        *("choices", "files", "messages", "packaged", "ranks"),
    },
}
# The front door re-exports the rooms; the command line joins them.
UNRESTRICTED = {"__init__", "__main__", "cli"}
SUBROOMS = {"zero": {"checkpoint", "compact", "deepspeed"}}
OUTSIDE = {"recipes", "benchmarks", "tests"}

# What DeepSpeed and transformers do not promise, and the only place that may lean on it.
DEEPSPEED_ROOM = "lota/zero/deepspeed/"
DEEPSPEED_PRIVATE = re.compile(
    r"\.ds_[a-z]\w*|[\"']ds_[a-z]\w*[\"']|\b(?:engine|optimizer)\._config\b|_param_dict|deepspeed\.runtime"
)
TRAINER_FILE = "lota/train/trainer.py"
TRAINER_BASES = re.compile(r"Trainer$")
# The mark of a sharded parameter, which lota.optim refuses without importing DeepSpeed; names of files and options.
NOT_PRIVATE = {("lota/optim.py", "ds_id"), ("lota/packaged/__init__.py", "ds_configs")}


def imported_modules(source: str, module: str, is_package: bool) -> set[str]:
    """Absolute dotted names that `source` imports anywhere, functions included; relative imports are resolved."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            # `from lota import zero` names the room only in the alias
            found.update(f"{prefix}.{alias.name}" for alias in node.names)
    return found


def room_of(parts: list[str]) -> str:
    """The room of a dotted name below `lota`."""
    if not parts:
        return "__init__"
    if len(parts) > 1 and parts[1] in SUBROOMS.get(parts[0], ()):
        return f"{parts[0]}.{parts[1]}"
    return parts[0]


def violations(root: Path) -> list[str]:
    """One line per forbidden import found under `root`/lota."""
    lines = []
    for path in sorted((root / "lota").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        room = room_of(module.split(".")[1:])
        if room not in MAY_IMPORT and room not in UNRESTRICTED:
            lines.append(f"{module}: room '{room}' has no row in the table of tests/test_imports.py")
            continue
        for name in sorted(imported_modules(path.read_text(encoding="utf-8"), module, is_package)):
            head, *rest = name.split(".")
            if head in OUTSIDE:
                lines.append(f"{module} imports {name}: nothing in lota may import {head}")
            elif head == "lota" and room in MAY_IMPORT:
                target = room_of(rest)
                if target != room and target not in MAY_IMPORT[room]:
                    lines.append(f"{module} imports {name}: {room} may import {sorted(MAY_IMPORT[room])}")
    return lines


def private_names(root: Path) -> list[str]:
    """One line per private name of DeepSpeed outside its room, and per private method of the Trainer overridden outside
    the one file for it."""
    lines = []
    for path in sorted((root / "lota").rglob("*.py")):
        place = path.relative_to(root).as_posix()
        source = path.read_text(encoding="utf-8")
        if not place.startswith(DEEPSPEED_ROOM):
            for number, line in enumerate(source.splitlines(), start=1):
                for found in DEEPSPEED_PRIVATE.findall(line):
                    if (place, found.strip(".\"'")) not in NOT_PRIVATE:
                        lines.append(f"{place}:{number}: {found} is DeepSpeed's own and belongs in {DEEPSPEED_ROOM}")
        if place != TRAINER_FILE:
            for node in ast.walk(ast.parse(source)):
                bases = map(ast.unparse, node.bases) if isinstance(node, ast.ClassDef) else ()
                if any(map(TRAINER_BASES.search, bases)):
                    lines.append(f"{place}: class {node.name} subclasses a Trainer, which belongs in {TRAINER_FILE}")
    return lines


def test_rooms_import_only_rooms_below() -> None:
    assert violations(ROOT) == []


def test_the_table_has_no_circle() -> None:
    """Every room stands below those that may import it, so that the table is an order."""
    above: set[str] = set()
    for room, allowed in MAY_IMPORT.items():
        assert allowed <= above, f"{room} may import {sorted(allowed - above)}, which stand above it"
        above.add(room)


def test_private_names_stay_in_their_room() -> None:
    assert private_names(ROOT) == []


def plant(root: Path, path: str, statement: str) -> None:
    planted = root / path
    planted.parent.mkdir(parents=True)
    planted.write_text(statement + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "statement"),
    [
        ("lota/kernels/ops.py", "from lota.ticket import Mask"),
        ("lota/kernels/ops.py", "import lota"),
        ("lota/selection/topk.py", "import lota.zero.block"),
        ("lota/selection/topk.py", "from lota import zero"),
        ("lota/selection/deep/er.py", "from ...zero import block"),
        ("lota/selection/__init__.py", "from ..zero import block"),
        ("lota/zero/block.py", "def late():\n    from lota.selection import select"),
        ("lota/zero/compact/state.py", "from lota.zero.deepspeed import weights"),
        ("lota/zero/compact/state.py", "from lota.zero import block"),
        ("lota/zero/deepspeed/engine.py", "from ..block import BlockRun"),
        ("lota/ticket/files.py", "from lota.delivery.live import apply_"),
        ("lota/plan/sizes.py", "from lota.selection import eligible"),
        ("lota/run/folder.py", "from lota.train.tracking import Tracking"),
        ("lota/data/dataset.py", "from lota.run.options import LotaArguments"),
        ("lota/cli.py", "from recipes import train_lota"),
        ("lota/train/job.py", "import recipes.train_lota"),
        ("lota/novel/room.py", ""),
    ],
)
def test_planted_violation_is_found(tmp_path: Path, path: str, statement: str) -> None:
    plant(tmp_path, path, statement)
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("path", "statement"),
    [
        ("lota/__init__.py", "from lota.blocks import sparse_zero3"),
        ("lota/blocks.py", "from lota.selection import select\nfrom lota.zero.deepspeed import engine"),
        ("lota/zero/block.py", "from lota.zero.compact.groups import make_groups\nfrom . import fingerprints"),
        ("lota/ticket/files.py", "from lota.kernels import gather\nfrom . import codec\nimport torch"),
        ("lota/cli.py", "from lota.zero.deepspeed import engine"),
    ],
)
def test_allowed_imports_pass(tmp_path: Path, path: str, statement: str) -> None:
    plant(tmp_path, path, statement)
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    ("path", "statement"),
    [
        ("lota/zero/block.py", "size = param.ds_numel"),
        ("lota/zero/block.py", "is_sharded = hasattr(param, 'ds_id')"),
        ("lota/run/ds_config.py", "clip = engine._config.gradient_clipping"),
        ("lota/train/lora.py", "from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3"),
        ("lota/train/phase.py", "class Saves(SFTTrainer):\n    def _save_checkpoint(self, model, trial): ..."),
        ("lota/evaluate/run.py", "class Scores(transformers.Trainer):\n    pass"),
    ],
)
def test_planted_private_name_is_found(tmp_path: Path, path: str, statement: str) -> None:
    plant(tmp_path, path, statement)
    assert len(private_names(tmp_path)) == 1


@pytest.mark.parametrize(
    ("path", "statement"),
    [
        ("lota/zero/deepspeed/weights.py", "size = param.ds_numel\nclip = engine._config.gradient_clipping"),
        ("lota/train/trainer.py", "class Saves(SFTTrainer):\n    def _save_checkpoint(self, model, trial): ..."),
        ("lota/optim.py", "is_sharded = hasattr(parameter, 'ds_id')"),
    ],
)
def test_private_names_in_their_room_pass(tmp_path: Path, path: str, statement: str) -> None:
    plant(tmp_path, path, statement)
    assert private_names(tmp_path) == []
