"""Memory layout of the kernels' inputs: rows paired along diagonals, and the rows of each tile."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from els_kernels.geometry import Padding, band


def pair_rows(
    images: Tensor, window: int, padding: Padding, *, query: bool, slack: int = 0
) -> Tensor:
    """Return each row with the row that leaves the window as it enters, [..., R, W', PAIR].

    ``images`` are [..., C, H, W]. Channels are (row t, row t - k, zeros); for a query the second is
    negated. Missing rows are zero. On the torus a query has its H+k-1 rows written out and none
    before them, while keys wrap. ``slack`` zeros follow in memory.
    """
    r = window // 2
    channels = images.shape[-3]
    torus = padding == "circular"
    if padding == "zeros":
        images = pad_zeros(images, r)
    elif query:
        images = wrap(images, r, r)
    elif torus:
        images = wrap(images, 0, r)
    rows, cols = images.shape[-2:]
    shape = (*images.shape[:-3], rows, cols, pair_width(channels))
    pairs = zeros_with_slack(images, shape, slack)
    pairs[..., :channels] = images.movedim(-3, -1)
    if torus and not query:
        pairs[..., channels : 2 * channels] = images.roll(window, -2).movedim(-3, -1)
    elif rows > window:
        old = images[..., : rows - window, :].movedim(-3, -1)
        pairs[..., window:, :, channels : 2 * channels] = -old if query else old
    return pairs


def zeros_with_slack(like: Tensor, shape: tuple[int, ...], slack: int) -> Tensor:
    """Return zeros of a shape, followed in memory by ``slack`` zeros that loads may read."""
    size = math.prod(shape)
    return like.new_zeros(size + slack)[:size].view(shape)


def aligned(tensor: Tensor) -> Tensor:
    """Return the tensor, copied if its first byte is not at a multiple of 16.

    Triton compiles a binary of its own for tensors that are not; a part of a larger one may be.
    """
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def pair_width(channels: int) -> int:
    """Return the smallest power of two that holds two rows' channels."""
    return 1 << (2 * channels - 1).bit_length()


def unfold_rows(pairs: Tensor, window: int, depth: int) -> Tensor:
    """Return [..., R, W'-k+1, depth]: the k pairs from each place on, then zeros."""
    runs = pairs.unfold(-2, window, 1).transpose(-1, -2).flatten(-2)
    return torch.nn.functional.pad(runs, (0, depth - runs.shape[-1])).contiguous()


def pad_zeros(images: Tensor, r: int) -> Tensor:
    """Return the images with r rows of zeros above and below."""
    return torch.nn.functional.pad(images, (0, 0, r, r))


def wrap(images: Tensor, rows: int, cols: int) -> Tensor:
    """Return the images continued around the torus by rows and columns on each side."""
    height, width = images.shape[-2:]
    y = torch.arange(-rows, height + rows, device=images.device) % height
    x = torch.arange(-cols, width + cols, device=images.device) % width
    return images.index_select(-2, y).index_select(-1, x)


def half_norms(terms: Tensor, window: int, padding: Padding) -> Tensor:
    """Return ‖p‖²/2 of the window at every place, [N, H, W] float32, of key terms [KT, N, C, H, W].

    Windows that extend past the image are clipped, except on the torus.
    """
    inside: Padding = "circular" if padding == "circular" else "zeros"
    rows, cols = (_band(n, window, inside, terms.device) for n in terms.shape[-2:])
    norms = torch.empty(terms.shape[1], *terms.shape[-2:], dtype=torch.float32, device=terms.device)
    for first in range(0, len(norms), 4096):
        block = terms[:, first : first + 4096].double().sum(0).square().sum(1)
        norms[first : first + 4096] = rows @ block @ cols.T / 2
    return norms


@functools.lru_cache(maxsize=64)
def _band(length: int, window: int, padding: Padding, device: torch.device) -> Tensor:
    """Return ``band`` on a device, kept as every call needs it again."""
    return band(length, window, padding).to(device)


def squared_norms(terms: Tensor) -> Tensor:
    """Return ‖φ‖² of every image, [N] float32, of key terms [KT, N, C, H, W]."""
    blocks = (terms[:, n : n + 4096].double() for n in range(0, terms.shape[1], 4096))
    return torch.cat([block.sum(0).square().sum((1, 2, 3)) for block in blocks]).float()


def responses(terms: Tensor) -> Tensor:
    """Return [N, H, W, V] float16: every channel's terms, a one, zeros up to a power of two."""
    key_terms, images, channels, height, width = terms.shape
    filled = key_terms * channels
    values = terms.new_zeros(images, height, width, value_width(channels, key_terms))
    for i, term in enumerate(terms):
        # One by one: a permuted copy of all would be as large again.
        values[..., i * channels : (i + 1) * channels] = term.movedim(1, -1)
    values[..., filled] = 1
    return values


def value_width(channels: int, key_terms: int) -> int:
    """Return the smallest power of two that holds every channel's terms and a one."""
    return 1 << (channels * key_terms).bit_length()


def row_spans(
    flat0: int, flats: int, block: int, query: tuple[int, int], rows: tuple[int, int], margin: int
) -> list[tuple[int, int]]:
    """Return the key rows [first, last) of each tile of flat diagonals.

    A flat diagonal F pairs key row t with flat query place F + t·cols. ``query`` is (rows, cols),
    ``rows`` the key rows that any diagonal may need; the tile of diagonal 0 also has
    ``margin`` rows before and after them, where the only source of a place is itself.
    """
    query_rows, cols = query
    tiles = []
    for low in range(flat0, flat0 + flats, block):
        high = min(low + block, flat0 + flats) - 1
        extra = margin if low < cols and high >= 0 else 0
        first = max(rows[0] - extra, -(high // cols))
        last = min(rows[1] + extra, query_rows - low // cols)
        tiles.append((first, last))
    return tiles
