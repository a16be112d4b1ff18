"""Writes the part Claims of docs/results.md from the tables that studies wrote: python docs/make_claims.py

To take over a study: cp runs/study-cpu/runs.csv docs/study_cpu.csv, and likewise the others of TABLES.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout that this file belongs to

from lota.study import claims, rows  # noqa: E402
from lota.study.presets import chosen  # noqa: E402

PAGE = ROOT / "docs" / "results.md"
TITLE = "## Claims"
# Table, preset, whether on real text, and the command that made it.
TABLES = (
    ("study_text.csv", "cpu", True, "lota study cpu --data DIR", "Real text (SQL, then GSM8K)"),
    ("study_cpu.csv", "cpu", False, "lota study cpu --questions q2", "Made-up tasks, at 638e25e"),
    ("study_gpu.csv", "gpu", False, "lota study gpu", "Made-up tasks, a larger base"),
)
HEAD = """
Written by `python docs/make_claims.py` from the tables of all runs beside this page. *held*, *failed*: the whole 95%
interval over seeds lies on that side of the bound; *open*: it does not, or there is one seed only.
"""


def part(folder: Path) -> str:
    """The part, from the tables that are in `folder`; empty where there is none."""
    found = []
    for name, preset, has_data, command, title in TABLES:
        if (folder / name).is_file():
            table = claims.table(chosen(preset, has_data), rows.read(folder / name), command)
            found.append(f"### {title}, [{name}]({name})\n\n{table}\n")
    return "\n".join([TITLE, HEAD, *found]) if found else ""


def page(text: str, made: str) -> str:
    """The page with the part in place of the one that it has, before its second part where it has none."""
    parts = text.split("\n## ")
    kept = [found for found in parts[1:] if f"## {found}".split("\n")[0] != TITLE]
    head, rest = parts[0], [f"## {found}" for found in kept]
    return "\n".join([head, *([made] if made else []), *rest])


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), part(PAGE.parent)), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
