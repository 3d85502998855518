"""Methods of the blocking client that denoise images."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from typing import Literal, Unpack, overload

from els_client import _codec as codec
from els_client._connection import Connection
from els_client._model_codec import decode_model
from els_client._models import Model
from els_client._stream import Call, PendingQueries, answers_of, check_in_flight
from els_client._types import Images, Pixels, Query, QueryOptions
from els_client.errors import ElsError
from els_proto.denoise.v1 import denoise_pb2 as pb


class DenoiseMethods(Connection):
    """Descriptions of models, posterior means and scores."""

    def models(self) -> list[Model]:
        """Return every served model, sorted by name."""
        response = self._unary(self._stub.ListModels, pb.ListModelsRequest())
        return [decode_model(model) for model in response.models]

    def model(self, name: str, *, version: str | None = None) -> Model:
        """Return the description of a model, by default of its newest version.

        Raises:
            NotFoundError: No model has that name; the text lists the served models.
        """
        request = pb.GetModelRequest(name=name, version=version or "")
        return decode_model(self._unary(self._stub.GetModel, request).model)

    def denoise(self, x: Pixels, **options: Unpack[QueryOptions]) -> Images:
        """Return the posterior mean E[x0 | x] of each noisy image, float32 [B, C, H, W].

        Exactly one noise level is required. Level, label and window have one value or B values, of
        shape [B] or [B, 1, …].

        Args:
            x: Noisy images [B, C, H, W] with pixels in [-1, 1] before noise was added; float16,
                float32 or float64 (rounded to float32), or uint8, where v means v/127.5 - 1. A
                numpy array, a tensor of torch, or any array with ``__array__`` or DLPack.
            **options: Query options.

                - model: Name of the model; required.
                - sigma: Noise level of x = x0 + σ·ε.
                - alpha_bar: Noise level of x = √ᾱ·x0 + √(1-ᾱ)·ε, 0 < ᾱ < 1.
                - time: Time on the model's own schedule, 0 < t <= 1.
                - label: From 0 to ``Model.label_count`` - 1, or -1 for none.
                - window: Odd side of the patch in pixels; by default that of the model.
                - conditioning: Floats [1 or B, T, W], such as a text encoder's output; required
                  by models with ``Model.conditioning``, rejected by others.
                - unconditional: The same for an empty text, with the same T; required for guidance.
                - guidance: g of D(unconditional) + g·(D(conditioning) - D(unconditional)),
                  |g| <= 100; by default 1, which means none. For models with
                  ``Model.label_guidance`` and no conditioning, of
                  D(no label) + g·(D(label) - D(no label)).
                - priority: 1 (highest) to ``Limits.priority_levels``; by default 2.
                - timeout_s: Deadline of this call in seconds; by default the client's.
                - version: Version of the model; by default the newest.

        Raises:
            InvalidArgumentError: A field is invalid; ``violations`` names it.
            NotFoundError: No model has that name.
            ResourceExhaustedError: The server is full; ``retry_after_s`` is the retry delay.
            ElsError: Any other failure.

        Example:
            >>> client.denoise(noisy, model="fashion-els", sigma=[0.5, 2.0]).shape
            (2, 1, 28, 28)
        """
        query = Query(x, **options)
        request = codec.encode_query(pb.DenoiseRequest, query)
        answer = self._unary(self._stub.Denoise, request, query.timeout_s)
        return codec.decode_tensor(answer.denoised)

    def denoise_with_evidence(
        self, x: Pixels, **options: Unpack[QueryOptions]
    ) -> tuple[Images, Images]:
        """Return the result of ``denoise`` and the log evidence of each pixel, float32 [B, H, W].

        The evidence is log Σ exp(logit) over a pixel's sources, unnormalised. Arguments and errors
        are those of ``denoise``, and an ``InvalidArgumentError`` unless ``Model.has_log_evidence``.
        """
        query = Query(x, **options)
        request = codec.encode_query(pb.DenoiseRequest, query, return_log_evidence=True)
        answer = self._unary(self._stub.Denoise, request, query.timeout_s)
        return codec.decode_tensor(answer.denoised), codec.decode_tensor(answer.log_evidence)

    def denoise_with_variance(
        self, x: Pixels, **options: Unpack[QueryOptions]
    ) -> tuple[Images, Images]:
        """Return the result of ``denoise`` and the posterior variance of each pixel, of its shape.

        Arguments and errors are those of ``denoise``, and an ``InvalidArgumentError`` unless
        ``Model.has_sources``. It takes about as long as ``explain``.
        """
        query = Query(x, **options)
        request = codec.encode_query(pb.DenoiseRequest, query)
        request.return_variance = True
        answer = self._unary(self._stub.Denoise, request, query.timeout_s)
        return codec.decode_tensor(answer.denoised), codec.decode_tensor(answer.variance)

    def denoise_partial(
        self, x: Pixels, **options: Unpack[QueryOptions]
    ) -> tuple[Images, list[float]]:
        """Return D(x) by the shards of the bank that are there, and each image's share, [B].

        A share is that of the bank images with the image's label, above 0; it is 1 for an answer of
        all, and of models whose bank is not in shards. Arguments and errors are those of
        ``denoise``.
        """
        query = Query(x, **options)
        request = codec.encode_query(pb.DenoiseRequest, query)
        request.allow_partial = True
        answer = self._unary(self._stub.Denoise, request, query.timeout_s)
        return codec.decode_tensor(answer.denoised), list(answer.bank_shares)

    def score(self, x: Pixels, **options: Unpack[QueryOptions]) -> Images:
        """Return the score of each noisy image, ∇ log p(x), float32 [B, C, H, W] in 1/pixel.

        Arguments and errors are those of ``denoise``.
        """
        query = Query(x, **options)
        request = codec.encode_query(pb.ScoreRequest, query)
        return codec.decode_tensor(self._unary(self._stub.Score, request, query.timeout_s).score)

    @overload
    def denoise_many(
        self,
        queries: Iterable[Query],
        *,
        in_flight: int = 16,
        return_exceptions: Literal[False] = False,
    ) -> Generator[Images, None, None]: ...

    @overload
    def denoise_many(
        self, queries: Iterable[Query], *, in_flight: int = 16, return_exceptions: bool
    ) -> Generator[Images | ElsError, None, None]: ...

    def denoise_many(
        self, queries: Iterable[Query], *, in_flight: int = 16, return_exceptions: bool = False
    ) -> Generator[Images | ElsError, None, None]:
        """Denoise a stream of queries and yield their results in order.

        At most ``in_flight`` queries are pending, and that many are read before the first result is
        yielded. If the server shuts down, pending queries are sent to the next one.

        Args:
            queries: Queries, possibly infinite; the deadline of a query counts from its arrival.
            in_flight: Maximum pending queries, at least 1.
            return_exceptions: Whether to yield the error of a failed query in its place; otherwise
                it is raised and ends the stream.

        Example:
            >>> queries = (Query(x, model="fashion-els", sigma=0.5) for x in batches)
            >>> for clean in client.denoise_many(queries):
            ...     print(clean.shape)
        """
        check_in_flight(in_flight)
        return self._many(iter(queries), in_flight, return_exceptions)

    def _many(
        self, queries: Iterator[Query], in_flight: int, return_exceptions: bool
    ) -> Generator[Images | ElsError, None, None]:
        def open_stream(requests: Iterator[pb.DenoiseRequest]) -> Call:
            return self._stub.DenoiseStream(requests, metadata=self._metadata)

        pending = PendingQueries(self._unary_timeout_s, self._route)
        with closing(answers_of(queries, pending, in_flight, open_stream)) as answers:
            for answer in answers:
                if isinstance(answer, ElsError) and not return_exceptions:
                    raise answer
                yield answer
