"""The interpreter on small programs written by hand: what it computes and what it reports."""

from __future__ import annotations

import numpy as np
import pytest
from tests.kernels.ptx.faults import Faults
from tests.kernels.ptx.machine import Machine
from tests.kernels.ptx.matrix import accumulate
from tests.kernels.ptx.program import parse
from tests.kernels.ptx.threads import Array

HEAD = """
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0,
    .param .u32 kernel_param_1
)
{
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b32 %r1, [kernel_param_1];
    mov.u32 %r2, %tid.x;
    mad.wide.u32 %rd2, %r2, 4, %rd1;
    shl.b32 %r3, %r2, 2;
    mov.b32 %r4, global_smem;
    add.s32 %r5, %r4, %r3;
"""
"""%rd2 is the thread's own word of the only tensor, %r5 that of the shared memory."""


def run(body: str, words: Array, *, warps: int = 2, number: int = 0, programs: int = 1) -> Faults:
    """Run a kernel on a tensor of 32-bit words, which it changes."""
    faults = Faults()
    data = words.view(np.uint8)
    program = parse(HEAD + body + "    ret;\n}\n")
    machine = Machine(program, (programs, 1, 1), warps, 1024, [data], "exact", faults)
    machine.run([machine.memory.address(0), number])
    data[:] = machine.memory.content(0, len(data))
    return faults


def zeros(threads: int = 64) -> Array:
    return np.zeros(threads, np.int32)


def computed(body: str, number: int = 0) -> Array:
    """Return the final value of %r9 in every thread."""
    words = zeros()
    assert str(run(body + "    st.global.b32 [%rd2], %r9;\n", words, number=number)) == ""
    return words


@pytest.mark.parametrize(
    ("body", "want"),
    [
        ("mad.lo.s32 %r9, %r2, 3, -5;", lambda t: 3 * t - 5),
        ("shr.u32 %r9, %r2, 1;", lambda t: t // 2),
        ("shl.b32 %r9, %r2, 40;", lambda t: 0 * t),
        ("sub.s32 %r8, %r2, 10; shr.s32 %r9, %r8, 33;", lambda t: np.where(t < 10, -1, 0)),
        ("rem.s32 %r9, %r2, 7;", lambda t: t % 7),
        ("bfe.u32 %r9, %r2, 1, 3;", lambda t: t >> 1 & 7),
        ("bfe.s32 %r9, %r2, 0, 1;", lambda t: -(t & 1)),
        ("setp.lt.s32 %p1, %r2, %r1; selp.b32 %r9, 1, 2, %p1;", lambda t: np.where(t < 9, 1, 2)),
        ("mov.b32 %r9, 5; setp.ge.s32 %p1, %r2, 3; @%p1 mov.b32 %r9, 6;",
         lambda t: np.where(t >= 3, 6, 5)),
        ("shfl.sync.bfly.b32 %r9, %r2, 2, 31, -1;", lambda t: t ^ 2),
        ("cvt.rn.f32.s32 %r8, %r2; fma.rn.f32 %r8, %r8, 0f40000000, 0f3F800000; "
         "cvt.rzi.s32.f32 %r9, %r8;", lambda t: 2 * t + 1),
        ("mov.b32 {%rs1, %rs2}, %r2; cvt.u32.u16 %r9, %rs1;", lambda t: t),
    ],
)  # fmt: skip
def test_arithmetic_is_that_of_integers_and_floats(body: str, want: object) -> None:
    assert callable(want)
    assert (computed(body + "\n", number=9) == want(np.arange(64))).all()


def test_threads_that_diverge_meet_again() -> None:
    body = """
    mov.b32 %r9, 0;
$L__loop:
    setp.ge.s32 %p1, %r9, %r2;
    @%p1 bra $L__end;
    add.s32 %r9, %r9, 1;
    bra.uni $L__loop;
$L__end:
    bar.sync 0;
"""
    assert (computed(body) == np.arange(64)).all()


def test_a_sum_of_products_is_cut_where_the_matrix_units_cut_it() -> None:
    a, b = np.zeros((1, 16)), np.ones((16, 1))
    # 2^13 in units of 2^-11: what is below 2^-13 is cut, two such halves do not carry.
    a[0, :3] = 1.0, 2.0**-25, 2.0**-25
    c = np.zeros((1, 1), np.float32)
    assert accumulate(a, b, c, "exact") == np.float32(1 + 2.0**-24)
    assert accumulate(a, b, c, "ampere") == 1
    # Rounded to zero, not to nearest.
    a[0, :3] = 1.0, 2.0**-24, 2.0**-25
    assert accumulate(a, b, c, "hopper") == 1
    assert accumulate(a, b, c, "exact") == np.float32(1 + 2.0**-23)


READ_NEXT = """
    xor.b32 %r6, %r5, 128;
    ld.shared.b32 %r9, [%r6];
    st.global.b32 [%rd2], %r9;
"""
"""Reads what the other warp has written."""
FAULTS = {
    "a word before the tensor": ("st.global.b32 [%rd2+-4], %r2;", "global write out of bounds"),
    "a word after the tensor": ("ld.global.b32 %r9, [%rd2+4];", "global read out of bounds"),
    "half a word": ("ld.global.b32 %r9, [%rd2+2];", "global read misaligned"),
    "one word by all": ("st.global.b32 [%rd1], %r2;", "global race: two threads write at once"),
    "a word of another thread": (
        "st.global.b32 [%rd2], %r2; ld.global.b32 %r9, [%rd1];",
        "global race: read of another thread's write",
    ),
    "no barrier before a read": (
        f"st.shared.b32 [%r5], %r2; {READ_NEXT}",
        "shared race: read after write without a barrier",
    ),
    "no barrier before a write": (
        f"st.shared.b32 [%r5], %r2; bar.sync 0; {READ_NEXT} st.shared.b32 [%r5], %r2;",
        "shared race: write after read without a barrier",
    ),
    "what nothing wrote": ("ld.shared.b32 %r9, [%r5];", "shared read of bytes that nothing wrote"),
    "beyond the shared memory": ("st.shared.b32 [%r5+1000], %r2;", "shared access out of bounds"),
    "a copy in flight": (
        "cp.async.ca.shared.global [ %r5 + 0 ], [ %rd2 + 0 ], 0x4; cp.async.commit_group; "
        "ld.shared.b32 %r9, [%r5]; cp.async.wait_group 0;",
        "shared read of an asynchronous copy",
    ),
    "a copy never waited for": (
        "cp.async.ca.shared.global [ %r5 + 0 ], [ %rd2 + 0 ], 0x4; cp.async.commit_group;",
        "asynchronous copy that nothing waits for",
    ),
    "a barrier for some": (
        "setp.lt.s32 %p1, %r2, 5; @%p1 bar.sync 0;",
        "program-wide operation in divergent code",
    ),
    "an exchange for some": (
        "setp.lt.s32 %p1, %r2, 5; @%p1 shfl.sync.bfly.b32 %r9, %r2, 1, 31, -1;",
        "warp-wide operation in divergent code",
    ),
    "a negative remainder": (
        "sub.s32 %r8, %r2, 1; rem.s32 %r9, %r8, 7;",
        "division of a negative number",
    ),
    "a division by zero": ("div.u32 %r9, %r2, %r1;", "division by zero"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_kind_of_fault_is_reported(name: str) -> None:
    body, kind = FAULTS[name]
    faults = run(body + "\n", zeros())
    assert kind in faults.counts
    assert faults.first[kind] in " ".join(body.split())


def test_a_barrier_a_copy_waited_for_and_a_masked_access_are_no_fault() -> None:
    words = np.arange(64, dtype=np.int32)
    body = f"""
    cp.async.ca.shared.global [ %r5 + 0 ], [ %rd2 + 0 ], 0x4;
    cp.async.commit_group;
    cp.async.wait_group 0;
    bar.sync 0;
    setp.lt.s32 %p1, %r2, 0;
    @%p1 st.global.b32 [%rd2+4096], %r2;
    {READ_NEXT}
"""
    assert str(run(body, words)) == ""
    assert (words == (np.arange(64) ^ 32)).all()


def test_programs_that_write_the_same_word_race() -> None:
    assert (
        "global race: write over another thread's write"
        in run(
            "mov.u32 %r9, %ctaid.x; setp.eq.s32 %p1, %r9, 0; @%p1 st.global.b32 [%rd2], %r9; "
            "@!%p1 st.global.b32 [%rd2], %r9;\n",
            zeros(),
            programs=2,
        ).counts
    )


def test_an_unknown_operation_is_an_error_and_not_ignored() -> None:
    with pytest.raises(NotImplementedError, match=r"tcgen05\.mma"):
        run("tcgen05.mma %r9;\n", zeros())
