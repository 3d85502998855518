"""Patch attention on a GPU: correctness first, then its speed against peers and the exp2 bound.

    PYTHONPATH=kernels python -m benchmarks.kernels --device cuda --out FILE.json

requires torch, triton and numpy, and takes at most 8 minutes: cases run in order of interest, and
those left at the end are listed. ``--smoke`` runs two tiny cases on a CPU under
``TRITON_INTERPRET=1``, to try the script itself.
"""

from __future__ import annotations

import datetime
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.kernels import cuda_peers as peers
from els_kernels import GEOMETRIES, Geometry, count_pairs
from els_kernels.reference import Reference
from els_kernels.triton.attention import Form, TritonAttention

LIMIT_S = 450.0
_PEER_BATCH = 16
"""Batch size of the peers: a single query would leave most of the GPU idle."""
_PEER_IMAGES = (64, 1000)
_PEER_FLOPS = 6e12
"""Of one run of a peer, as far as so few images allow: a fraction of a second."""


@dataclass(frozen=True)
class Case:
    """One timing."""

    name: str
    machine: tuple[str, str]
    shape: tuple[int, int, int]
    images: int
    window: int
    batch: int
    form: Form | None = None
    t: float = 0.3


def cases() -> Iterator[Case]:
    """Yield the cases to time, the most informative first."""
    gray, colour = (1, 28, 28), (3, 32, 32)
    circular, zeros = ("els", "circular"), ("els", "zeros")
    for k in (3, 5, 7, 11, 17, 25):
        yield Case("window", circular, gray, 4000, k, 4)
        yield Case("window", circular, colour, 2000, k, 4)
    for k in (3, 5, 9, 17):
        yield Case("cifar-10 whole", zeros, colour, 50_000, k, 16 if k > 5 else 4)
    for k in (3, 5):
        for form in ("direct", "diagonal"):
            yield Case("form", circular, gray, 4000, k, 4, form)
            if k == 3:
                yield Case("form", circular, colour, 2000, k, 4, form)
    for batch in (1, 4, 16, 64):
        yield Case("batch", zeros, gray, 6000, 9, batch)
    for images in (1000, 6000, 60_000):
        yield Case("bank", zeros, gray, images, 9, 4)
    yield Case("local", ("local", "zeros"), colour, 50_000, 9, 16)
    yield Case("ideal", ("ideal", "zeros"), colour, 50_000, 1, 16)
    yield Case("equivariant", ("equivariant", "circular"), colour, 5000, 1, 1)
    yield Case("valid", ("els", "valid"), colour, 5000, 9, 4)
    for k in (3, 7, 9, 13, 15, 21):
        yield Case("window", zeros, gray, 6000, k, 4)
        yield Case("window", zeros, colour, 5000, k, 4)


def level(t: float) -> tuple[float, float]:
    """Return a and s of the cosine schedule."""
    alpha_bar = math.cos(math.pi * t / (2 * 1.008)) ** 2
    return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)


def make_bank(case: Case, device: torch.device, seed: int) -> Tensor:
    """Return random images of bytes, smooth enough for posteriors of more than one image."""
    random = torch.Generator(device).manual_seed(seed)
    c, h, w = case.shape
    rough = torch.randn(case.images, c, h, w, device=device, generator=random)
    smooth = torch.nn.functional.avg_pool2d(rough, 3, 1, 1) * 1.5
    return ((smooth.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def make_query(case: Case, bank: Tensor, seed: int) -> Tensor:
    """Return noisy images of the bank [B, C, H, W]."""
    random = torch.Generator(bank.device).manual_seed(seed)
    a, s = level(case.t)
    clean = bank[torch.arange(case.batch, device=bank.device) % case.images]
    return a * clean + s * torch.randn(clean.shape, device=bank.device, generator=random)


def call(case: Case, attention: TritonAttention, x: Tensor) -> Tensor:
    """Return the mean."""
    a, s = level(case.t)
    size = len(x)
    geometry = GEOMETRIES[case.machine]
    window = [1 if geometry.whole else case.window] * size
    return attention(x, [a] * size, [s] * size, window, [(0, case.images)] * size, geometry).mean


def check(device: torch.device, smoke: bool) -> list[dict[str, Any]]:
    """Return errors of every machine and form against float64; raise if a budget is exceeded."""
    rows = []
    for machine, geometry in GEOMETRIES.items():
        for shape, images, k in [((1, 8, 9), 9, 5)] if smoke else _shapes(geometry):
            forms: tuple[Form | None, ...] = (None,)
            if geometry.sources == "every" and not geometry.whole:
                small = shape[0] * k * k <= 128
                forms = ("direct", "diagonal") if small else ("diagonal",)
            for t in (0.05, 0.5, 0.95):
                case = Case("check", machine, shape, images, k, 2, None, t)
                rows += compare(case, forms, device)
    return rows


def _shapes(geometry: Geometry) -> list[tuple[tuple[int, int, int], int, int]]:
    """Return shape, images and window of each check.

    The float64 reference takes N·(HW)²·k²C multiplications on the processor. Where the window is
    the image that leaves small ones, or the check would outlast the timings.
    """
    if geometry.whole and geometry.sources == "every":
        return [((1, 9, 8), 70, 1), ((1, 20, 17), 5, 1), ((3, 16, 16), 9, 1)]
    return [((1, 20, 17), 40, 5), ((3, 16, 16), 9, 11), ((1, 28, 28), 40, 3)]


def compare(
    case: Case, forms: tuple[Form | None, ...], device: torch.device
) -> list[dict[str, Any]]:
    """Return the error of each form; raise if it exceeds the budget or is NaN."""
    bank = make_bank(case, torch.device("cpu"), 1)
    x = make_query(case, bank, 2)
    # The reference answers as the operator does, but for lists where it takes tensors.
    want = call(case, Reference(bank), x)  # type: ignore[arg-type]
    rows = []
    for form in forms:
        got = call(case, TritonAttention(bank.to(device), form=form), x.to(device)).cpu()
        errors = (got - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)
        error = float(errors.max())
        if not error <= 1e-4:
            raise RuntimeError(f"{case}, {form}: error {error:.1e} against float64, budget 1e-4")
        rows.append({**asdict(case), "form": form, "error": error})
    return rows


def seconds(work: Callable[[int], object], device: torch.device, budget_s: float) -> list[float]:
    """Return the times of single calls after two warm-up calls; each call gets its index."""
    work(0), work(1)
    times: list[float] = []
    deadline = time.monotonic() + budget_s
    while len(times) < 3 or (len(times) < 50 and time.monotonic() < deadline):
        if device.type == "cuda":
            event: Callable[..., Any] = torch.cuda.Event
            start, end = event(enable_timing=True), event(enable_timing=True)
            start.record()
            work(len(times))
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        else:
            began = time.perf_counter()
            work(len(times))
            times.append(time.perf_counter() - began)
    return times


def measure(case: Case, device: torch.device, bound: float) -> dict[str, Any]:
    """Return the speed of a case, and of its peers if their patches fit in memory."""
    geometry = GEOMETRIES[case.machine]
    pairs = case.batch * case.images * count_pairs(geometry, *case.shape[1:], case.window)
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
    if case.name == "window" and case.machine[1] == "circular":
        row["peers"] = measure_peers(case, banks[0], device)
    return row


def measure_peers(case: Case, bank: Tensor, device: torch.device) -> dict[str, Any]:
    """Return pairs a second of each peer, on a batch of its own and as many images as are quick."""
    a, s = level(case.t)
    plane, depth = math.prod(case.shape[1:]), case.shape[0] * case.window**2
    least, most = _PEER_IMAGES
    images = int(_PEER_FLOPS / (4 * depth * _PEER_BATCH * plane**2))
    small = bank[: min(max(least, images), most, case.images)]
    x = make_query(replace(case, images=len(small), batch=_PEER_BATCH), small, 9)
    pairs = x.shape[0] * plane * len(small) * plane
    answer: dict[str, Any] = {}
    want: Tensor | None = None
    for name, (align, attend) in peers.PEERS.items():
        if name == "flex_attention" and case.window not in (3, 11):
            continue
        try:
            problem = peers.unfolded(x, small, a, s, case.window, align)
            got = attend(problem)
            # The first, a plain matmul, is the reference of the others.
            want = got if want is None else want
            error = float((got - want).norm() / want.norm())
            # mypy cannot infer lambdas whose defaults hold the loop variables.
            times = seconds(lambda _, f=attend, p=problem: f(p), device, 0.5)  # type: ignore[misc]
        except Exception as failure:
            answer[name] = {"failed": f"{type(failure).__name__}: {str(failure)[:200]}"}
            continue
        answer[name] = {"pairs_per_s": pairs / statistics.median(times), "difference": error}
    return answer


def about_run(device: torch.device, commit: str) -> tuple[dict[str, Any], float]:
    """Return date, commit and machine of this run, and the exp2 bound in pairs a second."""
    about: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        **record.machine(),
        "chip": platform.machine(),
    }
    if device.type != "cuda":
        return about, 1e9
    properties = torch.cuda.get_device_properties(device)
    # 16 exp2 a clock and multiprocessor; the boost clock of an H200 if torch does not report it.
    clock = getattr(properties, "clock_rate", 1_755_000) * 1e3
    about |= {"chip": properties.name, "clock_hz": clock}
    return about, properties.multi_processor_count * clock * 16


def run(out: Path, *, commit: str, smoke: bool = False) -> None:
    """Check, measure, and rewrite the JSON file ``out`` after every case.

    Args:
        out: the record.
        commit: that is measured, for the record.
        smoke: two tiny cases, on a CPU.

    Raises:
        RuntimeError: There is no GPU, or a result is wrong; nothing is timed.
    """
    began = time.monotonic()
    if not smoke and not torch.cuda.is_available():
        raise RuntimeError(f"expected a GPU that torch {torch.__version__} can use, found none")
    device = torch.device("cpu" if smoke else "cuda")
    torch.backends.cuda.matmul.allow_tf32 = False
    about, bound = about_run(device, commit)
    result: dict[str, Any] = {"about": about, "exp2_bound": bound}
    result["errors"] = check(device, smoke)
    print(f"correct: {len(result['errors'])} cases, worst error "
          f"{max(row['error'] for row in result['errors']):.1e}", flush=True)  # fmt: skip
    todo = list(cases())
    if smoke:
        todo = [Case("window", ("els", "circular"), (1, 8, 8), 3, k, 1) for k in (3, 5)]
    rows: list[dict[str, Any]] = []
    _write(out, result, rows, todo)
    while todo and time.monotonic() - began < LIMIT_S:
        case = todo.pop(0)
        rows.append(measure(case, device, bound))
        print(_line(rows[-1]), flush=True)
        _write(out, result, rows, todo)
    print(f"{len(todo)} cases left out, {time.monotonic() - began:.0f} s")


def _write(out: Path, result: dict[str, Any], rows: list[dict[str, Any]], todo: list[Case]) -> None:
    left_out = [asdict(case) for case in todo]
    out.write_text(json.dumps({**result, "rows": rows, "left_out": left_out}, indent=1))


def _line(row: dict[str, Any]) -> str:
    peers_of = {
        name: f"{row['pairs_per_s'] / peer['pairs_per_s']:.0f}x" if "failed" not in peer else "-"
        for name, peer in row.get("peers", {}).items()
    }
    return (
        f"{row['name']:15} {'-'.join(row['machine']):18} {row['shape']!s:12} N={row['images']:<6} "
        f"k={row['window']:<3} B={row['batch']:<3} {row['form'] or '':9} "
        f"{row['pairs_per_s']:.2e} pair/s ({100 * row['of_exp2_bound']:.0f} % of exp2) "
        f"{row['ms_per_image']:.2f} ms/image {peers_of or ''}"
    )
