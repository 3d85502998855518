"""What is Triton's own: the tiles of every chip, its cuts of a call, and where it cannot serve."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from tests.kernels.cases import NAMES, assert_within_budget, for_interpreter, random_case
from tests.support.rows import latin
from torch import Tensor

from els_kernels import PatchAttention
from els_kernels.attention import fastest
from els_kernels.triton.tuning import Arch

pytestmark = pytest.mark.slow


# The project has to work without triton.
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: pip install 'els-denoise[gpu]'"
)


@needs_triton
@pytest.mark.parametrize("arch", [arch for arch in get_args(Arch) if arch != "sm80"])
@pytest.mark.parametrize("name", ["els-zeros", "els-circular"])
@pytest.mark.parametrize(("channels", "of_bytes"), [(1, True), (3, False)])
@latin(2, "arch", "name", "channels")
def test_the_tiles_of_every_chip_give_the_same_answer(
    monkeypatch: pytest.MonkeyPatch, name: str, arch: Arch, channels: int, of_bytes: bool
) -> None:
    from els_kernels.triton import attention

    # Those of sm80 are interpreted by all other tests, with every padding.
    monkeypatch.setattr(attention, "architecture", lambda device: arch)
    case = random_case(NAMES[name], (4, channels, 7, 8), [3, 5], of_bytes=of_bytes)
    case = for_interpreter("triton", case)
    assert_within_budget(case, case.attend("triton"), case.attend("reference"))


@needs_triton
@pytest.mark.parametrize("name", NAMES)
def test_a_bank_and_a_batch_too_large_for_one_launch_are_merged_exactly(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from els_kernels.triton import attention, launch

    # Two images a slab, and three queries a launch.
    monkeypatch.setattr(launch, "_SLAB_BYTES", 2048)
    monkeypatch.setattr(attention, "_TOGETHER", 3)
    case = random_case(NAMES[name], (5, 1, 5, 6), [1, 1] if NAMES[name].whole else [5, 5])
    assert_within_budget(case, case.attend("triton"), case.attend("reference"))


@needs_triton
@pytest.mark.parametrize("name", ["els-zeros", "local-zeros"])
def test_places_of_several_tiles_and_keys_of_several_chunks_are_merged_exactly(name: str) -> None:
    # 1320 keys where a chunk has at most 1e3.
    case = random_case(NAMES[name], (4, 1, 10, 33), [5])
    assert_within_budget(case, case.attend("triton"), case.attend("reference"))


@needs_triton
@pytest.mark.parametrize("name", NAMES)
def test_a_query_and_a_bank_without_any_contrast_are_answered(name: str) -> None:
    case = random_case(NAMES[name], (3, 1, 4, 4), [1] if NAMES[name].whole else [3])
    case.bank.zero_()
    case.x.zero_()
    got, want = case.attend("triton"), case.attend("reference")
    torch.testing.assert_close(got.mean, want.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(got.log_evidence, want.log_evidence, rtol=1e-5, atol=1e-6)


@needs_triton
@pytest.mark.parametrize("name", ["els-zeros", "els-circular", "els-valid"])
def test_nothing_is_read_before_or_after_a_bank(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from els_kernels.triton import layout

    def between_infinities(tensor: Tensor) -> Tensor:
        guarded = torch.full((3, *tensor.shape), torch.inf, dtype=tensor.dtype)
        guarded[1] = tensor
        return guarded[1]

    # A key whose norm is infinite has the weight 0, whose product with its value is a NaN: a
    # warning of the interpreter, and warnings are errors.
    for made in ("responses", "half_norms"):
        real = getattr(layout, made)
        monkeypatch.setattr(layout, made, lambda *args, of=real: between_infinities(of(*args)))
    case = random_case(NAMES[name], (2, 2, 5, 5), [5])
    assert_within_budget(case, case.attend("triton"), case.attend("reference"))


@needs_triton
def test_states_of_many_slots_are_merged_in_runs_and_empty_ones_weigh_nothing() -> None:
    from els_kernels.triton import launch

    generator = torch.Generator().manual_seed(0)
    peak = 100 * torch.randn(1, 70, 5, generator=generator)
    sums = torch.rand(1, 70, 5, 2, generator=generator)
    # A whole run, and single slots, without pairs.
    empty = (torch.arange(70) < 40) | (torch.arange(70) % 9 == 0)
    peak[:, empty], sums[:, empty] = -math.inf, 0
    if torch.cuda.is_available():
        peak, sums = peak.cuda(), sums.cuda()
    state = launch.merged(peak, sums, (5, 1))
    weights = torch.exp2((peak - peak.amax(1, keepdim=True)).double())
    want = (weights[..., None] * sums).sum(1)
    assert torch.equal(state.peak.flatten(), peak.amax(1).flatten())
    assert torch.allclose(state.sums.view(1, 5, 2).double(), want, rtol=1e-6)


@needs_triton
def test_who_asks_for_triton_without_a_gpu_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"triton: expected a bank on a GPU .* got one on cpu"):
        PatchAttention(torch.zeros(1, 1, 2, 2), implementation="triton")


def test_who_asks_for_triton_without_the_package_is_told_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("els_kernels.triton.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="the package triton is not installed"):
        PatchAttention(torch.zeros(1, 1, 2, 2), implementation="triton")


@needs_triton
def test_auto_takes_triton_for_a_bank_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    assert fastest(on_gpu) == "triton"


ALONE = """
import sys
for name in ("triton", "numpy", "pydantic", "grpc", "google", "els_proto", "els_service"):
    sys.modules[name] = None
import torch, els_kernels
geometry = els_kernels.GEOMETRIES["els", "zeros"]
one = torch.ones(1)
for name in ("auto", "torch", "reference"):
    attention = els_kernels.PatchAttention(torch.zeros(2, 1, 4, 4), implementation=name)
    k = torch.tensor([3])
    answer = attention(torch.zeros(1, 1, 4, 4), a=one, s=one, window=k, geometry=geometry)
    assert answer.mean.abs().max() == 0
"""


def test_the_kernels_stand_on_torch_alone_without_triton_numpy_or_the_service() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # Torch itself warns when numpy is not there.
    subprocess.run([sys.executable, "-W", "ignore", "-c", ALONE], check=True, env=environment)
