"""Files that come with lota: run configurations, chat templates, and the ZeRO-3 file. In a checkout they are links to
recipes/configs and ds_configs; in an installed package, copies."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).resolve().parent
CONFIGS = HERE / "configs"
DS_CONFIGS = HERE / "ds_configs"


def find(folder: Path, name: str, suffix: str) -> Path | None:
    """The packaged file that `name`, a bare word such as `zero3` or `plain_chat`, stands for; None where there is none,
    or where the working directory has a file of that name."""
    path = folder / f"{name}{suffix}"
    is_word = "/" not in name and not Path(name).exists()
    return path if is_word and path.is_file() else None


def names(folder: Path, suffix: str) -> list[str]:
    """What `find` knows in a folder."""
    return sorted(path.stem for path in folder.glob(f"*{suffix}"))
