"""The sources of largest weight of every pixel, found during a sweep."""

from __future__ import annotations

import torch
from torch import Tensor

from els_kernels.displacements import Pairs


class Ranking:
    """The ``top`` largest weights of each of H × W pixels, with their sources.

    Args:
        top: number of sources.
        height: of the image.
        width: of the image.
        device: of the weights.
    """

    def __init__(self, top: int, height: int, width: int, device: torch.device) -> None:
        self._top, self._shape = top, (height, width)
        self._weights = torch.zeros(height * width, top, dtype=torch.float64, device=device)
        self._sources = torch.full((height * width, top, 3), -1, device=device)

    def add(self, pairs: Pairs, weights: Tensor, first: int) -> None:
        """Add the pairs of one displacement.

        Args:
            pairs: of the sweep.
            weights: [R, S, T], final.
            first: index in the bank of the tile's first image.
        """
        height, width = self._shape
        places = torch.arange(height * width, device=weights.device).view(height, width)
        chosen = pairs.at(places).flatten()
        # Few displacements reach the list once it is filled: the others cost one maximum.
        reach = weights.amax(-1).flatten() > self._weights[chosen, -1]
        if not reach.any():
            return
        place = chosen[reach]
        found, image = weights.flatten(0, 1)[reach].sort(dim=-1, descending=True, stable=True)
        found, image = found[:, : self._top], image[:, : self._top] + first
        row = (place // width + pairs.row.displacement) % height
        col = (place % width + pairs.col.displacement) % width
        sources = torch.stack(
            [image, row[:, None].expand_as(image), col[:, None].expand_as(image)], -1
        )
        self._merge(place, found, sources)

    def add_rows(
        self, weights: Tensor, rows: slice, shift: int, columns: int | None, first: int
    ) -> None:
        """Add pairs of some rows of pixels with what is ``shift`` rows below.

        Args:
            weights: [R, W, n·w], final; n images by w columns.
            rows: of the pixels.
            shift: row of a source minus row of a pixel.
            columns: w; None for the pixel's own column alone.
            first: index in the bank of the first of the n images.
        """
        width = self._shape[1]
        places = torch.arange(rows.start * width, rows.stop * width, device=weights.device)
        flat = weights.flatten(0, 1)
        reach = flat.amax(-1) > self._weights[places, -1]
        if not reach.any():
            return
        place = places[reach]
        found, index = flat[reach].topk(min(self._top, flat.shape[1]))
        row = (place // width + shift)[:, None].expand_as(index)
        if columns is None:
            image, col = index, (place % width)[:, None].expand_as(index)
        else:
            image, col = index // columns, index % columns
        self._merge(place, found, torch.stack([image + first, row, col], -1))

    def _merge(self, place: Tensor, found: Tensor, sources: Tensor) -> None:
        """Merge weights [P, ·] with sources [P, ·, 3] into the lists of some places [P]."""
        merged = torch.cat([self._weights[place], found], 1)
        listed = torch.cat([self._sources[place], sources], 1)
        # Stable: of equal weights the earlier stays first.
        merged, order = merged.sort(dim=-1, descending=True, stable=True)
        order = order[:, : self._top]
        self._weights[place] = merged[:, : self._top]
        self._sources[place] = listed.gather(1, order[..., None].expand(-1, -1, 3))

    def result(self) -> tuple[Tensor, Tensor]:
        """Return the sources [H, W, top, 3] int64 and their weights [H, W, top] float64."""
        return self._sources.view(*self._shape, -1, 3), self._weights.view(*self._shape, -1)
