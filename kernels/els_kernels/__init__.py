"""Patch attention: the operator behind every analytic denoiser. Depends on torch only.

attention = PatchAttention(bank)                      # bank [N, C, H, W] in [-1, 1]
posterior = attention(x, a=a, s=s, window=k, geometry=GEOMETRIES["els", "zeros"])
posterior.mean, posterior.log_evidence                # [B, C, H, W], [B, H, W]
"""

from els_kernels.attention import IMPLEMENTATIONS, PatchAttention
from els_kernels.control import ComputationStoppedError, Control, checkpoint
from els_kernels.geometry import GEOMETRIES, Geometry, Posterior, count_pairs, max_window
from els_kernels.moments import MAX_SOURCES, PatchMoments, PosteriorStatistics, Removal

__all__ = [
    "GEOMETRIES",
    "IMPLEMENTATIONS",
    "MAX_SOURCES",
    "ComputationStoppedError",
    "Control",
    "Geometry",
    "PatchAttention",
    "PatchMoments",
    "Posterior",
    "PosteriorStatistics",
    "Removal",
    "checkpoint",
    "count_pairs",
    "max_window",
]
