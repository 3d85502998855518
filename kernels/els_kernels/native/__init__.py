"""Patch attention on CPUs in C++: box sums by displacement, at a cost independent of the window."""

from els_kernels.native.binding import Native, instruction_sets

__all__ = ["Native", "instruction_sets"]
