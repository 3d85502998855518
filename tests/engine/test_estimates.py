"""Warm-up and estimates of a model before its first request."""

from __future__ import annotations

from tests.engine.conftest import Recorder

from els_service.engine.estimates import warm


class Compiled(Recorder):
    """A denoiser that compiles."""

    def __init__(self) -> None:
        super().__init__()
        self.compiled_before: int | None = None
        """Number of batches before it was compiled."""

    def warm_up(self) -> None:
        self.compiled_before = len(self.batches)


def test_a_model_is_compiled_before_its_first_query_is_timed() -> None:
    denoiser = Compiled()
    warm(denoiser)
    assert denoiser.compiled_before == 0
    assert denoiser.batches


def test_a_model_too_slow_to_be_timed_is_compiled_nevertheless() -> None:
    denoiser = Compiled()
    denoiser.seconds = 1e3
    warm(denoiser)
    assert denoiser.compiled_before == 0
    assert not denoiser.batches
