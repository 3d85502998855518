"""The native kernel against float64, for every instruction set that this processor has."""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad, unfold

from els_kernels import GEOMETRIES, Geometry, PatchAttention, Posterior, max_window
from els_kernels import attention as attention_module
from els_kernels.attention import Implementation
from els_kernels.native import Native, binding, instruction_sets
from els_kernels.reference import Reference

try:
    SETS = instruction_sets()
except RuntimeError as error:
    # Without a compiler there is no library; the suite passes without it.
    pytest.skip(str(error), allow_module_level=True)

Factory = Callable[[Tensor], Implementation]
IMPLEMENTATIONS = [pytest.param(partial(Native, instruction_set=name), id=name) for name in SETS]
EVERY_GEOMETRY = [pytest.param(value, id="-".join(key)) for key, value in GEOMETRIES.items()]
WINDOWED = [
    pytest.param(value, id="-".join(key)) for key, value in GEOMETRIES.items() if not value.whole
]

# Odd and even sides, H ≠ W, fewer images than lanes, ragged last tiles, channels with and without
# code of their own; 35 columns pass the place where running sums start afresh.
SHAPES = [(1, 1, 6, 6), (37, 1, 9, 7), (19, 3, 7, 8), (17, 2, 5, 11), (40, 4, 6, 6), (2, 1, 3, 35)]

MEAN = 1e-4
"""‖got − want‖ / ‖want‖ of each image: the budget of every fast path."""
EVIDENCE = 8 * torch.finfo(torch.float32).eps
"""Absolute error of a log evidence, as a share of the largest logit before centring."""


class Query(NamedTuple):
    """A batch whose images differ in level, window and range."""

    x: Tensor
    a: list[float]
    s: list[float]
    window: list[int]
    ranges: list[tuple[int, int]]


def levels(times: list[float]) -> tuple[list[float], list[float]]:
    a = [math.cos(math.pi * t / (2 * 1.008)) for t in times]
    return a, [math.sqrt(1 - value * value) for value in a]


def smooth(images: int, channels: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Return images in [-1, 1] whose neighbouring pixels resemble each other."""
    noise = torch.rand(
        images, channels, height + 2, width + 2, generator=torch.Generator().manual_seed(seed)
    )
    return avg_pool2d(noise * 6 - 3, 3, 1).clamp(-1, 1)


def noisy(
    bank: Tensor, times: list[float], seed: int = 1
) -> tuple[Tensor, list[float], list[float]]:
    a, s = levels(times)
    generator = torch.Generator().manual_seed(seed)
    clean = bank[torch.arange(len(times)) * 7 % len(bank)]
    noise = torch.randn(clean.shape, generator=generator)
    scale = torch.tensor([a, s])[:, :, None, None, None]
    return scale[0] * clean + scale[1] * noise, a, s


def make_query(bank: Tensor, window: int, times: list[float]) -> Query:
    """Return images at these levels; their ranges begin and end anywhere."""
    images = len(bank)
    ragged = [(0, images), (images // 3, images // 3 + 1), (images // 2, images)]
    x, a, s = noisy(bank, times)
    return Query(x, a, s, [window] * len(x), [ragged[b % 3] for b in range(len(x))])


def take(query: Query, members: list[int]) -> Query:
    a, s, window, ranges = ([column[b] for b in members] for column in query[1:])
    # The fields are lists of different types, which mypy joins to one.
    return Query(query.x[members], a, s, window, ranges)  # type: ignore[arg-type]


def energy(query: Query, geometry: Geometry) -> Tensor:
    """Return the largest ‖x[u+Ω]‖² / 2s² of each image, [B, 1, 1]: how large a logit gets."""
    squares = query.x.square().sum(1, keepdim=True)
    largest = []
    for b, (s, k) in enumerate(zip(query.s, query.window, strict=True)):
        whole = squares[b].sum()
        box = avg_pool2d(squares[b], k, 1, k // 2).amax() * k * k
        largest.append((whole if geometry.whole else box) / (2 * s * s))
    return torch.stack(largest)[:, None, None]


def assert_close(got: Posterior, want: Posterior, query: Query, geometry: Geometry) -> None:
    error = (got.mean - want.mean).flatten(1).norm(dim=1)
    assert (error <= MEAN * want.mean.flatten(1).norm(dim=1)).all()
    error = (got.log_evidence - want.log_evidence).abs()
    assert (
        error <= EVIDENCE * torch.maximum(energy(query, geometry), want.log_evidence.abs())
    ).all()


def assert_same_bits(got: Posterior, want: Posterior) -> None:
    assert torch.equal(got.mean, want.mean)
    assert torch.equal(got.log_evidence, want.log_evidence)


@cache
def expected(shape: tuple[int, int, int, int], geometry: Geometry) -> list[tuple[Query, Posterior]]:
    """Return queries of every window up to 9 and some beyond, with the reference's answers."""
    bank, windows = smooth(*shape), [1]
    if not geometry.whole:
        legal = range(1, max_window(geometry, *shape[2:]) + 1, 2)
        windows = sorted({*legal[:5], *legal[5 : len(legal) : 5], *legal[-1:]})
    queries = [make_query(bank, window, [0.05, 0.2, 0.5, 0.99]) for window in windows]
    reference = Reference(bank)
    return [(query, reference(*query, geometry)) for query in queries]


@pytest.mark.parametrize("geometry", EVERY_GEOMETRY)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_the_reference_at_every_window(
    implementation: Factory, shape: tuple[int, int, int, int], geometry: Geometry
) -> None:
    attend = implementation(smooth(*shape))
    for query, want in expected(shape, geometry):
        assert_close(attend(*query, geometry), want, query, geometry)


@pytest.mark.parametrize("geometry", WINDOWED)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_each_image_has_its_own_level_window_and_range(
    implementation: Factory, geometry: Geometry
) -> None:
    bank = smooth(53, 3, 8, 7)
    x, a, s = noisy(bank, [0.05, 0.3, 0.6, 0.9, 0.1])
    ranges = [(0, 53), (1, 2), (15, 33), (16, 32), (47, 53)]
    query = Query(x, a, s, [1, 3, 7, 5, 3], ranges)
    got = implementation(bank)(*query, geometry)
    assert_close(got, Reference(bank)(*query, geometry), query, geometry)


@pytest.mark.parametrize("geometry", EVERY_GEOMETRY)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bits_do_not_depend_on_company_order_or_threads(
    implementation: Factory, geometry: Geometry
) -> None:
    bank = smooth(150, 1, 9, 8)
    query = make_query(bank, 1, [0.05, 0.5, 0.8, 0.2, 0.9, 0.4])
    if not geometry.whole:
        query = query._replace(window=[3, 7, 5, 3, 1, 3])
    attend = implementation(bank)
    together = attend(*query, geometry)
    order = [4, 2, 0, 5, 1, 3]
    shuffled = attend(*take(query, order), geometry)
    assert_same_bits(shuffled, Posterior(together.mean[order], together.log_evidence[order]))
    threads = torch.get_num_threads()
    for b in range(len(query.x)):
        torch.set_num_threads(1 + b % 2)
        try:
            alone = attend(*take(query, [b]), geometry)
        finally:
            torch.set_num_threads(threads)
        assert_same_bits(
            alone, Posterior(together.mean[b : b + 1], together.log_evidence[b : b + 1])
        )


@pytest.mark.parametrize("geometry", EVERY_GEOMETRY)
def test_memory_for_partial_results_does_not_show_in_the_bits(geometry: Geometry) -> None:
    # 48 images leave more partial results than are kept at a time.
    bank = smooth(600, 3, 16, 16)
    query = make_query(bank, 1, [0.1, 0.4, 0.7] * 16)
    query = query._replace(ranges=[(0, 600)] * 48)
    together = Native(bank)(*query, geometry)
    last = Native(bank)(*take(query, [47]), geometry)
    assert_same_bits(last, Posterior(together.mean[-1:], together.log_evidence[-1:]))


@pytest.mark.parametrize("geometry", EVERY_GEOMETRY)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_shards_of_a_bank_merge_to_the_whole(implementation: Factory, geometry: Geometry) -> None:
    bank = smooth(61, 1, 8, 8)
    query = make_query(bank, 1 if geometry.whole else 5, [0.3, 0.5, 0.9])
    attend = implementation(bank)
    whole = attend(*query._replace(ranges=[(0, 61)] * 3), geometry)
    cuts = [(0, 5), (5, 23), (23, 61)]
    shards = [attend(*query._replace(ranges=[cut] * 3), geometry) for cut in cuts]
    evidence = torch.stack([shard.log_evidence for shard in shards]).double()
    total = evidence.logsumexp(0)
    weights = (evidence - total).exp()[:, :, None]
    mean = (weights * torch.stack([shard.mean for shard in shards]).double()).sum(0)
    # Evidences are floats: where they are large, their last bit moves the weights of the shards.
    slack = 1e-6 * max(1.0, float(total.abs().max()))
    torch.testing.assert_close(mean, whole.mean.double(), rtol=1e-6, atol=slack)
    torch.testing.assert_close(total, whole.log_evidence.double(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("sigma", [1e-4, 1e4])
@pytest.mark.parametrize("geometry", EVERY_GEOMETRY)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_extreme_levels_give_numbers(
    implementation: Factory, geometry: Geometry, sigma: float
) -> None:
    bank = smooth(21, 3, 8, 8)
    query = make_query(bank, 1 if geometry.whole else 5, [0.5] * 3)
    query = query._replace(x=query.x * max(1.0, sigma), a=[1.0] * 3, s=[sigma] * 3)
    answer = implementation(bank)(*query, geometry)
    assert answer.mean.isfinite().all()
    assert answer.log_evidence.isfinite().all()
    assert answer.mean.amax() <= bank.amax() + 1e-5
    assert answer.mean.amin() >= bank.amin() - 1e-5


def direct_on_torus(query: Query, bank: Tensor, window: int) -> Posterior:
    """Return the posterior of one image by a float64 matmul of unfolded patches."""
    r, (a, s) = window // 2, (query.a[0], query.s[0])

    def patches(images: Tensor) -> Tensor:
        ring = pad(images.double(), (r, r, r, r), mode="circular")
        return unfold(ring, window).transpose(1, 2).flatten(0, 1)

    queries, keys = patches(query.x), patches(bank)
    cross = queries @ keys.T
    norms = queries.square().sum(1)[:, None] + a * a * keys.square().sum(1)
    logits = -(norms - 2 * a * cross) / (2 * s * s)
    mean = logits.softmax(1) @ bank.double().flatten(2).transpose(1, 2).flatten(0, 1)
    return Posterior(
        mean.T.reshape(query.x.shape).float(),
        logits.logsumexp(1).reshape(1, *query.x.shape[2:]).float(),
    )


@pytest.mark.parametrize("window", [3, 17, 31])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_running_sums_do_not_drift_at_low_noise(implementation: Factory, window: int) -> None:
    # s = .05, 32×32, C = 3: logits of 1e5, where a float's last bit is 8e-3.
    bank = smooth(8, 3, 32, 32)
    s = 0.05
    a = math.sqrt(1 - s * s)
    x = a * bank[3:4] + s * torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    query = Query(x, [a], [s], [window], [(0, 8)])
    geometry = GEOMETRIES["els", "circular"]
    got = implementation(bank)(*query, geometry)
    assert_close(got, direct_on_torus(query, bank, window), query, geometry)


def test_a_strided_query_and_bank_are_read_as_they_look() -> None:
    bank = smooth(20, 3, 8, 8)
    strided = bank.to(memory_format=torch.channels_last)
    query = make_query(bank, 3, [0.5])
    geometry = GEOMETRIES["els", "zeros"]
    turned = query._replace(x=query.x.to(memory_format=torch.channels_last))
    assert_same_bits(Native(strided)(*turned, geometry), Native(bank)(*query, geometry))


def test_auto_takes_native_for_a_bank_on_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger=attention_module.__name__):
        attention = PatchAttention(smooth(3, 1, 4, 4))
    assert attention.implementation == "native"
    assert "auto chose native" in caplog.text


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "LIBRARY", binding.LIBRARY.with_name("missing.so"))
    monkeypatch.setattr(binding, "_library", binding._library.__wrapped__)


@pytest.mark.usefixtures("no_library")
def test_without_the_library_native_says_why_and_auto_takes_torch() -> None:
    bank = smooth(3, 1, 4, 4)
    with pytest.raises(RuntimeError, match=r"missing\.so was not built"):
        PatchAttention(bank, implementation="native")
    assert PatchAttention(bank).implementation == "torch"


def test_an_unknown_instruction_set_is_an_error_that_names_the_known() -> None:
    with pytest.raises(ValueError, match=r"instruction_set: expected one of .*, got 'mmx'"):
        Native(smooth(3, 1, 4, 4), instruction_set="mmx")


def test_a_whole_window_of_every_place_needs_the_torus() -> None:
    bank = smooth(3, 1, 4, 4)
    geometry = Geometry("every", "zeros", whole=True)
    with pytest.raises(ValueError, match="on the torus only"):
        Native(bank)(*make_query(bank, 1, [0.5]), geometry)
