"""Times of patch attention and of its peers on a GPU, and errors against float64."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import cuda_peers as peers
from benchmarks.kernels.cuda_cases import TARGET_MS, Case, call, make_bank, make_query
from els_kernels import count_pairs
from els_kernels.reference import Reference
from els_kernels.triton.attention import Form, TritonAttention

Row = dict[str, Any]

_BUDGET = 1e-4
_PEER_BATCH = 16
"""Batch size of the peers: a single query would leave most of the GPU idle."""
_PEER_IMAGES = (64, 1000)
_PEER_FLOPS = 6e12
"""Of one run of a peer, as far as so few images allow: a fraction of a second."""
_FLEX_WINDOWS = (3, 11)
"""Windows at which FlexAttention is compiled, which takes long."""


def compare(case: Case, forms: Iterable[Form | None], device: torch.device) -> list[Row]:
    """Return the error of each form; raise RuntimeError if it exceeds the budget or is NaN."""
    bank = make_bank(case, torch.device("cpu"), 1)
    x = make_query(case, bank, 2)
    want = call(case, Reference(bank), x)
    rows = []
    for form in forms:
        got = call(case, TritonAttention(bank.to(device), form=form), x.to(device)).cpu()
        errors = (got - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)
        error = float(errors.max())
        if not error <= _BUDGET:
            raise RuntimeError(f"{case}, {form}: error {error:.1e}, expected at most {_BUDGET}")
        rows.append({**asdict(case), "form": form, "error": error})
    return rows


def seconds(work: Callable[[int], object], device: torch.device, budget_s: float) -> list[float]:
    """Return the times of single calls, each given its index; on a GPU after two for warm-up."""
    times: list[float] = []
    if device.type != "cuda":
        began = time.perf_counter()
        work(0)
        return [time.perf_counter() - began]
    work(0), work(1)
    deadline = time.monotonic() + budget_s
    event: Callable[..., Any] = torch.cuda.Event
    while len(times) < 3 or (len(times) < 50 and time.monotonic() < deadline):
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        work(len(times))
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return times


def measure(case: Case, device: torch.device, bound: float) -> Row:
    """Return the speed of a case, and of its peers if their patches fit in memory."""
    pairs = case.batch * case.images * count_pairs(case.geometry, *case.shape[1:], case.window)
    # Banks and queries are rotated past the L2.
    copies = 1 if case.images * math.prod(case.shape) > 1 << 26 else 3
    banks = [make_bank(case, device, seed) for seed in range(copies)]
    attentions = [TritonAttention(bank, form=case.form) for bank in banks]
    queries = [make_query(case, banks[i % copies], i) for i in range(4)]
    times = seconds(lambda i: call(case, attentions[i % copies], queries[i % 4]), device, 1.0)
    median = statistics.median(times)
    row = {
        **asdict(case), "pairs": pairs, "seconds": median, "spread": max(times) / min(times),
        "pairs_per_s": pairs / median, "of_exp2_bound": pairs / median / bound,
        "ms_per_image": 1000 * median / case.batch,
    }  # fmt: skip
    if case.name == "cifar-10 step":
        row |= {"target_ms": TARGET_MS, "reached": row["ms_per_image"] <= TARGET_MS}
    if case.name == "window" and case.machine[1] == "circular":
        row["peers"] = _measure_peers(case, banks[0], device)
    return row


def _measure_peers(case: Case, bank: Tensor, device: torch.device) -> dict[str, Any]:
    """Return pairs a second of each peer, on a batch of its own and as many images as are quick."""
    a, s = case.level
    plane, depth = math.prod(case.shape[1:]), case.shape[0] * case.window**2
    least, most = _PEER_IMAGES
    images = int(_PEER_FLOPS / (4 * depth * _PEER_BATCH * plane**2))
    small = bank[: min(max(least, images), most, case.images)]
    x = make_query(replace(case, images=len(small), batch=_PEER_BATCH), small, 9)
    pairs = x.shape[0] * plane * len(small) * plane
    answer: dict[str, Any] = {}
    want: Tensor | None = None
    for name, (align, attend) in peers.PEERS.items():
        if name == "flex_attention" and case.window not in _FLEX_WINDOWS:
            continue
        try:
            problem = peers.unfolded(x, small, a, s, case.window, align)
            got = attend(problem)
            # The first, a plain matmul, is the reference of the others.
            want = got if want is None else want
            error = float((got - want).norm() / want.norm())
            median = _median(attend, problem, device)
        except Exception as failure:
            answer[name] = {"failed": f"{type(failure).__name__}: {str(failure)[:200]}"}
            continue
        answer[name] = {"pairs_per_s": pairs / median, "difference": error}
    return answer


def _median(
    attend: Callable[[peers.Problem], Tensor], problem: peers.Problem, device: torch.device
) -> float:
    return statistics.median(seconds(lambda _: attend(problem), device, 0.5))
