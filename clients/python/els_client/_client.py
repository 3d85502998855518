"""The blocking client."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, Unpack, overload

import grpc

from els_client import _codec as codec
from els_client._channel import (
    SAMPLE_TIMEOUT_S,
    UNARY_TIMEOUT_S,
    bearer,
    open_channel,
    own_errors,
    timeout_of,
)
from els_client._repository import Repository
from els_client._retries import RetryState, Trajectory
from els_client._route import Route
from els_client._stream import Call, PendingQueries, answers_of, check_in_flight
from els_client._types import Images, Model, Pixels, Query, QueryOptions, SampleOptions, Step, Tls
from els_client.errors import ElsError, ResourceExhaustedError, UnavailableError
from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub
from els_proto.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class Client:
    """A blocking client of one server, or of all that a name stands for.

    Safe to share between threads. Calls go in turn to every server that says it is healthy; those
    that find none are retried for two or three seconds. A server that hangs is noticed within about
    ten seconds, by pings.

    Args:
        target: Address, such as ``"127.0.0.1:50051"``, ``"dns:///els.example:50051"`` or
            ``"unix:/run/els.sock"``. Loopback and sockets are reached without a proxy; for others
            gRPC takes that of ``grpc_proxy``, ``https_proxy`` or ``http_proxy``, but for hosts in
            ``no_proxy``.
        timeout_s: Deadline of every call in seconds, more than 0 and at most a year; None means 60,
            and 600 for ``sample``. What is out of range is refused before anything is sent.
        tls: How the connection is encrypted; None means not at all.
        token: Bearer token that every call carries. Without ``tls`` it travels readable: use it so
            on loopback alone, or where something else encrypts.
        wait_when_full: Whether a call that a full server refuses is made again when that server
            says it will have room, as long as the deadline allows.
        healthy_only: Whether servers are left out that say they are not healthy. An operator who
            brings the first model to a server has to reach it before it is.

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
        """Close the channel; calls under way are cancelled."""
        self._channel.close()

    @property
    def repository(self) -> Repository:
        """What an operator may do with this server."""
        return Repository(self._operate)

    def models(self) -> list[Model]:
        """Return every model that can be asked now, sorted by name."""
        response = self._unary(self._stub.ListModels, pb.ListModelsRequest())
        return [codec.decode_model(model) for model in response.models]

    def model(self, name: str, *, version: str | None = None) -> Model:
        """Return one model's description, by default of its newest version.

        Raises:
            NotFoundError: No model has that name; the text says which there are.
        """
        request = pb.GetModelRequest(name=name, version=version or "")
        return codec.decode_model(self._unary(self._stub.GetModel, request).model)

    def denoise(self, x: Pixels, **options: Unpack[QueryOptions]) -> Images:
        """Return the clean image expected behind each noisy one, E[x0 | x], float32 [B, C, H, W].

        Name exactly one noise level. Level, label and window are one for all images or one each.

        Args:
            x: Noisy images [B, C, H, W] with pixels in [-1, 1] before noise was added; float16,
                float32 or float64 (rounded to float32), or uint8, where v stands for v/127.5 - 1.
            **options: What is said of them.

                - model: Name of the model; needed.
                - sigma: Noise level of x = x0 + σ·ε.
                - alpha_bar: Noise level of x = √ᾱ·x0 + √(1-ᾱ)·ε, 0 < ᾱ < 1.
                - time: Time on the model's own schedule, 0 < t <= 1.
                - label: From 0 to ``Model.label_count`` - 1, or -1 for none.
                - window: Odd side of the patch in pixels; by default the model's own.
                - conditioning: Floats [1 or B, T, W] that a model with ``Model.conditioning``
                  attends to, such as a text encoder's output; needed there, elsewhere refused.
                - unconditional: Likewise, of its T, for no text; where there is guidance.
                - guidance: g of D(unconditional) + g·(D(conditioning) - D(unconditional)),
                  |g| <= 100; by default 1, which is none.
                - priority: From 1, the first, to ``Limits.priority_levels``; by default 2.
                - timeout_s: Deadline of this call in seconds; by default the client's.
                - version: Version of the model; by default the newest.

        Raises:
            InvalidArgumentError: A field is wrong; ``violations`` says which.
            NotFoundError: No model has that name.
            ResourceExhaustedError: The server is full; ``retry_after_s`` says for how long.
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
        """Return what ``denoise`` does and the log evidence of each pixel, float32 [B, H, W].

        It is log Σ exp(logit) over a pixel's sources, unnormalised. Arguments and errors are those
        of ``denoise``; also an ``InvalidArgumentError`` unless ``Model.has_log_evidence``.
        """
        query = Query(x, **options)
        request = codec.encode_query(pb.DenoiseRequest, query, return_log_evidence=True)
        answer = self._unary(self._stub.Denoise, request, query.timeout_s)
        return codec.decode_tensor(answer.denoised), codec.decode_tensor(answer.log_evidence)

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
        """Denoise a stream of questions: yield one answer each, in their order.

        Questions are drawn while answers are: never are more than ``in_flight`` on their way, and
        that many are drawn before the first answer is yielded. Should the server end, what it has
        not answered is asked of the next one.

        Args:
            queries: Questions, finite or not; a deadline of theirs counts from their arrival.
            in_flight: Questions on their way, at least 1.
            return_exceptions: Whether a failed question yields its error in its place; else its
                error is raised and ends the stream.

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
        """Draw images by reverse diffusion and yield each step; ``x`` of the last is the result.

        A loop left early cancels the call, and a slow one slows the server down. Should the server
        end before the last step, or need room for other callers, it is resumed where it stopped.

        Args:
            timeout_s: Deadline of all steps together; by default the client's.
            **options: What is to be drawn, and how.

                - model: Name of the model; needed.
                - count: How many images, 1 to ``Limits.max_images``; by default 1.
                - seed: 0 to 2**64 - 1, by default 0; image i draws its noise from (seed, i), alone
                  or in any batch.
                - steps: 1 to ``Limits.max_steps``, by default 20; at least 2 for ddim_released.
                - sampler: "ddim", the default, "ddim_released", "ddpm" or "heun".
                - label: One for all images or one each; -1 for none.
                - eta: Noise that each step of ddpm adds, 0 to 1; by default 0, and None means 1.
                - churn: Noise that heun adds in all, S_churn of EDM, 0 to ``steps``; by default 0.
                - want: What each step carries, by default "x" and "denoised"; the last always
                  carries these. The first alone carries "noise", which the trajectory started
                  from, the last alone "decoded", the images of a latent model.
                - window: Odd side of the patch in pixels, one for all images or one each.
                - conditioning, unconditional, guidance: As in ``denoise``, [1 or count, T, W].
                - priority: From 1, the first, to ``Limits.priority_levels``; by default 2.
                - version: Version of the model; by default the newest.
                - survive_breaks: Whether a connection that breaks without a word is outlived too;
                  each step is then longer by its state.

        Raises:
            InvalidArgumentError: A field is wrong; ``violations`` says which.
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
        method: grpc.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
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
