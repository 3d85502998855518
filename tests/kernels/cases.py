"""Random queries for patch attention, and how far an answer may lie from the specification."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import avg_pool2d, pad

from els_kernels import GEOMETRIES, Geometry, PatchAttention, Posterior, max_window
from els_kernels.attention import IMPLEMENTATIONS, Implementation
from els_kernels.native import Native

NAMES = {f"{machine}-{padding}": geometry for (machine, padding), geometry in GEOMETRIES.items()}
"""Geometries by a name that can stand in a test's id."""

# A logit is computed to a few eps32 of its size, and an error of δ there moves the mean by at most
# δ/2 of the spread of the bank. Down to t = .05 logits of these small images stay below 1e3, which
# gives 1e-4. A score is D times a/s² beside a noise of size 1/s; twice that is what is left of it.
MEAN_BUDGET, SCORE_BUDGET = 1e-4, 2e-4


VARIANTS: dict[str, Callable[[Tensor], Implementation]] = {
    "reference": IMPLEMENTATIONS["reference"],
    "torch": IMPLEMENTATIONS["torch"],
    "native-avx512": partial(Native, instruction_set="avx512"),
    "native-avx2": partial(Native, instruction_set="avx2"),
    "native-baseline": partial(Native, instruction_set="baseline"),
    "triton": IMPLEMENTATIONS["triton"],
}
"""Every implementation in every way that it can be made to work."""


def operator(bank: Tensor, variant: str) -> PatchAttention:
    """Return the operator with one of ``VARIANTS`` behind it, on a GPU where that needs one."""
    if variant == "triton" and torch.cuda.is_available():
        bank = bank.cuda()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(IMPLEMENTATIONS, variant, VARIANTS[variant])
        return PatchAttention(bank, implementation=variant)


@dataclass(frozen=True, eq=False)
class Case:
    """A bank and a batch of queries, each with its own level, window and range."""

    geometry: Geometry
    bank: Tensor
    x: Tensor
    a: Tensor
    s: Tensor
    window: Tensor | None
    ranges: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def attend(self, variant: str) -> Posterior:
        return self.ask(operator(self.bank, variant))

    def ask(self, attention: PatchAttention) -> Posterior:
        mean, evidence = attention(
            self.x.to(attention.device),
            a=self.a,
            s=self.s,
            window=self.window,
            ranges=self.ranges,
            geometry=self.geometry,
        )
        return Posterior(mean.cpu(), evidence.cpu())

    def __getitem__(self, images: Sequence[int]) -> Case:
        chosen = torch.tensor(images)
        return replace(
            self,
            x=self.x[chosen],
            a=self.a[chosen],
            s=self.s[chosen],
            window=None if self.window is None else self.window[chosen],
            ranges=self.ranges[chosen],
        )

    def score(self, mean: Tensor) -> Tensor:
        a, s = self.a[:, None, None, None], self.s[:, None, None, None]
        return (a * mean - self.x) / s**2


def few(implementation: str, images: int) -> int:
    """Return how many images to ask for: Triton's interpreter takes a thousand times as long."""
    return -(-images // 5) if implementation == "triton" else images


def for_interpreter(implementation: str, case: Case) -> Case:
    """Return one of the two queries of each window for Triton, whose interpreter is slow.

    Images of the bank and others take turns.
    """
    if implementation != "triton":
        return case
    return case[[2 * i + i % 2 for i in range(len(case) // 2)]]


def random_bank(
    shape: tuple[int, int, int, int], seed: int = 0, *, of_bytes: bool = False
) -> Tensor:
    """Images [N, C, H, W] whose mean is far from 0, as it is in real banks."""
    generator = torch.Generator().manual_seed(seed)
    bank = (0.4 * torch.randn(shape, generator=generator) - 0.3).clamp(-1, 1)
    return ((bank + 1) * 127.5).round() / 127.5 - 1 if of_bytes else bank


def random_case(
    geometry: Geometry,
    shape: tuple[int, int, int, int],
    windows: Sequence[int] | None = None,
    seed: int = 0,
    *,
    of_bytes: bool = False,
) -> Case:
    """Two queries for each window, of which all that are legal are the default.

    One is a noisy image of the bank, the other a noisy image that is not in it; they share a range.
    """
    generator = torch.Generator().manual_seed(seed)
    images, _, height, width = shape
    if windows is None:
        windows = [1, 1] if geometry.whole else range(1, max_window(geometry, height, width) + 1, 2)
    batch = 2 * len(windows)
    bank = random_bank(shape, seed, of_bytes=of_bytes)
    times = torch.linspace(0.05, 1, batch, dtype=torch.float64)
    angle = times[torch.randperm(batch, generator=generator)] * math.pi / 2.016
    a, s = angle.cos(), angle.sin()
    lo = torch.randint(images, (len(windows),), generator=generator)
    hi = lo + 1 + (torch.rand(len(windows), generator=generator) * (images - lo)).long()
    lo[::2], hi[::2] = 0, images
    lo, hi = lo.repeat_interleave(2), hi.repeat_interleave(2)
    clean = torch.cat([bank[lo[::2]], random_bank(shape, seed + 1)[lo[1::2]]])
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    order = torch.arange(batch).view(2, -1).T.flatten()
    x = a[:, None, None, None] * clean[order] + s[:, None, None, None] * noise
    return Case(
        geometry,
        bank,
        x.float(),
        a,
        s,
        None if geometry.whole else torch.tensor(windows).repeat_interleave(2),
        torch.stack([lo, hi], dim=1),
    )


def assert_within_budget(case: Case, got: Posterior, want: Posterior) -> None:
    """Assert the budgets image by image: no image may hide behind the others of its batch."""
    assert (relative_errors(got.mean, want.mean) <= MEAN_BUDGET).all()
    scores = case.score(got.mean), case.score(want.mean)
    assert (relative_errors(*scores) <= SCORE_BUDGET).all()
    errors = (got.log_evidence.double() - want.log_evidence).abs().flatten(1).amax(1)
    assert (errors <= evidence_budgets(case, want.log_evidence)).all()


def relative_errors(got: Tensor, want: Tensor) -> Tensor:
    """Return ‖got - want‖ / ‖want‖ of each image, [B]."""
    errors: Tensor = vector_norm(got.double() - want.double(), dim=(1, 2, 3))
    sizes: Tensor = vector_norm(want.double(), dim=(1, 2, 3))
    return errors / sizes


def evidence_budgets(case: Case, evidence: Tensor) -> Tensor:
    """Return 8·eps32·(largest logit) + 2·eps32·(1 + |evidence|) of each image, [B].

    (‖x[u+Ω]‖² + a²·‖φ[y+Ω]‖²) / 2s² bounds the terms whose sum a logit is, before centring; an
    implementation that rounds each term once and their sums a few times stays within 8. The sum of
    the weights and the evidence are float32 too, which alone counts where noise makes logits small.
    """
    eps = torch.finfo(torch.float32).eps
    keys = case.bank.double().square().sum(1)
    budgets = []
    for b, image in enumerate(case.x.double().square().sum(1)):
        window = 0 if case.window is None else int(case.window[b])
        largest = window_sums(image[None], window, case.geometry).amax()
        largest += case.a[b] ** 2 * window_sums(keys, window, case.geometry).amax()
        answer = 1 + evidence[b].abs().amax()
        budgets.append(8 * eps * largest / (2 * case.s[b] ** 2) + 2 * eps * answer)
    return torch.stack(budgets)


def window_sums(images: Tensor, window: int, geometry: Geometry) -> Tensor:
    """Return the sum of [N, H, W] over the window of every place."""
    if geometry.whole:
        return images.sum((1, 2))
    r = window // 2
    mode = "constant" if geometry.padding == "zeros" else "circular"
    padded = pad(images[:, None], (r, r, r, r), mode=mode)
    sums: Tensor = avg_pool2d(padded, window, stride=1, divisor_override=1)
    return sums[:, 0]
