"""Files reloaded when they change, on a real file system."""

from __future__ import annotations

import errno
import logging
import os
import threading
from pathlib import Path

import pytest

from els_service.errors import LoadError
from els_service.server.security.reloaded_file import STALE, ReloadedFile, warn_if_public

TIMEOUT_S = 10.0


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
def watched(path: Path) -> ReloadedFile[str]:
    return ReloadedFile((path,), lambda: reading(path))


def test_a_changed_file_is_reloaded_and_an_unchanged_one_is_not(path: Path) -> None:
    reads: list[str] = []

    def read() -> str:
        reads.append(path.read_text())
        return reads[-1]

    watched = ReloadedFile((path,), read)
    assert [watched.current() for _ in range(3)] == ["one"] * 3
    path.write_text("second")
    assert [watched.current() for _ in range(3)] == ["second"] * 3
    assert reads == ["one", "second"]


def test_a_file_that_is_replaced_or_a_link_that_turns_elsewhere_is_a_change(
    path: Path, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(path)
    watched = ReloadedFile((link,), lambda: reading(link))
    (tmp_path / "other").write_text("two")
    (tmp_path / "next").symlink_to("other")
    (tmp_path / "next").replace(link)
    assert watched.current() == "two"
    (tmp_path / "new").write_text("six")
    (tmp_path / "new").replace(tmp_path / "other")
    assert watched.current() == "six"


def test_an_invalid_file_leaves_the_last_content_and_is_logged_once(
    path: Path, watched: ReloadedFile[str], caplog: pytest.LogCaptureFixture
) -> None:
    path.write_text("bad")
    with caplog.at_level(logging.ERROR):
        assert [watched.current() for _ in range(3)] == ["one"] * 3
        path.unlink()
        assert watched.current() == "one"
    assert [record.message for record in caplog.records] == [STALE] * 2
    path.write_text("good again")
    assert watched.current() == "good again"


def test_a_file_that_changes_while_it_is_read_is_not_taken(path: Path) -> None:
    during = iter(["begun", "begun and ended"])

    def read() -> str:
        text = path.read_text()
        if text != "one" and (rest := next(during, None)):
            path.write_text(rest)
        return text

    watched = ReloadedFile((path,), read)
    path.write_text("be")
    seen = [watched.current() for _ in range(4)]
    assert seen == ["one", "one", "begun and ended", "begun and ended"]


def test_what_is_read_in_the_background_keeps_nobody_waiting(path: Path) -> None:
    begun, go = threading.Event(), threading.Event()

    def read() -> str:
        if path.read_text() != "one":
            begun.set()
            assert go.wait(TIMEOUT_S)
        return path.read_text()

    watched = ReloadedFile((path,), read, background=True)
    path.write_text("second")
    assert watched.current() == "one"
    assert begun.wait(TIMEOUT_S)
    # Nor does one who asks again start another reader.
    threads = threading.active_count()
    assert [watched.current() for _ in range(100)] == ["one"] * 100
    assert threading.active_count() == threads
    go.set()
    assert watched.stale_s() == 0.0
    assert watched.current() == "second"


def test_a_pipe_in_the_place_of_a_file_is_stale_and_is_not_opened(
    path: Path, watched: ReloadedFile[str], caplog: pytest.LogCaptureFixture
) -> None:
    path.unlink()
    os.mkfifo(path)
    with caplog.at_level(logging.ERROR):
        assert watched.current() == "one"
    assert [record.message for record in caplog.records] == [STALE]
    assert "expected a file" in vars(caplog.records[0])["reason"]
    path.unlink()
    path.write_text("two")
    assert watched.current() == "two"


def test_a_path_that_may_not_be_looked_at_is_stale(
    path: Path, watched: ReloadedFile[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path, **_: object) -> os.stat_result:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    path.write_text("bad")
    monkeypatch.setattr(Path, "stat", denied)
    assert watched.current() == "one"
    assert watched.stale_s() > 0


def test_a_file_that_is_bad_at_the_beginning_is_refused(path: Path) -> None:
    path.write_text("bad")
    with pytest.raises(LoadError, match="bad"):
        ReloadedFile((path,), lambda: reading(path))


def test_between_two_checks_the_file_system_is_not_accessed(path: Path) -> None:
    watched = ReloadedFile((path,), lambda: reading(path), every_s=3600)
    path.write_text("two")
    assert watched.current() == "one"


@pytest.mark.parametrize(("mode", "logged"), [(0o600, 0), (0o640, 0), (0o644, 1)])
def test_a_secret_that_everybody_can_read_is_warned_about(
    path: Path, mode: int, logged: int, caplog: pytest.LogCaptureFixture
) -> None:
    os.chmod(path, mode)
    warn_if_public(path)
    assert len(caplog.records) == logged


class Clock:
    """A clock that is set by the test."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("fault", ["emptied", "removed", "broken"])
def test_a_stale_file_is_logged_each_minute_with_reason_and_age_until_it_is_valid(
    path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    def read() -> str:
        if not (text := reading(path)):
            raise LoadError(path, "expected entries, got none")
        return text

    clock = Clock()
    watched = ReloadedFile((path,), read, clock=clock)
    assert watched.stale_s() == 0.0
    if fault == "removed":
        path.unlink()
    else:
        path.write_text("" if fault == "emptied" else "bad")
    with caplog.at_level(logging.INFO):
        for second in range(150):
            clock.now = 1000.0 + second
            assert watched.current() == "one"
            assert watched.stale_s() == second
        path.write_text("good again")
        assert watched.stale_s() == 0.0
    assert watched.current() == "good again"
    logged = [vars(record) for record in caplog.records if record.levelno == logging.ERROR]
    assert [record["message"] for record in logged] == [STALE] * 3
    assert [record["stale_s"] for record in logged] == [0.0, 60.0, 120.0]
    assert all(str(path) in record["reason"] for record in logged)
    assert len({record["stale_since"] for record in logged}) == 1
    assert caplog.records[-1].levelno == logging.INFO


def test_a_stale_file_whose_permissions_are_put_right_counts_though_it_looks_the_same(
    path: Path,
) -> None:
    clock, refused = Clock(), [False]

    def read() -> str:
        # Whoever runs the tests may read anything.
        if refused[0]:
            raise LoadError(path, "Permission denied")
        return path.read_text()

    watched = ReloadedFile((path,), read, clock=clock)
    refused[0] = True
    path.write_text("second")
    assert watched.current() == "one"
    refused[0] = False
    clock.now += 1.0
    assert (watched.current(), watched.stale_s()) == ("second", 0.0)
