"""``FoldParts`` of a bank in shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from els_kernels import FoldedAttention, FoldedMoments
from els_kernels.native import PartedFoldImages
from els_kernels.native.fold_pass import FoldFrame, FoldPass, FoldRows
from els_service.shards.fold_messages import frame_fields, pass_fields
from els_service.shards.shard_set import ShardSet
from els_service.shards.values import array_of, tensors_of


class FoldShards:
    """Processes that have the blocks of a bank, asked for folds.

    Args:
        shards: of the bank.
    """

    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards
        self.blocks, self.shape = shards.blocks, shards.shape

    def fold_images(self) -> Sequence[Tensor]:
        """Return the stored images of the whole bank, mapped, or copied from several files."""
        return [self.shards.bank.stored()]

    def fold_sums(self) -> list[tuple[Tensor, Tensor]]:
        """Return the sums of the blocks and the ends of the images of every shard."""
        found = self.shards.ask("fold_sums", {}, [])
        return [(sums, ends) for sums, ends in map(tensors_of, found)]

    def fold_squares(self, centre: Tensor) -> list[Tensor]:
        """Return the squares of the blocks of every shard."""
        found = self.shards.ask("fold_squares", {}, [array_of(centre)])
        return [tensors_of(one)[0] for one in found]

    def fold_norms(self, centre: Tensor, frame: FoldFrame) -> list[float]:
        """Return the largest norm of a patch of every shard."""
        found = self.shards.ask("fold_norms", frame_fields(frame), [array_of(centre)])
        return [one.fields["norm"] for one in found]

    def fold_rows(self, centre: Tensor, each: FoldPass) -> list[FoldRows]:
        """Return the rows of a pass of every shard."""
        arrays = [array_of(centre), *(array_of(tensor) for tensor in each.tensors.values())]
        found = self.shards.ask("fold_rows", pass_fields(each), arrays)
        return [FoldRows(*tensors_of(one)) for one in found]


@torch.no_grad()
def fold_of_shards(shards: ShardSet) -> FoldedMoments:
    """Return the moments of the fold of a bank in shards."""
    images = PartedFoldImages(FoldShards(shards))
    return FoldedMoments(FoldedAttention.of_parts(images, largest=1.0))
