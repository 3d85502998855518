import math

import numpy as np
import pytest
import torch
from tests.support.denoisers import KINDS, SHAPE, build, random_images

from els_kernels import GEOMETRIES, PatchAttention
from els_service.denoisers.analytic import AnalyticDenoiser
from els_service.denoisers.banks import Bank, make_bank
from els_service.denoisers.base import BankInfo, make_query
from els_service.denoisers.levels import from_sigma, from_time
from els_service.denoisers.windows import WindowTable, default_windows
from els_service.errors import InvalidArgumentError

ANALYTIC = ["-".join(name) for name in GEOMETRIES]
WINDOWED = ["local-zeros", "local-circular", "els-zeros", "els-circular", "els-valid"]
LEVELS = from_time([0.05, 0.3, 0.6, 1.0])


def noisy() -> torch.Tensor:
    return random_images((4, *SHAPE), 5)


@pytest.mark.parametrize("kind", ANALYTIC)
def test_a_machine_is_a_row_of_the_table_over_patch_attention(labelled: Bank, kind: str) -> None:
    denoiser, labels = build(kind, labelled), [0, -1, 2, -1]
    got = denoiser.denoise(make_query(noisy(), LEVELS, labels))
    machine, padding = kind.split("-")
    table = denoiser.info.window
    want = PatchAttention(labelled.pixels())(
        noisy(),
        a=torch.tensor(LEVELS.a),
        s=torch.tensor(LEVELS.s),
        window=None if table is None else torch.from_numpy(table.at(LEVELS.sigma)),
        ranges=torch.tensor([[0, 5], [0, 9], [5, 9], [0, 9]]),
        geometry=GEOMETRIES[machine, padding],
    )
    assert torch.equal(got.mean, want.mean)
    assert got.log_evidence is not None
    assert np.array_equal(got.log_evidence, want.log_evidence.numpy())


@pytest.mark.parametrize("kind", ANALYTIC)
def test_a_label_restricts_the_bank_to_its_images(labelled: Bank, kind: str) -> None:
    part = make_bank(labelled.images[5:])
    got = build(kind, labelled).denoise(make_query(noisy(), LEVELS, 2)).mean
    want = build(kind, part).denoise(make_query(noisy(), LEVELS)).mean
    # Centred by another mean of the bank: the budget for two float32 answers.
    error = (got - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)
    assert (error <= 1e-4).all()


def test_info_says_what_the_machine_is(labelled: Bank) -> None:
    info = build("els-zeros", labelled).info
    assert (info.kind, info.machine, info.padding) == ("analytic", "els", "zeros")
    assert (info.shape, info.max_window, info.schedule) == (SHAPE, 11, "cosine")
    assert (info.label_count, info.label_names) == (3, ("shirt", "none", "boot"))
    assert info.bank == BankInfo(labelled.fingerprint, 9, "random", "CC0")
    assert info.batch_invariant
    assert info.has_log_evidence
    assert info.implementation in {"native", "torch"}


@pytest.mark.parametrize("machine", ["ideal", "equivariant"])
@pytest.mark.parametrize("padding", ["zeros", "circular", "valid"])
def test_padding_is_ignored_by_machines_that_see_the_whole_image(
    labelled: Bank, machine: str, padding: str
) -> None:
    info = build(f"{machine}-{padding}", labelled).info
    assert info.padding == {"ideal": "zeros", "equivariant": "circular"}[machine]
    assert (info.window, info.max_window) == (None, 0)


@pytest.mark.parametrize("kind", ["local-valid", "els-mirror", "memory-zeros"])
def test_valid_is_for_els_alone_and_the_unknown_is_refused(labelled: Bank, kind: str) -> None:
    with pytest.raises(ValueError, match=f"expected ideal with .*, got {kind.split('-')[0]} with"):
        build(kind, labelled)


@pytest.mark.parametrize(
    ("kind", "largest"),
    [("els-zeros", 11), ("local-zeros", 11), ("els-circular", 5), ("els-valid", 5)],
)
def test_the_default_windows_are_clipped_to_what_is_legal(
    labelled: Bank, kind: str, largest: int
) -> None:
    info = build(kind, labelled).info
    assert info.max_window == largest
    assert info.window == default_windows().clipped(largest)


def test_a_larger_image_has_the_default_windows_whole() -> None:
    bank = make_bank(np.zeros((1, 1, 20, 20), np.uint8))
    assert build("els-circular", bank).info.window == default_windows()


@pytest.mark.parametrize("kind", WINDOWED)
def test_a_window_larger_than_is_legal_is_refused(labelled: Bank, kind: str) -> None:
    largest = 11 if kind.endswith("zeros") else 5
    build(kind, labelled, window=WindowTable.constant(largest))
    with pytest.raises(ValueError, match=f"expected at most {largest} here, got {largest + 2}"):
        build(kind, labelled, window=WindowTable((0.1, 1.0), (largest + 2, 3)))


@pytest.mark.parametrize("kind", WINDOWED)
def test_a_window_of_an_image_overrides_the_models(labelled: Bank, kind: str) -> None:
    denoiser = build(kind, labelled, window=WindowTable.constant(3))
    mixed = denoiser.denoise(make_query(noisy(), LEVELS, windows=[0, 5, 1, 3])).mean
    for b, k in enumerate([3, 5, 1, 3]):
        constant = build(kind, labelled, window=WindowTable.constant(k))
        alone = constant.denoise(make_query(noisy()[b : b + 1], LEVELS[b : b + 1])).mean
        assert torch.equal(mixed[b], alone[0])


@pytest.mark.parametrize("kind", ANALYTIC)
def test_every_label_with_images_and_every_legal_window_passes_the_check(
    labelled: Bank, kind: str
) -> None:
    denoiser = build(kind, labelled)
    legal = [0, *range(1, denoiser.info.max_window + 1, 2)]
    for window in legal:
        denoiser.check(make_query(noisy(), LEVELS, [-1, 0, 2, -1], window))


@pytest.mark.parametrize("label", [-2, 3, 2**40])
def test_a_label_out_of_range_is_refused(labelled: Bank, label: int) -> None:
    with pytest.raises(InvalidArgumentError, match=f"labels: expected -1 to 2, got {label}"):
        build("els-zeros", labelled).check(make_query(noisy(), LEVELS, [-1, 0, 2, label]))


def test_a_label_without_images_is_refused(labelled: Bank) -> None:
    with pytest.raises(InvalidArgumentError, match="label: expected a label with images"):
        build("els-zeros", labelled).check(make_query(noisy(), LEVELS, 1))


def test_an_unlabelled_bank_takes_no_label(unlabelled: Bank) -> None:
    denoiser = build("els-zeros", unlabelled)
    denoiser.check(make_query(noisy(), LEVELS, -1))
    with pytest.raises(InvalidArgumentError, match="labels: expected none for an unlabelled model"):
        denoiser.check(make_query(noisy(), LEVELS, [-1, -1, 0, -1]))


@pytest.mark.parametrize("window", [-3, -1, 2, 4, 7, 13])
def test_a_window_that_is_even_or_too_large_is_refused(labelled: Bank, window: int) -> None:
    with pytest.raises(
        InvalidArgumentError, match=f"windows: expected odd from 1 to 5, got {window}"
    ):
        build("els-circular", labelled).check(
            make_query(noisy(), LEVELS, windows=[0, 1, 3, window])
        )


@pytest.mark.parametrize("kind", ["ideal-zeros", "equivariant-circular"])
def test_a_window_for_a_machine_that_sees_the_whole_image_is_refused(
    labelled: Bank, kind: str
) -> None:
    with pytest.raises(InvalidArgumentError, match="windows: expected none for a model without"):
        build(kind, labelled).check(make_query(noisy(), LEVELS, windows=3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 5, 6), (2, 6, 5), (2, 5, 7)])
def test_an_image_of_another_shape_is_refused(
    labelled: Bank, kind: str, shape: tuple[int, int, int]
) -> None:
    expected = r"x: expected shape \[B, 2, 5, 6\], got \[3, "
    with pytest.raises(InvalidArgumentError, match=expected):
        build(kind, labelled).check(make_query(torch.zeros(3, *shape), from_sigma([1.0])))


def test_models_of_one_bank_share_its_attention(labelled: Bank) -> None:
    attention = PatchAttention(labelled.pixels(), implementation="reference")
    local, els = (AnalyticDenoiser(attention, labelled, machine=m) for m in ("local", "els"))
    assert local.info.implementation == els.info.implementation == "reference"
    assert local.info.padding == els.info.padding == "zeros"


@pytest.mark.parametrize("kind", ANALYTIC)
def test_more_images_and_wider_sources_are_predicted_to_take_longer(
    labelled: Bank, kind: str
) -> None:
    denoiser = build(kind, labelled)
    one, many = make_query(noisy()[:1], LEVELS[:1]), make_query(noisy(), LEVELS)
    label = make_query(noisy()[:1], LEVELS[:1], 2)
    seconds = [denoiser.predict_seconds(query) for query in (label, one, many)]
    assert 0 < seconds[0] < seconds[1] < seconds[2] < math.inf
