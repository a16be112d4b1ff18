"""Pages that a script writes are what it writes now, links lead somewhere, and the recipes are as thin as they say."""

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


def test_recipes_are_front_doors() -> None:
    """A docstring with the commands, an import, a call."""
    for path in (ROOT / "recipes").glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 60, path.name
