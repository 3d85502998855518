"""Blocks of a bank for folds, in several places of this process."""

from __future__ import annotations

import torch
from torch import Tensor

from els_kernels.blocks import Blocks
from els_kernels.native import FoldImages
from els_kernels.native.fold_images import ends_of, stored_sums
from els_kernels.native.fold_pass import FoldFrame, FoldPass, FoldRows


class OwnFoldParts:
    """``FoldParts`` without processes."""

    def __init__(self, bank: Tensor, count: int) -> None:
        whole = Blocks.whole(len(bank))
        self._bank, self.shape = bank, (bank.shape[1], bank.shape[2], bank.shape[3])
        self.blocks = [whole.shard(i, count) for i in range(count)]
        self._groups = [[bank[lo:hi].clone() for lo, hi in own.limits] for own in self.blocks]

    def _images(self, centre: Tensor) -> list[FoldImages]:
        return [
            FoldImages(groups, blocks=own, centre=centre)
            for groups, own in zip(self._groups, self.blocks, strict=True)
        ]

    def fold_images(self) -> list[Tensor]:
        return [self._bank]

    def fold_sums(self) -> list[tuple[Tensor, Tensor]]:
        return [
            (torch.stack([stored_sums(group) for group in own]), ends_of(torch.cat(own)))
            for own in self._groups
        ]

    def fold_squares(self, centre: Tensor) -> list[Tensor]:
        return [own.block_squares() for own in self._images(centre)]

    def fold_norms(self, centre: Tensor, frame: FoldFrame) -> list[float]:
        return [own.largest_norm(frame) for own in self._images(centre)]

    def fold_rows(self, centre: Tensor, each: FoldPass) -> list[FoldRows]:
        return [own.rows(each) for own in self._images(centre)]
