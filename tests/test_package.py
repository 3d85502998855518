"""What the package index shows, and what the source distribution holds."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hatchling.builders.sdist import SdistBuilder

ROOT = Path(__file__).parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
HOME = PYPROJECT["project"]["urls"]["Homepage"]


@pytest.fixture(scope="module")
def page() -> str:
    """The README as the index renders it."""
    pytest.importorskip("hatch_fancy_pypi_readme", reason="needs hatch-fancy-pypi-readme")
    markdown = pytest.importorskip("readme_renderer.markdown", reason="needs readme-renderer[md]")
    command = [sys.executable, "-m", "hatch_fancy_pypi_readme", "pyproject.toml"]
    built = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    rendered = markdown.render(built.stdout)
    assert rendered is not None
    return str(rendered)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_index_renders_the_readme_with_its_pictures(page: str) -> None:
    pictures = re.findall(r'<img[^>]* src="([^"]*)"', page)
    raw = HOME.replace("github.com", "raw.githubusercontent.com") + "/main/"
    assert len(pictures) == 4
    assert all(one.startswith(raw) for one in pictures)
    assert all((ROOT / one.removeprefix(raw)).is_file() for one in pictures)
    assert "<table>" in page


def test_links_on_the_index_lead_to_files_of_the_repository(page: str) -> None:
    links = re.findall(r'href="([^"#]+)', page)
    ours = [link.removeprefix(f"{HOME}/blob/main/") for link in links if link.startswith(HOME)]
    assert all(link.startswith("https://") for link in links)
    assert "docs/models.md" in ours
    assert [one for one in ours if not (ROOT / one).exists()] == []


def test_all_that_names_the_project_agrees() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PYPROJECT["project"]["version"]
    assert citation["license"] == PYPROJECT["project"]["license"]
    assert citation["repository-code"] == HOME
    assert all(url.startswith(HOME) for url in PYPROJECT["project"]["urls"].values())


@pytest.mark.slow
def test_the_source_distribution_has_every_file_that_tests_may_read() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs a checkout")
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True)
    files = {one.distribution_path for one in SdistBuilder(str(ROOT)).recurse_included_files()}
    assert set(listed.stdout.split("\n")) - files - {"", ".gitignore"} == set()
