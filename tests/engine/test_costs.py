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
    assert not model.trusted(0.0)


@pytest.mark.parametrize("factor", [0.01, 1.0, 50.0])
def test_one_batch_corrects_a_wrong_estimate(factor: float) -> None:
    assert taught((0.1, 0.1 * factor)).seconds(0.2) == pytest.approx(0.2 * factor)


def test_the_cost_of_a_launch_is_told_from_that_of_its_images() -> None:
    model = taught(*((n, 0.05 + 0.01 * n) for n in (1, 8, 3, 12, 1, 5, 8, 2)))
    assert model.seconds(0.0) == pytest.approx(0.05, rel=0.01)
    assert model.marginal(1.0) == pytest.approx(0.01, rel=0.01)
    assert model.at_most(4) == pytest.approx(0.09, rel=0.3)


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
    assert 1.15 < model.at_most(1.0) < 1.7


def test_a_prediction_is_trusted_after_some_batches_and_not_for_ever() -> None:
    model = taught(*[(1.0, 1.0)] * 3)
    assert model.trusted(5.0)
    assert not model.trusted(50.0)


def test_no_prediction_is_negative() -> None:
    model = taught(*((n, 5.0 - 0.1 * n) for n in (1, 8, 3, 12, 1, 5, 8, 2)))
    assert model.seconds(0.0) >= 0
    assert model.marginal(1.0) > 0
