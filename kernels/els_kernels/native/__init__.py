"""Patch attention on CPUs in C++: box sums by displacement, at a cost independent of the window."""

from els_kernels.native.bank import Native
from els_kernels.native.binding import instruction_sets
from els_kernels.native.fold_binding import NativeFold
from els_kernels.native.fold_images import FoldImages, FoldSourceImages
from els_kernels.native.fold_moments_binding import NativeFoldMoments
from els_kernels.native.fold_parted import FoldParts, PartedFoldImages
from els_kernels.native.moments_binding import NativeMoments
from els_kernels.native.parted import BankParts, PartedNative

__all__ = [
    "BankParts",
    "FoldImages",
    "FoldParts",
    "FoldSourceImages",
    "Native",
    "NativeFold",
    "NativeFoldMoments",
    "NativeMoments",
    "PartedFoldImages",
    "PartedNative",
    "instruction_sets",
]
