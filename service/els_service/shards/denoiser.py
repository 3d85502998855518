"""An analytic machine whose bank is in shards."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from els_kernels.native import PartedNative
from els_service.denoisers.analytic import AnalyticDenoiser
from els_service.denoisers.base import Denoised, Query
from els_service.shards.opening import SHARDED_CALL_S, operator_of
from els_service.shards.shard_set import ShardSet, ShardsUnavailableError


class ShardedDenoiser(AnalyticDenoiser):
    """An analytic machine that can also answer without some of its bank.

    Args:
        shards: of the bank.
        options: of ``AnalyticDenoiser``.

    Raises:
        ValueError: As ``AnalyticDenoiser``.
    """

    def __init__(self, shards: ShardSet, **options: Any) -> None:
        attention, moments = operator_of(shards)
        super().__init__(attention, shards.bank, moments=moments, call_s=SHARDED_CALL_S, **options)

    @torch.no_grad()
    def denoise_partial(self, query: Query) -> tuple[Denoised, list[float]]:
        """Return the answer of the shards that are there, and for each image their share.

        A share is that of the bank images of the image's label, 1 for a complete answer. A query
        far from the bank that float32 does not resolve needs all shards.

        Raises:
            ShardsUnavailableError: No shard has images of a label, or a far query lacks one.
        """
        native = self.attention.prepared
        assert isinstance(native, PartedNative)
        arguments = self.attention.validate(query.x, **self._arguments(query))
        if native.has_far(*arguments):
            return self.denoise(query), [1.0] * len(query)
        posterior, shares = native.attend_some(*arguments)
        if not all(shares):
            raise ShardsUnavailableError("no shard with images of this label is there")
        return Denoised(np.asarray(posterior.mean), np.asarray(posterior.log_evidence)), shares
