"""Counts per useful pair: what is computed is counted as the kernel's own loops do it."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from els_kernels.geometry import Padding

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: pip install 'els-denoise[gpu]'"
)

CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E R2, [R4.64] ;
        /*0020*/                   LDG.E.128 R8, [R6.64] ;
        /*0030*/                   FADD R3, R2, R1 ;
        /*0040*/                   STS [R20], R11 ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/                   HGMMA.64x128x16.F32 R24, gdesc[UR4], R24, gsb0 ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0080*/              @P0  BRA 0xb0 ;
        /*0090*/                   MUFU.EX2 R30, R31 ;
        /*00a0*/                   FADD R32, R32, R30 ;
        /*00b0*/                   IADD3 R5, R5, 0x1, RZ ;
        /*00c0*/              @P1  BRA 0x10 ;
        /*00d0*/                   EXIT ;
"""


def test_a_step_is_read_from_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from els_kernels.triton import sass
    from els_kernels.triton.counts import Step, step_of

    monkeypatch.setattr(sass, "_dump", lambda cubin, flag: CODE)
    step = step_of(sass.instructions(b""))
    assert step == Step(product=10, softmax=2, waits=1, barriers=1, fences=0, loads=2)


def test_code_without_a_softmax_has_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from els_kernels.triton import sass
    from els_kernels.triton.counts import step_of

    monkeypatch.setattr(sass, "_dump", lambda cubin, flag: CODE.replace("MUFU.EX2", "FMUL"))
    with pytest.raises(ValueError, match="expected a loop with products and exp2"):
        step_of(sass.instructions(b""))


@pytest.mark.parametrize("padding", ["circular", "valid", "zeros"])
@pytest.mark.parametrize("window", [3, 7])
def test_every_useful_pair_is_computed_and_few_others(padding: Padding, window: int) -> None:
    from els_kernels.triton.counts import cover_of

    # A tile of one place has no overhang: what is left is warm-up.
    exact = cover_of(padding, 1, 16, window, 1)
    wide = cover_of(padding, 1, 16, window, 64)
    assert 0.9 < exact.softmaxes < 1.1
    assert 1 <= exact.products <= exact.softmaxes * (1 + window / 3)
    assert wide.products >= exact.products
    assert wide.softmaxes >= exact.softmaxes


def test_the_model_of_latency_is_the_issue_bound_without_waits_and_falls_with_them() -> None:
    from els_kernels.triton import latency

    # 241 registers of 128 threads: two programs.
    assert latency.programs_of(241, 4, 0) == 2
    assert latency.programs_of(32, 4, 0) == 16
    # More than half of a processor's shared memory: one.
    assert latency.programs_of(241, 4, 115 * 1024) == 1
    assert latency.programs_of(241, 4, 113 * 1024) == 2
    # 8192 pairs, 1000 instructions of each of four warps, which have a scheduler each.
    assert latency.pairs_a_clock(8192, 1000, 0, 2, 4) == 8.192
    assert latency.pairs_a_clock(8192, 1000, 3000, 2, 4) == 4.096
    assert latency.pairs_a_clock(8192, 1000, 3000, 4, 4) == 8.192
    few, many = latency.Waits(8, 20, 16, 3), latency.Waits(8, 20, 16, 33)
    assert few.clocks == 8 * 128 + 20 * 30 + 16 * 20 + 3 * 263
    assert many.clocks == few.clocks + 30 * 41
