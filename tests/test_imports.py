"""Every room of lota/ imports only the rooms below it, and nothing in lota/ imports recipes, benchmarks or tests."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# room -> rooms of ours that it may import. A room is a package or a module directly under lota/.
MAY_IMPORT: dict[str, set[str]] = {
    "wording": set(),
    "kernels": set(),
    "ticket": {"folder", "wording", "kernels"},
    "plan": {"ticket", "kernels"},
    "selection": {"ticket", "kernels"},
    "zero": {"folder", "wording", "plan", "ticket", "kernels"},
    "optim": {"wording", "ticket", "kernels"},
    "apply": {"wording", "ticket", "kernels"},
    "card": {"folder", "ticket"},
    "architecture": set(),
    "folder": set(),
    "checkpoint": {"wording", "apply", "folder", "card", "architecture", "ticket", "kernels"},
    "merge": {"ticket", "kernels"},
    "export": {"wording", "checkpoint", "apply", "folder", "card", "architecture", "ticket", "kernels"},
    "seams": {"wording", "selection", "zero", "ticket", "kernels"},
}
# The front door re-exports the rooms; the command line joins them.
UNRESTRICTED = {"__init__", "__main__", "cli"}
OUTSIDE = {"recipes", "benchmarks", "tests"}


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


def violations(root: Path) -> list[str]:
    """One line per forbidden import found under `root`/lota."""
    lines = []
    for path in sorted((root / "lota").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        room = parts[1]
        if room not in MAY_IMPORT and room not in UNRESTRICTED:
            lines.append(f"{module}: room '{room}' has no row in the table of tests/test_imports.py")
            continue
        for name in sorted(imported_modules(path.read_text(encoding="utf-8"), module, is_package)):
            head, *rest = name.split(".")
            if head in OUTSIDE:
                lines.append(f"{module} imports {name}: nothing in lota may import {head}")
            elif head == "lota" and room in MAY_IMPORT:
                target = rest[0] if rest else "__init__"
                if target != room and target not in MAY_IMPORT[room]:
                    lines.append(f"{module} imports {name}: {room} may import {sorted(MAY_IMPORT[room])}")
    return lines


def test_rooms_import_only_rooms_below() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "statement"),
    [
        ("lota/kernels/ops.py", "from lota.ticket import Mask"),
        ("lota/kernels/ops.py", "import lota"),
        ("lota/selection/topk.py", "import lota.zero.engine"),
        ("lota/selection/topk.py", "from lota import zero"),
        ("lota/selection/deep/er.py", "from ...zero import engine"),
        ("lota/selection/__init__.py", "from ..zero import engine"),
        ("lota/zero/engine.py", "def late():\n    from lota.selection import select"),
        ("lota/ticket/files.py", "from lota.apply import apply_"),
        ("lota/plan/sizes.py", "from lota.selection import eligible"),
        ("lota/cli.py", "from recipes import demo"),
        ("lota/novel/room.py", ""),
    ],
)
def test_planted_violation_is_found(tmp_path: Path, path: str, statement: str) -> None:
    planted = tmp_path / path
    planted.parent.mkdir(parents=True)
    planted.write_text(statement + "\n", encoding="utf-8")
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("path", "statement"),
    [
        ("lota/__init__.py", "from lota.seams import sparse_zero3"),
        ("lota/seams.py", "from lota.selection import select\nfrom lota.zero import engine"),
        ("lota/ticket/files.py", "from lota.kernels import gather\nfrom . import codec\nimport torch"),
        ("lota/cli.py", "from lota.zero import engine"),
    ],
)
def test_allowed_imports_pass(tmp_path: Path, path: str, statement: str) -> None:
    planted = tmp_path / path
    planted.parent.mkdir(parents=True)
    planted.write_text(statement + "\n", encoding="utf-8")
    assert violations(tmp_path) == []
