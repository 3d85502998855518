"""Leave-one-out posterior means at sampled pixels, for many windows and levels in one pass.

For output pixel u of bank image m and noise ε the query is x = φ_m + σ·ε, and the posterior is that
of the bank without image m, exactly::

    ℓ_k(u; n, y) = -‖x[u+Ω_k] - φ_n[y+Ω_k]‖² / (2 σ²),   n ≠ m,  y in S_k(u)

Windows are nested, so the inner products of window k are those of window k - 2 plus those of the
ring between them; and as x is linear in σ, two products, with φ_m and with ε, serve all levels::

    ℓ_k = ‖x‖²-term + (⟨φ_m, φ_n⟩ - ‖φ_n‖²/2) / σ² + ⟨ε, φ_n⟩ / σ      summed over Ω_k

The cost is a matrix product of 2·Q by C·k² for each place of the bank, with k the largest window,
and an exponential for each pair, window and level.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from els_kernels.control import checkpoint
from els_kernels.geometry import Geometry, max_window

_TILE = 1 << 18
"""Numbers of a tile of logits, or of patches: 1 MiB, which a cache holds."""

Cell = tuple[float, int]
"""A noise level σ and a window."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Sampled pixels of bank images that are left out, and their noise; Q of them.

    Attributes:
        images: index of the bank image, [Q] int64.
        rows: row of the output pixel, [Q] int64.
        cols: column of the output pixel, [Q] int64.
        noise: ε of the whole image, [Q, C, H, W] float32, on the bank's device.
        ranges: half-open range of bank images to attend to, (lo, hi), which contains the image
            itself and at least one other.
    """

    images: Tensor
    rows: Tensor
    cols: Tensor
    noise: Tensor
    ranges: Sequence[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.images)


@torch.no_grad()
def leave_one_out(
    bank: Tensor,
    held: HeldOut,
    cells: Sequence[Cell],
    geometry: Geometry,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Mapping[Cell, Tensor]:
    """Return E[x0 | x] at the sampled pixels for each cell, [Q, C] float64 on the CPU.

    Args:
        bank: [N, C, H, W] float32, finite.
        held: sampled pixels; x = φ + σ·ε.
        cells: noise levels σ > 0, each with an odd window up to ``max_window``.
        geometry: sources and padding; the window is not the whole image.
        report: callback with the work done and its total, in pairs of query and bank image.

    Raises:
        ValueError: A window, a level, an index or a range is invalid; names expected and got.
        ComputationStoppedError: The current ``Control`` was stopped.
    """
    _check(bank, held, cells, geometry)
    # Centred, as in the other implementations: shorter patches lose fewer digits.
    centre = bank.mean((0, 2, 3))
    moved = bank - centre[:, None, None]
    patches = _Patches(moved, max(k for _, k in cells), geometry)
    queries = _Queries(patches, moved, held)
    by_window: dict[int, list[float]] = {}
    for sigma, k in cells:
        by_window.setdefault(k, []).append(sigma)
    sums = {cell: _Softmax(len(held), bank.shape[1], bank.device) for cell in cells}
    total, done = sum(hi - lo for lo, hi in held.ranges), 0
    for block in _blocks(patches, held, geometry):
        checkpoint()
        _attend(block, queries, by_window, sums)
        done += len(block.queries) * block.images
        report(done, total)
    return {cell: (of.mean() + centre.double()).cpu() for cell, of in sums.items()}


@dataclass(frozen=True, eq=False)
class _Block:
    """Some queries and the same candidates for each of them, M."""

    queries: Tensor
    """Indices, [q]."""
    images: int
    columns: Tensor
    """Patches of the largest window, ordered as ``_Patches``, [C·K², M]."""
    values: Tensor
    """Pixel at the centre of each patch, and 1, [C + 1, M]."""
    excluded: Callable[[int], Tensor]
    """Window → whether a candidate is no source of a query, bool [q, M]."""


class _Patches:
    """Patches of the bank; numbers ordered by ring around the centre, then offset, then channel.

    The first C·k² numbers are therefore the patch of window k.
    """

    def __init__(self, bank: Tensor, largest: int, geometry: Geometry) -> None:
        self.bank, self.largest, self.geometry = bank, largest, geometry
        r = largest // 2
        offsets = [(y, x) for y in range(largest) for x in range(largest)]
        offsets.sort(key=lambda offset: max(abs(offset[0] - r), abs(offset[1] - r)))
        self._dy, self._dx = torch.tensor(offsets, device=bank.device).T

    def windows(self, images: Tensor) -> Tensor:
        """Return the view of all patches of images, [n, C, H, W, K, K]."""
        r = self.largest // 2
        mode = "constant" if self.geometry.padding == "zeros" else "circular"
        padded = pad(images, (r, r, r, r), mode=mode)
        return padded.unfold(2, self.largest, 1).unfold(3, self.largest, 1)

    def ordered(self, windows: Tensor) -> Tensor:
        """Return patches [..., C, *, K, K] with dimension 1 as C in order, [K²·C, rest]."""
        moved = windows.movedim((-2, -1, 1), (0, 1, 2))
        return moved[self._dy, self._dx].flatten(0, 1).flatten(1)


class _Queries:
    """Patches of the queries: clean ones and noise, each [Q, C·K²]."""

    def __init__(self, patches: _Patches, bank: Tensor, held: HeldOut) -> None:
        each = torch.arange(len(held), device=bank.device)
        rows, cols = held.rows.to(bank.device), held.cols.to(bank.device)

        def at(images: Tensor) -> Tensor:
            windows = patches.windows(images)[each, :, rows, cols]
            return patches.ordered(windows).T.contiguous()

        self.clean = at(bank[held.images.to(bank.device)])
        self.noise = at(held.noise)


class _Softmax:
    """Online softmax over candidates for each query: its maximum, and sums in float64."""

    def __init__(self, queries: int, channels: int, device: torch.device) -> None:
        # Finite, so that a tile without a source gives weights of zero, and not NaN.
        self._top = torch.full((queries,), -1e30, device=device)
        self._sums = torch.zeros(queries, channels + 1, dtype=torch.float64, device=device)

    def add(self, queries: Tensor, logits: Tensor, values: Tensor) -> None:
        """Add candidates, logits [q, M] (overwritten) and values [C + 1, M]."""
        before = self._top[queries]
        top = torch.maximum(before, logits.amax(1))
        # Clamped, because arithmetic with denormal numbers is slow; e⁻⁶⁰ adds nothing to a sum.
        weights = logits.sub_(top[:, None]).clamp_(min=-60).exp_()
        scale = (before - top).double().exp()[:, None]
        # `linear`, because a product with so narrow a right-hand side is five times slower.
        self._sums[queries] = self._sums[queries] * scale + linear(weights, values).double()
        self._top[queries] = top

    def mean(self) -> Tensor:
        return self._sums[:, :-1] / self._sums[:, -1:]


def _attend(
    block: _Block,
    queries: _Queries,
    by_window: Mapping[int, Sequence[float]],
    sums: Mapping[Cell, _Softmax],
) -> None:
    channels = len(block.values) - 1
    clean, noise = queries.clean[block.queries], queries.noise[block.queries]
    candidates = block.columns.shape[1]
    with_clean = clean.new_zeros(len(clean), candidates)
    with_noise = torch.zeros_like(with_clean)
    half_norm = clean.new_zeros(candidates)
    logits, begin = torch.empty_like(with_clean), 0
    for k in sorted(by_window):
        ring = slice(begin, begin := channels * k * k)
        columns = block.columns[ring]
        with_clean.addmm_(clean[:, ring], columns)
        with_noise.addmm_(noise[:, ring], columns)
        half_norm += columns.square().sum(0) / 2
        closeness = (with_clean - half_norm).masked_fill_(block.excluded(k), -torch.inf)
        for sigma in by_window[k]:
            torch.mul(closeness, 1 / sigma**2, out=logits).add_(with_noise, alpha=1 / sigma)
            sums[sigma, k].add(block.queries, logits, block.values)


def _blocks(patches: _Patches, held: HeldOut, geometry: Geometry) -> Iterator[_Block]:
    return (_same_place if geometry.sources == "same" else _every_place)(patches, held)


def _same_place(patches: _Patches, held: HeldOut) -> Iterator[_Block]:
    """Yield for each query the patches at its place."""
    bank = patches.bank
    for q, (lo, hi) in enumerate(held.ranges):
        row, col = int(held.rows[q]), int(held.cols[q])
        # The patch alone, as padding the whole bank for each query would cost more than the rest.
        columns = patches.ordered(_around(patches, bank[lo:hi], row, col))
        own = torch.arange(lo, hi, device=bank.device)[None] == int(held.images[q])
        yield _Block(
            torch.tensor([q], device=bank.device),
            hi - lo,
            columns,
            _with_one(bank[lo:hi, :, row, col].T),
            # mypy cannot infer a lambda whose default holds the loop variable.
            lambda k, own=own: own,  # type: ignore[misc]  # mypy infers no type of a default
        )


def _around(patches: _Patches, images: Tensor, row: int, col: int) -> Tensor:
    """Return the patch of each image around a place, [n, C, K, K]."""
    height, width = images.shape[-2:]
    reach = torch.arange(patches.largest, device=images.device) - patches.largest // 2
    y, x = row + reach, col + reach
    taken = images[:, :, y % height][:, :, :, x % width]
    if patches.geometry.padding != "zeros":
        return taken
    inside = ((y >= 0) & (y < height))[:, None] & ((x >= 0) & (x < width))[None]
    return taken * inside


def _every_place(patches: _Patches, held: HeldOut) -> Iterator[_Block]:
    """Yield a few images of the bank at a time, with the queries that attend to them."""
    bank, geometry = patches.bank, patches.geometry
    _, channels, height, width = bank.shape
    lows, highs = torch.tensor(list(held.ranges), device=bank.device).T
    images, rows, cols = (of.to(bank.device) for of in (held.images, held.rows, held.cols))
    numbers = height * width * max(len(held), channels * patches.largest**2)
    step = max(1, _TILE // numbers)
    masks: dict[tuple[int, int], Tensor] = {}
    ends = sorted({end for limits in held.ranges for end in limits})
    for begin, end in itertools.pairwise(ends):
        active = ((lows <= begin) & (highs >= end)).nonzero().flatten()
        for lo in range(begin, end, step) if len(active) else ():
            hi = min(lo + step, end)

            def excluded(k: int, lo: int = lo, hi: int = hi, active: Tensor = active) -> Tensor:
                key = k, int(active[0])
                if key not in masks:
                    masks[key] = ~_sources(rows[active], cols[active], k, geometry, height, width)
                own = images[active][:, None] == torch.arange(lo, hi, device=bank.device)
                return (masks[key][:, None] | own[:, :, None]).flatten(1)

            part = bank[lo:hi]
            columns = patches.ordered(patches.windows(part))
            values = _with_one(part.movedim(1, 0).reshape(channels, -1))
            yield _Block(active, hi - lo, columns, values, excluded)
        masks.clear()


def _with_one(values: Tensor) -> Tensor:
    return torch.cat([values, values.new_ones(1, values.shape[1])])


def _sources(
    rows: Tensor, cols: Tensor, k: int, geometry: Geometry, height: int, width: int
) -> Tensor:
    """Return whether a place is a source of each query, bool [q, H·W]."""
    row = _axis_sources(rows, height, k // 2, geometry.padding)
    col = _axis_sources(cols, width, k // 2, geometry.padding)
    return (row[:, :, None] & col[:, None, :]).flatten(1)


def _axis_sources(queries: Tensor, length: int, r: int, padding: str) -> Tensor:
    place = torch.arange(length, device=queries.device)
    if padding == "circular":
        return torch.ones(len(queries), length, dtype=torch.bool, device=queries.device)
    before, after = place.clamp(max=r), (length - 1 - place).clamp(max=r)
    if padding == "valid":
        return ((before == r) & (after == r)).expand(len(queries), length)
    return (before[queries][:, None] == before) & (after[queries][:, None] == after)


def _check(bank: Tensor, held: HeldOut, cells: Sequence[Cell], geometry: Geometry) -> None:
    count, channels, height, width = bank.shape
    if geometry.whole:
        raise ValueError("geometry: expected one with a window, got whole images")
    if not cells or not len(held):
        raise ValueError(f"cells and held: expected some of each, got {len(cells)} and {len(held)}")
    largest = max_window(geometry, height, width)
    for sigma, k in cells:
        if k % 2 == 0 or not 1 <= k <= largest:
            raise ValueError(f"window: expected odd from 1 to {largest}, got {k}")
        if not 0 < sigma < float("inf"):
            raise ValueError(f"sigma: expected finite and > 0, got {sigma}")
    if held.noise.shape != (len(held), channels, height, width):
        expected = [len(held), channels, height, width]
        raise ValueError(f"noise: expected shape {expected}, got {list(held.noise.shape)}")
    for name, of, limit in (("rows", held.rows, height), ("cols", held.cols, width)):
        if of.shape != (len(held),) or int(of.min()) < 0 or int(of.max()) >= limit:
            raise ValueError(f"{name}: expected [{len(held)}] from 0 to {limit - 1}")
    for image, (lo, hi) in zip(held.images.tolist(), held.ranges, strict=True):
        if not (0 <= lo <= image < hi <= count and hi - lo > 1):
            raise ValueError(
                f"ranges: expected the image {image} and another within 0 to {count}, "
                f"got {lo} to {hi}"
            )
