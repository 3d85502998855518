"""How networks are run: buckets, precision, compilation, and the same bits in any company."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.denoisers import random_images
from tests.support.examples import examples
from tests.support.networks import SHAPE, WIDTHS, config, denoiser

from els_service.denoisers.base import Query, concatenate, make_query
from els_service.denoisers.levels import from_alpha_bar, from_sigma
from els_service.denoisers.networks import (
    Execution,
    Network,
    NetworkDenoiser,
    NetworkDocument,
    build_network,
)
from els_service.denoisers.networks import denoiser as module
from els_service.errors import ElsError

POOL = 7
SIGMA = [0.01, 0.1, 0.5, 0.5, 3.0, 20.0, 1e5]
LABELS = [-1, 0, 2, 2, -1, 1, 0]


def pool() -> list[Query]:
    """Queries of one image, mixed in all that a query may choose."""
    x = random_images((POOL, *SHAPE), 5)
    return [
        make_query(
            x[b : b + 1],
            from_sigma([SIGMA[b]]) if b % 2 else from_alpha_bar([1 / (1 + SIGMA[b] ** 2)]),
            LABELS[b],
        )
        for b in range(POOL)
    ]


def relative_error(got: Any, want: Any) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.fixture(scope="module", params=WIDTHS)
def fixed(request: pytest.FixtureRequest) -> NetworkDenoiser:
    return denoiser(config(str(request.param)), deterministic=True, buckets=(4,))


@given(images=st.lists(st.integers(0, POOL - 1), min_size=1, max_size=9))
@examples(15)
def test_a_deterministic_network_gives_the_same_bits_in_any_company(
    fixed: NetworkDenoiser, images: list[int]
) -> None:
    assert fixed.info.batch_invariant
    queries = pool()
    together = fixed.denoise(concatenate([queries[i] for i in images])).pixels
    for place, i in enumerate(images):
        np.testing.assert_array_equal(together[place], fixed.denoise(queries[i]).pixels[0])


@pytest.mark.parametrize("offset", range(1, 5))
def test_where_the_caller_s_memory_begins_does_not_matter(
    fixed: NetworkDenoiser, offset: int
) -> None:
    query = concatenate(pool()[:3])
    memory = np.empty(query.pixels.size + offset, np.float32)
    moved = memory[offset:].reshape(query.pixels.shape)
    moved[:] = query.pixels
    got = fixed.denoise(Query(moved, query.level, query.labels, query.windows)).pixels
    np.testing.assert_array_equal(got, fixed.denoise(query).pixels)


@pytest.mark.parametrize("buckets", [(), (1,), (2, 4), (16,)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_buckets_and_layout_change_no_answer(buckets: tuple[int, ...], channels_last: bool) -> None:
    query, of = concatenate(pool()), config("unet")
    want = denoiser(of).denoise(query).pixels
    model = denoiser(of, buckets=buckets, channels_last=channels_last)
    assert not model.info.batch_invariant
    for i, got in enumerate(model.denoise(query).pixels):
        assert relative_error(got, want[i]) < 1e-5


def test_a_batch_runs_at_the_next_bucket_and_a_larger_one_in_parts() -> None:
    launches = denoiser(config(), buckets=(2, 4))._launches
    assert list(launches(1)) == [(slice(0, 1), 2)]
    assert list(launches(3)) == [(slice(0, 3), 4)]
    assert list(launches(9)) == [(slice(0, 4), 4), (slice(4, 8), 4), (slice(8, 9), 2)]


def test_time_is_predicted_with_the_padding() -> None:
    seconds = [
        denoiser(config(widths=(64,)), buckets=(4,)).predict_seconds(concatenate(pool()[:n]))
        for n in (1, 4, 5)
    ]
    launch = module._LAUNCH_S
    assert seconds[0] == seconds[1]
    assert seconds[2] - launch == pytest.approx(2 * (seconds[0] - launch))


@pytest.mark.parametrize("architecture", WIDTHS)
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_is_half_the_memory_and_close(architecture: str, precision: str) -> None:
    of, query = config(architecture, prediction="x0"), concatenate(pool())
    full, half = denoiser(of), denoiser(of, precision=precision)
    assert 2 * half.info.memory_bytes == full.info.memory_bytes
    assert precision in half.info.implementation
    error = relative_error(half.denoise(query).pixels, full.denoise(query).pixels)
    assert 1e-6 < error < 0.03


def test_what_float16_cannot_hold_is_refused_and_never_answered() -> None:
    of, x = config(), torch.full((2, *config().shape), 1.0)
    x[1] = 1e6
    query = make_query(x, from_sigma(np.array([1.0, 1.0])))
    assert np.isfinite(denoiser(of, precision="bfloat16").denoise(query).pixels).all()
    half = denoiser(of, precision="float16")
    assert np.isfinite(half.denoise(query[:1]).pixels).all()
    with pytest.raises(ElsError, match="the network returned NaN or infinity in float16"):
        half.denoise(query)
    network = build_network(of)
    network.state_dict()["body.up.weight"].fill_(6e4)
    document = NetworkDocument(of, Execution(precision="float16", deterministic=True))
    with pytest.raises(ValueError, match="deterministic: expected finite results in float16"):
        NetworkDenoiser(network, document)
    network = build_network(of)
    network.state_dict()["body.up.weight"].fill_(1e5)
    document = NetworkDocument(of, Execution(precision="float16"))
    with pytest.raises(ValueError, match=r"body\.up\.weight: expected numbers within the range"):
        NetworkDenoiser(network, document)


def test_determinism_that_a_library_does_not_give_is_not_promised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forward = Network.forward

    def placed(self: Any, x: torch.Tensor, time: Any, labels: Any) -> torch.Tensor:
        return forward(self, x, time, labels) + 1e-6 * torch.arange(len(x), device=x.device).view(
            -1, 1, 1, 1
        )

    monkeypatch.setattr(Network, "forward", placed)
    with pytest.raises(ValueError, match="deterministic: expected the same bits at every place"):
        denoiser(config(), deterministic=True)


# torch's compiler imports what torch itself has deprecated.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
# On a CPU it writes C++.
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="compiling needs a C++ compiler")
def test_a_compiled_network_answers_alike() -> None:
    of, query = config(widths=(4,), blocks=1), concatenate(pool()[:3])
    model = denoiser(of, compile="default", buckets=(4,))
    assert (model.info.engine, model.info.engine_reason) == ("compile", "")
    got, want = model.denoise(query).pixels, denoiser(of).denoise(query).pixels
    for ours, plain in zip(got, want, strict=True):
        assert relative_error(ours, plain) < 1e-5


def test_answers_are_the_caller_s_own_and_carry_no_gradient() -> None:
    model, query = denoiser(config()), pool()[0]
    first = model.denoise(query)
    kept = first.pixels.copy()
    model.denoise(pool()[1])
    np.testing.assert_array_equal(first.pixels, kept)
    assert first.pixels.flags["C_CONTIGUOUS"]
    assert first.pixels.dtype == np.float32
    first.pixels[:] = 0
    np.testing.assert_array_equal(model.denoise(query).pixels, kept)
