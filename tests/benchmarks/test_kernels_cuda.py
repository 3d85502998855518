"""The run on a GPU, rehearsed: the compiled kernels are interpreted on tiny images."""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.support.preloaded import FORKS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("triton") is None,
        reason="triton is not installed: pip install 'els-denoise[gpu]'",
    ),
]


def rehearse(out: Path) -> None:
    """Rehearse with two of the checks, as the tests of the kernels have all of them."""
    # Triton, once imported, would interpret the source instead of compiling it.
    os.environ.pop("TRITON_INTERPRET", None)
    from benchmarks.kernels import cuda, cuda_cases, cuda_timing

    plan = cuda_cases.tiny()
    plan = replace(plan, checks=plan.checks[-2:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_cases, "tiny", lambda: plan)
        # Its compilation for a CPU takes as long as all the rest.
        patch.setattr(cuda_timing, "_FLEX_WINDOWS", ())
        cuda.run(out, commit="none", rehearse=True)


def test_all_of_a_run_on_a_gpu_works_on_tiny_images(tmp_path: Path) -> None:
    out = tmp_path / "kernels-cuda.json"
    with ProcessPoolExecutor(1, mp_context=FORKS) as pool:
        pool.submit(rehearse, out).result()
    found = json.loads(out.read_text())
    assert [row["error"] <= 1e-4 for row in found["errors"]] == [True, True]
    step, window = found["rows"]
    assert (step["name"], step["target_ms"]) == ("cifar-10 step", 20)
    assert set(window["peers"]) == {"unfold", "sdpa", "sdpa, narrow values"}
    assert all(peer["difference"] < 1e-3 for peer in window["peers"].values())
    assert all(row["pairs_per_s"] > 0 for row in [*found["rows"], *found["tiles"]])
    assert found["left_out"] == []


def test_the_full_run_has_every_machine_and_the_steps_that_matter_first() -> None:
    from benchmarks.kernels import cuda_cases

    from els_kernels import GEOMETRIES

    plan = cuda_cases.full()
    assert {case.machine for case, _ in plan.checks} == set(GEOMETRIES)
    assert {(case.of_bytes, case.one_term) for case, _ in plan.checks} == {
        (True, False),
        (False, False),
        (True, True),
    }
    first = plan.timings[0]
    assert (first.images, first.shape, first.batch) == (50_000, (3, 32, 32), 16)
    assert len(plan.tiles) == 6
