"""One step of a trajectory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from els_client._types import Images

if TYPE_CHECKING:
    from els_client._explanation import Explanation
    from els_client._originality import Originality


@dataclass(frozen=True, eq=False, repr=False)
class Step:
    """One step of a trajectory; on the last ``x`` and ``denoised`` are both the result.

    Attributes:
        index: From 1 to ``total``.
        total: Number of steps.
        alpha_bar: ᾱ of ``x``; increases to 1, by pyramid within each scale.
        scale: Scale of ``x`` and ``denoised``, whose size is that of the scale; 0, the coarsest,
            for other samplers than pyramid.
        scales: Number of scales; 1 for other samplers.
    """

    index: int
    total: int
    alpha_bar: float
    _x: Images | None
    _denoised: Images | None
    _noise: Images | None = None
    _decoded: Images | None = None
    _explanation: Explanation | None = None
    scale: int = 0
    scales: int = 1
    _originality: tuple[Originality, ...] = ()

    @property
    def x(self) -> Images:
        """State after this step, float32 [count, C, H, W].

        Raises:
            AttributeError: Not requested, and this is not the last step.
        """
        return _wanted("x", self._x)

    @property
    def denoised(self) -> Images:
        """D(x) used by this step, float32 [count, C, H, W].

        Raises:
            AttributeError: Not requested, and this is not the last step.
        """
        return _wanted("denoised", self._denoised)

    @property
    def noise(self) -> Images:
        """Initial standard normal noise of the trajectory, float32 [count, C, H, W].

        Raises:
            AttributeError: Not requested, or this is not the first step.
        """
        return _wanted("noise", self._noise)

    @property
    def decoded(self) -> Images:
        """Images in [-1, 1] of a latent model's ``x``: float32 [count, *Model.decoded_shape].

        Raises:
            AttributeError: Not requested, or this is not the last step.
        """
        return _wanted("decoded", self._decoded)

    @property
    def explanation(self) -> Explanation:
        """Where the first D(x) of this step came from, as ``Client.explain`` returns it.

        Raises:
            AttributeError: Not requested for this step.
        """
        if self._explanation is None:
            hint = f"request it with explain_steps=[{self.index}]"
            raise AttributeError(f"this step has no explanation: {hint}")
        return self._explanation

    @property
    def originality(self) -> tuple[Originality, ...]:
        """Report of each image of the last step, as ``Client.originality`` returns them.

        Raises:
            AttributeError: Not requested, or this is not the last step.
        """
        if not self._originality:
            hint = "request them with originality=True; only the last step has them"
            raise AttributeError(f"this step has no reports of originality: {hint}")
        return self._originality

    def __repr__(self) -> str:
        return f"Step({self.index} of {self.total}, alpha_bar={self.alpha_bar:.4g})"


def _wanted(name: str, images: Images | None) -> Images:
    if images is None:
        raise AttributeError(f"this step has no {name}: request it with want=({name!r},)")
    return images
