"""Denoised images, scores, evidence and samples have the same bits alone and in any batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.denoisers import KINDS, SHAPE, answers_of, build, random_images, run
from tests.support.examples import examples
from torch import Tensor

from els_service.denoisers.answers import score
from els_service.denoisers.banks import Bank
from els_service.denoisers.base import Denoiser, Query, concatenate, make_query
from els_service.denoisers.levels import from_alpha_bar, from_sigma
from els_service.denoisers.noise import seeded_noise
from els_service.denoisers.samplers import SAMPLERS, Options

POOL = 8
SIGMA = [0.05, 0.1, 0.5, 0.5, 1.0, 3.0, 20.0, 80.0]
LABELS = [-1, 0, 2, 2, -1, 0, 0, -1]
WINDOWS = [0, 3, 5, 5, 0, 1, 3, 3]


def pool(denoiser: Denoiser) -> list[Query]:
    """Queries of one image, mixed in all that a query may choose; some like each other."""
    x = random_images((POOL, *SHAPE), 5)
    queries = []
    for b in range(POOL):
        label = LABELS[b] if denoiser.info.label_count else -1
        window = WINDOWS[b] if denoiser.info.max_window else 0
        convention = from_sigma if b % 2 else lambda s: from_alpha_bar(1 / (1 + np.square(s)))
        queries.append(make_query(x[b : b + 1], convention(np.array([SIGMA[b]])), label, window))
    return queries


def answer(denoiser: Denoiser, query: Query) -> list[Tensor]:
    """Mean, score, and evidence where there is one."""
    denoised = denoiser.denoise(query)
    evidence = [] if denoised.log_evidence is None else [torch.from_numpy(denoised.log_evidence)]
    return [denoised.mean, score(query, denoised.mean), *evidence]


@pytest.fixture(scope="session")
def alone(denoiser: Denoiser) -> list[list[Tensor]]:
    return [answer(denoiser, query) for query in pool(denoiser)]


@given(images=st.lists(st.integers(0, POOL - 1), min_size=1, max_size=9))
@examples(10)
def test_an_answer_is_the_same_alone_and_in_any_batch_in_any_order(
    denoiser: Denoiser, alone: list[list[Tensor]], images: list[int]
) -> None:
    queries = pool(denoiser)
    together = answer(denoiser, concatenate([queries[i] for i in images]))
    for place, i in enumerate(images):
        assert all(torch.equal(g[place], w[0]) for g, w in zip(together, alone[i], strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sample_is_the_same_alone_and_in_a_batch(labelled: Bank, kind: str, sampler: str) -> None:
    denoiser, options = build(kind, labelled), Options(3, churn=1.0)
    labels = [2, -1, 0] if denoiser.info.label_count else [-1] * 3
    _, together = run(
        SAMPLERS[sampler](seeded_noise(6, 3, SHAPE), options), answers_of(denoiser, labels)
    )
    for image, label in enumerate(labels):
        noise = seeded_noise(6, 1, SHAPE, first=image)
        _, alone = run(SAMPLERS[sampler](noise, options), answers_of(denoiser, label))
        for ours, its in zip(together, alone, strict=True):
            assert torch.equal(ours.x[image], its.x[0])
            assert torch.equal(ours.denoised[image], its.denoised[0])
