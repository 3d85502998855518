"""The documentation: links lead to files, and what is promised of its length holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/*.md", "deploy/**/*.md", "benchmarks/results/*.md")
    for path in ROOT.glob(pattern)
)
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)|<img src=\"([^\"]+)\"")
_TARGET = re.compile(r"^([a-z][a-z-]*):", re.MULTILINE)
_CODE = re.compile(r"`([^`\n]+)`")
_MADE = re.compile(r"`make ([a-z-]+)`")
_TOUR = re.compile(r"^\| \[`([^`]+)`\]", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_of_a_page_lead_to_files(page: Path) -> None:
    links = [one or other for one, other in _LINK.findall((ROOT / page).read_text())]
    local = [link for link in links if "://" not in link]
    missing = [link for link in local if not (ROOT / page.parent / link).exists()]
    assert not missing


def test_the_readme_has_at_most_120_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_tour_has_at_most_1500_lines() -> None:
    files = _TOUR.findall((ROOT / "docs" / "architecture.md").read_text())
    assert files
    assert sum(len((ROOT / name).read_text().splitlines()) for name in files) <= 1500


def test_the_page_of_commands_has_every_target_of_make_and_no_other() -> None:
    defined = set(_TARGET.findall((ROOT / "Makefile").read_text()))
    page = (ROOT / "docs" / "commands.md").read_text()
    named = {name for code in _CODE.findall(page) for name in code.split()}
    assert defined <= named
    assert set(_MADE.findall(page)) <= defined
