"""Files read anew when they change, on a real file system."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from els_service.errors import LoadError
from els_service.wire.watched import Watched, warn_if_public


def reading(path: Path) -> str:
    """Return the file's text; one that begins with "bad" is refused."""
    try:
        text = path.read_text()
    except OSError as error:
        raise LoadError(path, str(error)) from error
    if text.startswith("bad"):
        raise LoadError(path, "bad")
    return text


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("one")
    return tmp_path / "file"


@pytest.fixture
def watched(path: Path) -> Watched[str]:
    return Watched((path,), lambda: reading(path))


def test_a_changed_file_is_read_anew_and_an_unchanged_one_is_not(path: Path) -> None:
    reads: list[str] = []

    def read() -> str:
        reads.append(path.read_text())
        return reads[-1]

    watched = Watched((path,), read)
    assert [watched.current() for _ in range(3)] == ["one"] * 3
    path.write_text("second")
    assert [watched.current() for _ in range(3)] == ["second"] * 3
    assert reads == ["one", "second"]


def test_a_file_that_is_replaced_or_a_link_that_turns_elsewhere_is_a_change(
    path: Path, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(path)
    watched = Watched((link,), lambda: reading(link))
    (tmp_path / "other").write_text("two")
    (tmp_path / "next").symlink_to("other")
    (tmp_path / "next").replace(link)
    assert watched.current() == "two"
    (tmp_path / "new").write_text("six")
    (tmp_path / "new").replace(tmp_path / "other")
    assert watched.current() == "six"


def test_a_broken_file_leaves_what_was_there_and_is_told_once(
    path: Path, watched: Watched[str], caplog: pytest.LogCaptureFixture
) -> None:
    path.write_text("bad")
    with caplog.at_level(logging.ERROR):
        assert [watched.current() for _ in range(3)] == ["one"] * 3
        path.unlink()
        assert watched.current() == "one"
    assert [record.message for record in caplog.records] == ["kept as it was"] * 2
    path.write_text("good again")
    assert watched.current() == "good again"


def test_a_file_that_changes_while_it_is_read_is_not_taken(path: Path) -> None:
    during = iter(["begun", "begun and ended"])

    def read() -> str:
        text = path.read_text()
        if text != "one" and (rest := next(during, None)):
            path.write_text(rest)
        return text

    watched = Watched((path,), read)
    path.write_text("be")
    seen = [watched.current() for _ in range(4)]
    assert seen == ["one", "one", "begun and ended", "begun and ended"]


def test_a_file_that_is_bad_at_the_beginning_is_refused(path: Path) -> None:
    path.write_text("bad")
    with pytest.raises(LoadError, match="bad"):
        Watched((path,), lambda: reading(path))


def test_between_two_looks_nothing_is_asked_of_the_file_system(path: Path) -> None:
    watched = Watched((path,), lambda: reading(path), every_s=3600)
    path.write_text("two")
    assert watched.current() == "one"


@pytest.mark.parametrize(("mode", "told"), [(0o600, 0), (0o640, 0), (0o644, 1)])
def test_a_secret_that_everybody_can_read_is_warned_about(
    path: Path, mode: int, told: int, caplog: pytest.LogCaptureFixture
) -> None:
    os.chmod(path, mode)
    warn_if_public(path)
    assert len(caplog.records) == told
