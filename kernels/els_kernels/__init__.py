"""Patch attention: the operator behind every analytic denoiser. Depends on torch only.

attention = PatchAttention(bank)                      # bank [N, C, H, W] in [-1, 1]
posterior = attention(x, a=a, s=s, window=k, geometry=GEOMETRIES["els", "zeros"])
posterior.mean, posterior.log_evidence                # [B, C, H, W], [B, H, W]
"""

from els_kernels.attention import IMPLEMENTATIONS, PatchAttention
from els_kernels.control import ComputationStoppedError, Control, checkpoint
from els_kernels.fold import FOLD_GEOMETRIES, FOLD_IMPLEMENTATIONS, FoldedAttention
from els_kernels.fold_moments import FOLD_MOMENT_IMPLEMENTATIONS, FoldedMoments
from els_kernels.fold_plan import count_fold_pairs, count_fold_work, grouped
from els_kernels.geometry import GEOMETRIES, Geometry, Posterior, count_pairs, max_window
from els_kernels.moments import PatchMoments
from els_kernels.posterior_statistics import MAX_SOURCES, PosteriorStatistics, Removal

__all__ = [
    "FOLD_GEOMETRIES",
    "FOLD_IMPLEMENTATIONS",
    "FOLD_MOMENT_IMPLEMENTATIONS",
    "GEOMETRIES",
    "IMPLEMENTATIONS",
    "MAX_SOURCES",
    "ComputationStoppedError",
    "Control",
    "FoldedAttention",
    "FoldedMoments",
    "Geometry",
    "PatchAttention",
    "PatchMoments",
    "Posterior",
    "PosteriorStatistics",
    "Removal",
    "checkpoint",
    "count_fold_pairs",
    "count_fold_work",
    "count_pairs",
    "grouped",
    "max_window",
]
