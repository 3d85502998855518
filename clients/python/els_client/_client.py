"""The blocking client."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, Unpack, overload

from els_client import _codec as codec
from els_client import _moments as moments
from els_client._channel import (
    SAMPLE_TIMEOUT_S,
    UNARY_TIMEOUT_S,
    bearer,
    open_channel,
    own_errors,
    timeout_of,
)
from els_client._explanation import Explanation
from els_client._originality import Originality, decode_originality, encode_originality
from els_client._repository import Repository
from els_client._retries import RetryState, Trajectory
from els_client._route import Route
from els_client._stream import Call, PendingQueries, answers_of, check_in_flight
from els_client._types import (
    Evidence,
    Images,
    Model,
    Pixels,
    Query,
    QueryOptions,
    SampleOptions,
    Step,
    Tls,
)
from els_client.errors import ElsError, ResourceExhaustedError, UnavailableError
from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub
from els_proto.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub

_Response = TypeVar("_Response")


class Client:
    """A blocking client of one server, or of all servers behind a name.

    Thread-safe. Calls are distributed round robin over all healthy servers; if there is none, they
    are retried for two or three seconds. Pings detect a hung server within about ten seconds.

    Args:
        target: Address, such as ``"127.0.0.1:50051"``, ``"dns:///els.example:50051"`` or
            ``"unix:/run/els.sock"``. For other targets than loopback and sockets gRPC uses the
            proxy
            in ``grpc_proxy``, ``https_proxy`` or ``http_proxy``, except for hosts in ``no_proxy``.
        timeout_s: Deadline of every call in seconds, more than 0 and at most a year; None means 60,
            and 600 for ``sample``. Values out of range are rejected before sending.
        tls: TLS options; None means plaintext.
        token: Bearer token of every call. Without ``tls`` it is sent in plaintext: use that only on
            loopback, or if the connection is encrypted otherwise.
        wait_when_full: Whether a call rejected by a full server is retried after the server's retry
            delay, within the deadline.
        healthy_only: Whether to use healthy servers only. Set it to False to load the first model
            of a server, which is not healthy before.

    Example:
        >>> with Client() as client:
        ...     clean = client.denoise(noisy, model="fashion-els", sigma=0.5)
    """

    def __init__(
        self,
        target: str = "127.0.0.1:50051",
        *,
        timeout_s: float | None = None,
        tls: Tls | None = None,
        token: str | None = None,
        wait_when_full: bool = False,
        healthy_only: bool = True,
    ) -> None:
        self._unary_timeout_s = timeout_of(timeout_s, UNARY_TIMEOUT_S)
        self._sample_timeout_s = timeout_of(timeout_s, SAMPLE_TIMEOUT_S)
        self._wait_when_full = wait_when_full
        self._metadata = bearer(token)
        self._route = Route.to(target)
        self._channel = open_channel(target, tls, healthy_only=healthy_only)
        self._stub = DenoiserServiceStub(self._channel)
        self._inference = GRPCInferenceServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel and cancel calls in flight."""
        self._channel.close()

    @property
    def repository(self) -> Repository:
        """Administration of the server."""
        return Repository(self._operate)

    def models(self) -> list[Model]:
        """Return every served model, sorted by name."""
        response = self._unary(self._stub.ListModels, pb.ListModelsRequest())
        return [codec.decode_model(model) for model in response.models]

    def model(self, name: str, *, version: str | None = None) -> Model:
        """Return the description of a model, by default of its newest version.

        Raises:
            NotFoundError: No model has that name; the text lists the served models.
        """
        request = pb.GetModelRequest(name=name, version=version or "")
        return codec.decode_model(self._unary(self._stub.GetModel, request).model)

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

    def score(self, x: Pixels, **options: Unpack[QueryOptions]) -> Images:
        """Return the score of each noisy image, ∇ log p(x), float32 [B, C, H, W] in 1/pixel.

        Arguments and errors are those of ``denoise``.
        """
        query = Query(x, **options)
        request = codec.encode_query(pb.ScoreRequest, query)
        return codec.decode_tensor(self._unary(self._stub.Score, request, query.timeout_s).score)

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

    def sample(
        self, *, timeout_s: float | None = None, **options: Unpack[SampleOptions]
    ) -> Generator[Step, None, None]:
        """Sample images by reverse diffusion and yield each step; ``x`` of the last is the result.

        Leaving the loop early cancels the call; a slow loop applies back-pressure. A trajectory
        that ends early, as its server shuts down or preempts it, is resumed from its last step.

        Args:
            timeout_s: Deadline of all steps together; by default the client's.
            **options: Sampling options.

                - model: Name of the model; required.
                - count: Number of images, 1 to ``Limits.max_images``; by default 1.
                - seed: 0 to 2**64 - 1, by default 0; the noise of image i depends only on (seed,
                i),
                  in any batch.
                - steps: 1 to ``Limits.max_steps``, by default 20; at least 2 for ddim_released. For
                  pyramid those of each scale, by default ``Model.scale_steps``.
                - sampler: "ddim", the default, "ddim_released", "ddpm", "heun", "euler",
                  "dpmpp_2m" or, for models of kind "picture", "pyramid".
                - timesteps: "aligned", the default: the steps of this package; "folder": those of
                  the scheduler of a diffusers folder, for models with ``Model.scheduler``.
                - times: Times of the steps instead of ``steps``, falling, 0 < t <= 1.
                - start: Clean images [1 or count, C, H, W] to start from, as ``x`` in ``denoise``;
                  noised to ``start_time``, or to the first of ``times``.
                - start_time: Time at which the steps begin with ``start``, 0 < start_time <= 1.
                - first_image: The images are ``first_image`` … ``first_image + count - 1`` of the
                  seed; by default 0.
                - size: Height and width of the images, for models with ``Model.sizes``.
                - tileable, symmetric: For pyramid: whether opposite edges meet, or the right half
                  mirrors the left; by default False.
                - mask: For pyramid: [1 or count, 1, H, W], 1 where pixels are drawn, 0 where those
                  of ``start`` are kept.
                - label: One for all images or one each; -1 means none.
                - eta: Noise of each step of ddpm, 0 to 1; by default 1.
                - churn: Total noise of heun and euler, S_churn of EDM; by default 0.
                - churn_min_sigma, churn_max_sigma: Lowest and highest churned σ, S_min and S_max of
                  EDM; by default all are.
                - churn_noise: Scale of churn's noise, S_noise of EDM, 0 to 2; by default 1.
                - want: Arrays of each step, by default "x" and "denoised", which the last step
                  always has. Only the first step has "noise", the initial state, and only the last
                  has "decoded", the images of a latent model.
                - window: Odd side of the patch in pixels, one for all images or one each.
                - window_scale: Scale of the windows of ``Model.window``, 0.1 to 10, at every level;
                  not with ``window``.
                - conditioning, unconditional, guidance: As in ``denoise``, [1 or count, T, W].
                - priority: 1 (highest) to ``Limits.priority_levels``; by default 2.
                - version: Version of the model; by default the newest.
                - explain_steps: Steps, from 1, that have ``explanation``; for models with
                  ``Model.has_sources``. Each takes as long as ``explain`` of all images.
                - explain_top, explain_images: ``top`` and ``images`` of these explanations.
                - originality: Whether the last step has ``originality``, reports against the bank
                  of the model, or the name of a model whose bank is used instead.
                - survive_breaks: Whether to resume after a broken connection as well; each step
                  then also has the state.

        Raises:
            InvalidArgumentError: A field is invalid; ``violations`` names it.
            NotFoundError: No model has that name.
            ElsError: Any other failure.

        Example:
            >>> for step in client.sample(model="fashion-els", count=2, label=[7, 9]):
            ...     print(step.index, step.total, step.denoised.shape)
        """
        timeout_s = timeout_of(timeout_s, self._sample_timeout_s)
        return self._steps(codec.encode_sample(**options), timeout_s)

    def _operate(self, method: str, request: Any) -> Any:
        call = getattr(self._inference, method)
        return self._unary(call, request, self._sample_timeout_s, pure=False)

    def _unary(
        self,
        method: Callable[..., _Response],
        request: Any,
        timeout_s: float | None = None,
        *,
        pure: bool = True,
    ) -> _Response:
        timeout_s = timeout_of(timeout_s, self._unary_timeout_s)
        attempts = RetryState(timeout_s, wait_when_full=self._wait_when_full)
        while True:
            try:
                with own_errors(self._route, timeout_s):
                    return method(request, timeout=attempts.left_s(), metadata=self._metadata)
            except (ResourceExhaustedError, UnavailableError) as error:
                pause_s = attempts.pause_s(error) if pure else attempts.pause_if_full_s(error)
            time.sleep(pause_s)

    def _steps(self, request: pb.SampleRequest, timeout_s: float) -> Generator[Step, None, None]:
        attempts = RetryState(timeout_s, wait_when_full=self._wait_when_full)
        trajectory = Trajectory(request, attempts)
        while True:
            call = self._stub.Sample(request, timeout=attempts.left_s(), metadata=self._metadata)
            try:
                with own_errors(self._route, timeout_s):
                    for message in call:
                        if step := trajectory.accept(message):
                            yield step
                trajectory.check_complete()
                return
            except (ResourceExhaustedError, UnavailableError) as error:
                pause_s = trajectory.pause_s(error)
            finally:
                call.cancel()
            time.sleep(pause_s)

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
