"""Pages that a script writes are up to date, links and names lead somewhere, an index reaches every page, and recipes
are as thin as they promise."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for folder in (ROOT, ROOT / "docs", ROOT / "recipes", ROOT / "ds_configs")
    for path in (folder.glob("*.md") if folder in (ROOT, ROOT / "docs") else folder.rglob("*.md"))
)
_LINK = re.compile(r"\]\(([^)#\s]+)(#[^)]*)?\)")


def test_the_option_page_is_made_from_the_options() -> None:
    spec = importlib.util.spec_from_file_location("make_options", ROOT / "docs" / "make_options.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == module.page(), "run docs/make_options.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target, anchor in _LINK.findall(text):
        if target.startswith(("http://", "https://")):
            continue
        path = (page.parent / target).resolve()
        assert path.exists(), f"{page.name} links to {target}"
        if anchor and path.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor[1:] in anchors, f"{page.name} links to {target}{anchor}"


def test_pages_name_files_that_are_there() -> None:
    for page in PAGES:
        if page.name == "experiments.md":  # keeps history
            continue
        for name in re.findall(r"`((?:lota|tests|recipes|benchmarks|docs)/[\w/.]+\.(?:py|md|yaml))`", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_the_index_reaches_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / target).resolve() for target, _ in _LINK.findall(index.read_text(encoding="utf-8"))}
    assert set(PAGES) - linked - {index} == set()
    assert "docs/README.md" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tour_names_what_is_in_the_files() -> None:
    """`FILE.py`, `NAME` on a stop of the tour: the file defines the name; a dotted one as a method of a class."""
    text = " ".join((ROOT / "docs" / "tour.md").read_text(encoding="utf-8").split())
    stops = re.findall(r"`(lota/[\w/]+\.py)`, `([\w.]+)`", text)
    assert len(stops) > 20
    for file, name in stops:
        source = (ROOT / file).read_text(encoding="utf-8")
        for part in name.split("."):
            assert re.search(rf"^ *(?:def|class) {part}\b", source, re.MULTILINE), f"{file} defines no {part}"


def test_the_table_of_rooms_has_all_of_them() -> None:
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = page[page.index("## Rooms") : page.index("## The seam")]
    for path in (ROOT / "lota").iterdir():
        if path.name[0] not in "_." and (path.is_dir() or path.suffix == ".py"):
            assert f"`{path.name}{'/' * path.is_dir()}`" in table, f"docs/design.md, Rooms, lacks {path.name}"


def test_recipes_are_front_doors() -> None:
    """A docstring with the commands, an import, a call."""
    for path in (ROOT / "recipes").glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 60, path.name
