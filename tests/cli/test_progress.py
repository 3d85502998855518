"""Progress of commands, on a terminal and in a log."""

from __future__ import annotations

import sys
from contextlib import suppress

import pytest

from els_service.cli.progress import Progress


def test_without_a_terminal_progress_is_a_line_every_few_seconds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seconds = iter([0.0, 1.0, 5.0, 6.0, 9.9, 10.0])
    progress = Progress("Reading", every_s=5.0, quiet_s=5.0, clock=lambda: next(seconds))
    for done in range(1, 6):
        progress(done, 5, f"{done} of 5 images")
    first, second = capsys.readouterr().err.splitlines()
    assert "40%  2 of 5 images  0.2 min left" in first
    assert "100%  5 of 5 images" in second


def test_quick_work_prints_nothing_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("Reading", quiet_s=5.0) as progress:
        progress(5, 5)
    assert capsys.readouterr().err == ""


def test_on_a_terminal_an_interrupted_bar_ends_with_a_newline(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with suppress(KeyboardInterrupt), Progress("Reading") as progress:
        progress(1, 5)
        raise KeyboardInterrupt
    text = capsys.readouterr().err
    assert "20%" in text
    assert text.removesuffix("\x1b[?25h").endswith("\n")  # shows the cursor, which a bar hides
