"""Methods of the blocking client that differentiate, explain and compare."""

from __future__ import annotations

from typing import Any, Unpack

from els_client import _codec as codec
from els_client import _moments as moments
from els_client._channel import timeout_of
from els_client._connection import Connection
from els_client._explanation import Explanation
from els_client._originality import Originality, decode_originality, encode_originality
from els_client._types import Evidence, Images, Pixels, Query, QueryOptions
from els_proto.denoise.v1 import denoise_pb2 as pb


class ExplainMethods(Connection):
    """Jacobian products, sources of pixels, and originality."""

    def vjp(
        self,
        x: Pixels,
        cotangent: Pixels,
        *,
        evidence: Evidence | None = None,
        **options: Unpack[QueryOptions],
    ) -> tuple[Images, Images]:
        """Return D(x) = E[x0 | x] and Jᵀg with J = ∂D/∂x, both float32 [B, C, H, W].

        Arguments and errors are those of ``denoise``; models without ``Model.has_gradients`` raise
        an ``ElsError`` with code ``FAILED_PRECONDITION``.

        Args:
            x: As in ``denoise``.
            cotangent: g, floats of the shape of ``x``.
            evidence: Spares further products of the same ``x``, level, labels and windows the first
                of two passes over the bank; changes no bit. The first call fills it.
            **options: As in ``denoise``.

        Example:
            >>> denoised, gradient = client.vjp(x, measured - x, model="fashion-els", sigma=0.5)
            >>> evidence = Evidence()
            >>> for g in cotangents:
            ...     client.vjp(x, g, evidence=evidence, model="fashion-els", sigma=0.5)
        """
        query = Query(x, **options)
        request = moments.encode_product(pb.VjpRequest, query, "cotangent", cotangent, evidence)
        answer = self._unary(self._stub.Vjp, request, query.timeout_s)
        moments.keep_evidence(evidence, answer)
        return codec.decode_tensor(answer.denoised), codec.decode_tensor(answer.vjp)

    def jvp(
        self,
        x: Pixels,
        tangent: Pixels,
        *,
        evidence: Evidence | None = None,
        **options: Unpack[QueryOptions],
    ) -> tuple[Images, Images]:
        """Return D(x) = E[x0 | x] and J u with J = ∂D/∂x, both float32 [B, C, H, W].

        Arguments and errors are those of ``vjp``, with a tangent u in place of the cotangent.
        """
        query = Query(x, **options)
        request = moments.encode_product(pb.JvpRequest, query, "tangent", tangent, evidence)
        answer = self._unary(self._stub.Jvp, request, query.timeout_s)
        moments.keep_evidence(evidence, answer)
        return codec.decode_tensor(answer.denoised), codec.decode_tensor(answer.jvp)

    def explain(
        self, x: Pixels, *, top: int = 8, images: int = 0, **options: Unpack[QueryOptions]
    ) -> Explanation:
        """Return from which bank images, rows and columns each pixel of D(x) came.

        Arguments and errors are those of ``denoise``; models without ``Model.has_sources`` raise
        an ``ElsError`` with code ``FAILED_PRECONDITION`` that lists the models that explain.

        Args:
            x: As in ``denoise``.
            top: Sources of each pixel, 1 to 16.
            images: Bank images of largest share to return, 0 to 16.
            **options: As in ``denoise``, without conditioning.

        Example:
            >>> found = client.explain(noisy, model="fashion-els", sigma=0.5)
            >>> found.sources[0, 14, 14, 0]  # bank image, row and column of the largest weight
        """
        query = Query(x, **options)
        request = moments.encode_explain(query, top, images)

        def explain(request: pb.ExplainRequest, **call: Any) -> list[pb.ExplainResponse]:
            return list(self._stub.Explain(request, **call))

        timeout_s = timeout_of(query.timeout_s, self._sample_timeout_s)
        messages = self._unary(explain, request, timeout_s)
        return moments.decode_explanation(messages, request.x.shape[0])

    def originality(
        self, x: Pixels, *, nearest: int = 8, **options: Unpack[QueryOptions]
    ) -> tuple[Originality, ...]:
        """Return how original each image is, measured against the bank of a model.

        Arguments and errors are those of ``denoise``; models without ``Model.has_originality``
        raise an ``ElsError`` with code ``FAILED_PRECONDITION`` that lists the models that
        have it. Measures of sources need ``Model.has_sources``.

        Args:
            x: Clean images, from whatever model or file.
            nearest: Bank images of least distance to return, 1 to 50.
            **options: As in ``denoise``, without conditioning. The noise level is that of the
                explanation that gives the sources; without one it is sigma=0.1. Without a window it
                is 11, or the largest if that is less. Labels restrict the sources, not the
                distances.

        Example:
            >>> (found,) = client.originality(image, model="fashion-els")
            >>> found.memorised, found.gap_ratio, found.sources_of_90
        """
        query = Query(x, **options)
        request = encode_originality(query, nearest)

        def compare(request: pb.OriginalityRequest, **call: Any) -> list[pb.OriginalityResponse]:
            return list(self._stub.Originality(request, **call))

        timeout_s = timeout_of(query.timeout_s, self._sample_timeout_s)
        messages = self._unary(compare, request, timeout_s)
        return decode_originality(messages, request.x.shape[0])
