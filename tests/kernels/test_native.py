"""What is the native kernel's own, for every instruction set that this processor has."""

import functools
import math
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.kernels.cases import (
    NAMES,
    VARIANTS,
    Case,
    assert_within_budget,
    operator,
    random_bank,
    random_case,
)
from tests.kernels.conftest import variant
from tests.support.rows import latin
from torch import Tensor
from torch.nn.functional import pad, unfold

from els_kernels import GEOMETRIES, PatchAttention, Posterior
from els_kernels import attention as attention_module
from els_kernels.__main__ import main
from els_kernels.native import Native, binding, instruction_sets

BANK = torch.zeros(3, 1, 4, 4)


@pytest.fixture(params=[variant(name) for name in VARIANTS if name.startswith("native")])
def native(request: pytest.FixtureRequest) -> str:
    """One instruction set."""
    return str(request.param)


@pytest.fixture
def best() -> str:
    """The widest instruction set."""
    try:
        return f"native-{instruction_sets()[0]}"
    except RuntimeError as error:
        # Without a compiler there is no library; the suite passes without it.
        pytest.skip(str(error))


@functools.cache
def with_large_windows(name: str, shape: tuple[int, int, int, int]) -> tuple[Case, Posterior]:
    """Return queries with the answers of the specification."""
    windows = [1, 3, 9, 69] if name.endswith("zeros") else [1, 3]
    case = random_case(NAMES[name], shape, windows)
    return case, case.attend("reference")


SIDES = [(1, 1), (1, 2), (2, 3), (4, 8), (9, 7), (5, 16), (11, 6), (1, 37), (3, 25)]
"""Of radix 2, 4 and the odd primes, once and several times, on either axis."""


@pytest.mark.parametrize("side", SIDES, ids=str)
def test_translations_equal_the_reference_whatever_the_factors_of_the_sides(
    native: str, side: tuple[int, int]
) -> None:
    # More images than a vector of lanes, and a range that starts and ends within one.
    case = random_case(NAMES["equivariant-circular"], (19, 2, *side), [1, 1])
    case = replace(case, ranges=torch.tensor([[0, 19], [0, 19], [3, 18], [3, 18]]))
    got, want = case.attend(native), case.attend("reference")
    assert_within_budget(case, got, want)
    # Double precision: what is left is the rounding of the bank, of its centre and of the answer.
    assert (got.log_evidence - want.log_evidence).abs().max() <= 1e-5 * (
        1 + want.log_evidence.abs().max()
    )


# Four images share the spectra of small bank images, and two of the large ones.
@pytest.mark.parametrize("shape", [(20, 2, 5, 4), (3, 16, 48, 40)], ids=str)
def test_images_that_share_the_spectra_of_a_bank_have_the_bits_of_one_alone(
    native: str, shape: tuple[int, int, int, int]
) -> None:
    case = random_case(NAMES["equivariant-circular"], shape, [1] * 4)
    # Neighbours of one range, of another, and of one again.
    ends = [shape[0]] * 3 + [2] + [shape[0]] * 4
    case = replace(case, ranges=torch.tensor([[0, end] for end in ends]))
    attention = operator(case.bank, native)
    together = case.ask(attention)
    for image in range(8):
        alone = case[[image]].ask(attention)
        assert torch.equal(alone.mean[0], together.mean[image])
        assert torch.equal(alone.log_evidence[0], together.log_evidence[image])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(5, 1, 3, 35), (2, 4, 35, 3)], ids=str)
@pytest.mark.parametrize("name", ["local-zeros", "els-zeros", "els-circular", "els-valid"])
def test_it_equals_the_reference_past_the_places_where_running_sums_start_afresh(
    native: str, name: str, shape: tuple[int, int, int, int]
) -> None:
    case, want = with_large_windows(name, shape)
    assert_within_budget(case, case.attend(native), want)


@pytest.mark.slow
@latin(2, "name")
@pytest.mark.parametrize("name", NAMES)
def test_memory_for_partial_results_does_not_show_in_the_bits(best: str, name: str) -> None:
    # 48 images leave more partial results than are kept at a time.
    case = random_case(NAMES[name], (600, 3, 16, 16), [1] * 24)
    attention = operator(case.bank, best)
    together, last = case.ask(attention), case[[47]].ask(attention)
    assert torch.equal(last.mean[0], together.mean[-1])
    assert torch.equal(last.log_evidence[0], together.log_evidence[-1])


def direct_on_torus(case: Case, window: int) -> Posterior:
    """Return the posterior of one image by a float64 matmul of unfolded patches."""
    r, a, s = window // 2, float(case.a), float(case.s)

    def patches(images: Tensor) -> Tensor:
        ring = pad(images.double(), (r, r, r, r), mode="circular")
        return unfold(ring, window).transpose(1, 2).flatten(0, 1)

    queries, keys = patches(case.x), patches(case.bank)
    norms = queries.square().sum(1)[:, None] + a * a * keys.square().sum(1)
    logits = -(norms - 2 * a * (queries @ keys.T)) / (2 * s * s)
    mean = logits.softmax(1) @ case.bank.double().flatten(2).transpose(1, 2).flatten(0, 1)
    return Posterior(
        mean.T.reshape(case.x.shape).float(),
        logits.logsumexp(1).reshape(1, *case.x.shape[2:]).float(),
    )


@functools.cache
def low_noise(window: int) -> tuple[Case, Posterior]:
    """Return a query at s = .05, 32×32, C = 3: logits of 1e5, where a float's last bit is 8e-3."""
    bank = random_bank((3, 3, 32, 32))
    a, s = torch.tensor([math.sqrt(1 - 0.05**2)]), torch.tensor([0.05])
    noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    x, k, ranges = a * bank[1:2] + s * noise, torch.tensor([window]), torch.tensor([[0, 3]])
    case = Case(GEOMETRIES["els", "circular"], bank, x, a, s, k, ranges)
    return case, direct_on_torus(case, window)


@pytest.mark.slow
@pytest.mark.parametrize("window", [3, 17, 31])
def test_running_sums_do_not_drift_at_low_noise(native: str, window: int) -> None:
    case, want = low_noise(window)
    assert_within_budget(case, case.attend(native), want)


def test_auto_takes_native_for_a_bank_on_the_cpu(
    best: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger=attention_module.__name__):
        attention = PatchAttention(BANK)
    assert attention.implementation == "native"
    assert "auto chose native" in caplog.text


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "LIBRARY", binding.LIBRARY.with_name("missing.so"))
    monkeypatch.setattr(binding, "_library", binding._library.__wrapped__)


@pytest.mark.usefixtures("no_library")
def test_without_the_library_native_says_why_and_auto_takes_torch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(RuntimeError, match=r"missing\.so was not built"):
        PatchAttention(BANK, implementation="native")
    assert PatchAttention(BANK).implementation == "torch"
    assert "no working C++ compiler was at hand" in caplog.text


def test_a_library_of_older_sources_is_rejected_with_the_command_that_builds_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Any library without our functions will do.
    monkeypatch.setattr(binding, "LIBRARY", Path(torch.__file__).parent / "lib" / "libc10.so")
    with pytest.raises(RuntimeError, match=r"older sources; .* kernels/native_build\.py"):
        binding._library.__wrapped__()


def test_a_library_beside_changed_sources_is_rejected_and_one_without_sources_loads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = Path(shutil.copy(binding.LIBRARY, tmp_path))
    monkeypatch.setattr(binding, "LIBRARY", library)
    assert binding._library.__wrapped__().els_kernel_lanes(0) > 0
    sources = tmp_path / "src"
    shutil.copytree(Path(binding.__file__).with_name("src"), sources)
    assert binding._library.__wrapped__().els_kernel_lanes(0) > 0
    with (sources / "fold.hpp").open("a") as file:
        file.write("// one line more\n")
    with pytest.raises(RuntimeError, match="older sources"):
        binding._library.__wrapped__()


@pytest.mark.usefixtures("no_library")
def test_who_asks_is_told_what_there_is_and_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    native, triton, torch_line = capsys.readouterr().out.splitlines()
    assert native.startswith("native     no: native: missing.so was not built")
    assert triton.startswith("triton     ")
    assert torch_line.startswith(f"torch      {torch.__version__}, ")


@pytest.mark.alone
def test_ctrl_c_ends_a_long_call_after_the_tasks_under_way(best: str) -> None:
    # 16 queries of 1e9 pairs: seconds of work in tasks of some milliseconds.
    bank = torch.zeros(1600, 1, 28, 28)
    attention, ones = operator(bank, best), torch.ones(16)
    x, k = torch.zeros(16, 1, 28, 28), torch.full((16,), 3)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            attention(x, a=ones, s=ones, window=k, geometry=GEOMETRIES["els", "circular"])
    finally:
        signal.signal(signal.SIGALRM, previous)
    (worker,) = (thread for thread in threading.enumerate() if thread.name == "els-native")
    worker.join(1)
    assert not worker.is_alive()


def test_an_unknown_instruction_set_is_an_error_that_names_the_known(best: str) -> None:
    with pytest.raises(ValueError, match=r"instruction_set: expected one of .*, got 'mmx'"):
        Native(BANK, instruction_set="mmx")


def test_a_bank_elsewhere_than_on_the_cpu_is_refused(best: str) -> None:
    with pytest.raises(ValueError, match="native: expected a bank on the CPU, got one on meta"):
        Native(BANK.to("meta"))
