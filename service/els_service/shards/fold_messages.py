"""Passes of folds in messages, and what a process with a part of a bank answers to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from els_kernels.blocks import Blocks
from els_kernels.native import FoldImages
from els_kernels.native.fold_images import ends_of, stored_sums
from els_kernels.native.fold_pass import FoldFrame, FoldPass
from els_service.shards.mapped_images import MappedImages
from els_service.shards.messages import Message
from els_service.shards.values import geometry_fields, geometry_of, reply, tensors_of


def frame_fields(frame: FoldFrame) -> dict[str, Any]:
    """Return the fields of a frame in a message."""
    own = {"size": frame.size, "window": frame.window, "cell": frame.cell}
    return own | {"rows": frame.answered} | geometry_fields(frame.geometry)


def frame_of(fields: dict[str, Any]) -> FoldFrame:
    """Return the frame in a message."""
    (height, width), rows = fields["size"], fields["rows"]
    return FoldFrame(
        (height, width),
        fields["window"],
        geometry_of(fields),
        fields["cell"],
        None if rows is None else (rows[0], rows[1]),
    )


def pass_fields(each: FoldPass) -> dict[str, Any]:
    """Return the fields of a pass in a message; its tensors follow the centre, in their order."""
    return frame_fields(each.frame) | {
        "kind": each.kind,
        "ranges": each.ranges,
        "parts": each.parts,
        "logits": each.logits,
        "inputs": list(each.tensors),
        "numbers": each.numbers,
        "answered": each.answered,
    }


def pass_of(message: Message) -> FoldPass:
    """Return the pass in a message."""
    fields = message.fields
    bias, scale, lowest, dead = fields["logits"]
    _, *inputs = tensors_of(message)
    return FoldPass(
        fields["kind"],
        frame_of(fields),
        [(lo, hi) for lo, hi in fields["ranges"]],
        fields["parts"],
        (bias, scale, lowest, dead),
        dict(zip(fields["inputs"], inputs, strict=True)),
        fields["numbers"],
        fields["answered"],
    )


class FoldPart:
    """Blocks of a bank as they are stored, for folds; nothing is read before it is asked for.

    Args:
        images: of the whole bank, mapped.
        blocks: of the process.
    """

    def __init__(self, images: MappedImages, blocks: Blocks) -> None:
        self._mapped, self._blocks = images, blocks
        self._images: FoldImages | None = None
        self.operations: dict[str, Callable[[Message], Message]] = {
            "fold_sums": self._sums,
            "fold_squares": self._squares,
            "fold_norms": self._norms,
            "fold_rows": self._rows,
        }
        """By name; all but the first have the centre of the whole bank as their first array."""

    def _groups(self) -> list[Tensor]:
        return [torch.from_numpy(self._mapped[lo:hi]) for lo, hi in self._blocks.limits]

    def _prepared(self, message: Message) -> FoldImages:
        if self._images is None:
            centre = torch.from_numpy(message.arrays[0])
            self._images = FoldImages(self._groups(), blocks=self._blocks, centre=centre)
        return self._images

    def _sums(self, message: Message) -> Message:
        """Answer ``FoldParts.fold_sums``."""
        groups = self._groups()
        ends = torch.stack([ends_of(group) for group in groups])
        return reply(
            torch.stack([stored_sums(group) for group in groups]),
            torch.stack([ends[:, 0].amin(0), ends[:, 1].amax(0)]),
        )

    def _squares(self, message: Message) -> Message:
        return reply(self._prepared(message).block_squares())

    def _norms(self, message: Message) -> Message:
        return reply(norm=self._prepared(message).largest_norm(frame_of(message.fields)))

    def _rows(self, message: Message) -> Message:
        return reply(*self._prepared(message).rows(pass_of(message)))
