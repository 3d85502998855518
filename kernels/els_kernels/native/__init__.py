"""Patch attention on CPUs in C++: box sums by displacement, at a cost independent of the window."""

from els_kernels.native.binding import Native, instruction_sets
from els_kernels.native.fold_binding import NativeFold
from els_kernels.native.fold_moments_binding import NativeFoldMoments
from els_kernels.native.moments_binding import NativeMoments

__all__ = ["Native", "NativeFold", "NativeFoldMoments", "NativeMoments", "instruction_sets"]
