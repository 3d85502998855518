"""Prints the implementations of patch attention that run here, and why the others do not."""

from __future__ import annotations

import torch

from els_kernels.native import instruction_sets
from els_kernels.triton import unavailable


def main() -> None:
    """Print one line for each implementation."""
    try:
        native = ", ".join(instruction_sets())
    except RuntimeError as error:
        native = f"no: {error}"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    triton = unavailable(torch.empty(0, device=device))
    print(f"native     {native}")
    print(f"triton     {device if triton is None else f'no: {triton}'}")
    print(f"torch      {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
