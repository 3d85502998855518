"""Evidence of a first pass over the bank, which callers send back: opaque bytes with a signature.

    numbers f64 [B, K, H, W] · HMAC-SHA-256 of model, query and numbers (32)

Little-endian. The key is that of the process, so that wrong numbers never reach a kernel: what this
process did not return for the same query is not used.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

import numpy as np
import numpy.typing as npt

from els_service.denoisers.base import Query
from els_service.engine.model_versions import ModelVersion

SIGNATURE_BYTES = 32


class EvidenceSeal:
    """Signs evidence for queries, and verifies it."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def signed(self, served: ModelVersion, query: Query, numbers: npt.NDArray[np.float64]) -> bytes:
        """Return the bytes of evidence.

        Args:
            served: model of the query.
            query: noisy images.
            numbers: [B, K, H, W].
        """
        content = numbers.astype("<f8", copy=False).tobytes()
        return content + self._signature(served, query, content)

    def verified(
        self, served: ModelVersion, query: Query, evidence: bytes
    ) -> npt.NDArray[np.float64] | None:
        """Return the numbers [B, K, H, W] of evidence; None if it was not signed for this query."""
        content, signature = evidence[:-SIGNATURE_BYTES], evidence[-SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, self._signature(served, query, content)):
            return None
        batch, _, height, width = query.pixels.shape
        return np.frombuffer(content, "<f8").reshape(batch, -1, height, width)

    def _signature(self, served: ModelVersion, query: Query, content: bytes) -> bytes:
        info = served.info
        described = (
            *(served.model, served.version, served.content, info.implementation),
            *(info.machine, info.padding, info.bank.fingerprint if info.bank else ""),
            *(query.level.pairs, query.labels.tolist(), query.windows.tolist()),
            query.pixels.shape,
        )
        signature = hmac.new(self._key, repr(described).encode(), hashlib.sha256)
        signature.update(np.ascontiguousarray(query.pixels).data)
        signature.update(content)
        return signature.digest()
