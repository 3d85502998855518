"""A computation tells that it goes on, and ends between two tiles once nobody wants its answer."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from tests.kernels.cases import operator, random_bank, random_case

from els_kernels import ComputationStoppedError, Control, Geometry, checkpoint

SHAPE = (5, 1, 4, 5)
PROMPT_S = 2.0


def test_progress_grows_and_the_bits_are_those_of_an_unwatched_computation(
    on_cpu: str, geometry: Geometry
) -> None:
    case = random_case(geometry, SHAPE)
    attention = operator(case.bank, on_cpu)
    alone = case.ask(attention)
    with Control() as control:
        watched = case.ask(attention)
    assert control.progress >= len(case)
    assert torch.equal(watched.mean, alone.mean)
    assert torch.equal(watched.log_evidence, alone.log_evidence)


def test_a_computation_that_was_stopped_has_no_answer_and_the_next_one_has(
    on_cpu: str, geometry: Geometry
) -> None:
    case = random_case(geometry, SHAPE)
    attention = operator(case.bank, on_cpu)
    expected = case.ask(attention)
    control = Control()
    control.stop()
    with control, pytest.raises(ComputationStoppedError):
        case.ask(attention)
    assert torch.equal(case.ask(attention).mean, expected.mean)


def test_a_computation_of_many_seconds_ends_soon_after_it_is_stopped(compiled: str) -> None:
    attention = operator(random_bank((2_000, 3, 32, 32)), compiled)
    control, ended = Control(), threading.Event()
    stopped: list[bool] = []

    def compute() -> None:
        x, one = torch.zeros(16, 3, 32, 32), torch.ones(16)
        window, geometry = torch.full((16,), 7), Geometry("every", "zeros")
        try:
            with control:
                attention(x, a=one, s=one, window=window, geometry=geometry)
        except ComputationStoppedError:
            stopped.append(True)
        ended.set()

    worker = threading.Thread(target=compute)
    worker.start()
    deadline = time.monotonic() + 30
    while control.progress < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not ended.is_set()
    control.stop()
    assert ended.wait(PROMPT_S)
    worker.join()
    assert stopped == [True]


def test_a_control_counts_its_own_computation_alone() -> None:
    outer, inner = Control(), Control()
    checkpoint()
    with outer:
        checkpoint()
        with inner:
            checkpoint()
            checkpoint()
    checkpoint()
    assert (outer.progress, inner.progress) == (1, 2)


def test_a_stopped_control_ends_what_looks_at_it() -> None:
    control = Control()
    assert not control.stopped
    control.stop()
    assert control.stopped
    with control, pytest.raises(ComputationStoppedError):
        checkpoint()
    checkpoint()
