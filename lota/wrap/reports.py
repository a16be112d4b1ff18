"""What each rank reports to the launcher: a small file in the run's folder, written anew whenever there is news."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from lota.files import read_json_object, write_text

BUILT, FINISHED, FAILED = "built", "finished", "failed"


@dataclass
class Report:
    """state: `built` (the engine that trains), `finished` (the block, its mask or ticket written) or `failed`. reason:
    of a failure. output_dir: where the program's Trainer writes, absolute, or ""."""

    rank: int
    world_size: int
    host: str
    pid: int
    state: str = BUILT
    reason: str = ""
    steps: int = 0
    output_dir: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


def write(folder: str, report: Report) -> None:
    """Replace this rank's report. Nothing where the folder is on a disk of another host."""
    if os.path.isdir(folder):
        write_text(Path(folder) / f"rank-{report.rank}.json", json.dumps(asdict(report)))


def read_all(folder: Path) -> list[Report]:
    """The reports of all ranks that see the folder, in rank order."""
    (folder / ".ended").touch()  # a change of its own makes a client of NFS look again
    return sorted((Report(**read_json_object(path)) for path in folder.glob("rank-*.json")), key=lambda item: item.rank)
