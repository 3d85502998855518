"""The kernel for Hopper: tiles that images of a batch share, and a bank without contrast."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec

import pytest

# The project has to work without triton.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("triton") is None,
        reason="triton is not installed: pip install 'els-denoise[gpu]'",
    ),
]


def shared(name: str) -> tuple[set[int], str, list[bool]]:
    """Return the images of a tile, faults, and whether batches have the bits of single images."""
    import torch
    from tests.kernels.cases import NAMES, VARIANTS, Case, random_bank
    from tests.kernels.ptx.driver import InterpretingDriver, interpreting

    from els_kernels.triton import hopper_launch
    from els_kernels.triton.attention import TritonAttention

    shares, share = set(), hopper_launch._share

    def recorded(size: int, elements: int) -> int:
        shares.add(share(size, elements))
        return share(size, elements)

    bank = random_bank((3, 1, 5, 4), of_bytes=True)
    x = torch.cat([bank, bank.flip(0)])[:5].double() + 0.1
    level = torch.full((5,), 0.3, dtype=torch.float64)
    window, ranges = torch.full((5,), 3), torch.tensor([[0, 3]] * 5)
    case = Case(NAMES[name], bank, x.float(), torch.ones_like(level), level, window, ranges)
    device = InterpretingDriver("sm90", "hopper")
    with pytest.MonkeyPatch.context() as patch, interpreting(device, "sm90"):
        patch.setitem(VARIANTS, "triton", TritonAttention)
        patch.setattr(hopper_launch, "_share", recorded)
        alone = {i: case[[i]].attend("triton") for i in (0, 4)}
        same = []
        for members in ([4, 0], [0, 1, 2, 3, 4]):
            batch = case[members].attend("triton")
            for i, one in alone.items():
                at = members.index(i)
                same.append(torch.equal(batch.mean[at], one.mean[0]))
                same.append(torch.equal(batch.log_evidence[at], one.log_evidence[0]))
    return shares, str(device.faults), same


def test_images_that_share_a_tile_have_the_bits_of_each_alone(
    compiler: ProcessPoolExecutor,
) -> None:
    shares, faults, same = compiler.submit(shared, "els-zeros").result()
    assert shares == {1, 2, 4}
    assert faults == ""
    assert same == [True] * 8


def of_one_colour() -> tuple[str, float]:
    """Return faults, and the largest error of the mean, of a bank whose pixels are all alike."""
    import torch
    from tests.kernels.cases import NAMES
    from tests.kernels.ptx.driver import InterpretingDriver, interpreting

    from els_kernels.triton.attention import TritonAttention

    bank = torch.full((2, 1, 4, 5), -0.21758409)
    device = InterpretingDriver("sm90")
    with interpreting(device, "sm90"):
        attention = TritonAttention(bank)
        got = attention(bank[:1] * 0.618, [0.618], [0.786], [3], [(0, 2)], NAMES["els-circular"])
    return str(device.faults), float((got.mean - bank[:1]).abs().max())


def test_a_bank_of_one_colour_that_no_byte_has_is_its_own_mean(
    compiler: ProcessPoolExecutor,
) -> None:
    # Its centred pixels are zero, or as small as a rounding error.
    faults, error = compiler.submit(of_one_colour).result()
    assert faults == ""
    assert error <= 1e-7
