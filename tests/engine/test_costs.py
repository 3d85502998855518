"""What is learned of a model's speed."""

from __future__ import annotations

import numpy as np
import pytest

from els_service.engine.costs import CostModel


def taught(*pairs: tuple[float, float]) -> CostModel:
    model = CostModel()
    for now, (estimate, seconds) in enumerate(pairs):
        model.learn(estimate, seconds, now)
    return model


def test_before_anything_was_seen_the_estimate_is_the_prediction() -> None:
    model = CostModel()
    assert model.seconds(0.3) == 0.3
    assert not model.is_calibrated(0.0)


@pytest.mark.parametrize("factor", [0.01, 1.0, 50.0])
def test_one_batch_corrects_a_wrong_estimate(factor: float) -> None:
    assert taught((0.1, 0.1 * factor)).seconds(0.2) == pytest.approx(0.2 * factor)


def test_the_cost_of_a_launch_is_told_from_that_of_its_images() -> None:
    model = taught(*((n, 0.05 + 0.01 * n) for n in (1, 8, 3, 12, 1, 5, 8, 2)))
    assert model.seconds(0.0) == pytest.approx(0.05, rel=0.01)
    assert model.marginal(1.0) == pytest.approx(0.01, rel=0.01)
    assert model.upper_bound(4) == pytest.approx(0.09, rel=0.3)


def test_a_change_of_speed_is_learned_in_a_few_batches() -> None:
    model = taught(*[(1.0, 1.0)] * 50, *[(1.0, 3.0)] * 15)
    assert 2.5 < model.seconds(1.0) <= 3.01


def test_one_pause_of_the_machine_does_not_ruin_the_prediction() -> None:
    model = taught(*[(1.0, 1.0)] * 50, (1.0, 1000.0))
    assert model.seconds(1.0) < 1.5


def test_noise_widens_the_margin_and_not_the_prediction() -> None:
    rng = np.random.default_rng(0)
    model = taught(*((1.0, 1 + rng.uniform(-0.3, 0.3)) for _ in range(200)))
    assert model.seconds(1.0) == pytest.approx(1.0, abs=0.15)
    assert 1.15 < model.upper_bound(1.0) < 1.7


def test_a_prediction_is_trusted_after_some_batches_and_not_for_ever() -> None:
    model = taught(*[(1.0, 1.0)] * 3)
    assert model.is_calibrated(5.0)
    assert not model.is_calibrated(50.0)


def test_what_is_known_of_batches_of_many_seconds_is_not_stale_before_the_next_one() -> None:
    model = CostModel()
    for batch in range(3):
        model.learn(17.0, 17.0, 17.0 * batch)
    assert model.is_calibrated(34.0 + 60.0)
    assert not model.is_calibrated(34.0 + 70.0)


def test_no_prediction_is_negative() -> None:
    model = taught(*((n, 5.0 - 0.1 * n) for n in (1, 8, 3, 12, 1, 5, 8, 2)))
    assert model.seconds(0.0) >= 0
    assert model.marginal(1.0) > 0


@pytest.mark.parametrize(
    ("model", "estimate", "refuses"),
    [
        (CostModel(), 2.6, True),
        (CostModel(), 2.4, False),
        # A machine that is faster than was estimated, by what was seen once.
        (taught((1.0, 0.1)), 2.6, False),
        (taught((1.0, 0.1)), 26.0, True),
        # One that was slower than was estimated once may have been paused.
        (taught((1.0, 100.0)), 2.4, False),
        (taught(*[(1.0, 1.0)] * 3), 0.0, True),
    ],
)
def test_a_prediction_refuses_before_it_is_trusted_if_it_is_several_times_too_late(
    model: CostModel, estimate: float, refuses: bool
) -> None:
    assert model.may_reject(estimate, 1.0, now=5.0) is refuses


def test_a_short_first_question_shows_a_faster_machine_but_not_a_slower_one() -> None:
    for seconds, expected in ((0.001, 0.1), (0.009, 0.9), (0.02, 2.0)):
        model = CostModel()
        model.calibrate(0.01, seconds)
        assert model.seconds(1.0) == pytest.approx(expected)
    model = CostModel()
    model.calibrate(0.0001, 0.009)
    assert model.seconds(1.0) == 1.0


def test_what_was_learned_outranks_a_first_question() -> None:
    model = taught((1.0, 2.0))
    model.calibrate(1.0, 5.0)
    assert model.seconds(1.0) == 2.0
