"""The blocking client."""

from __future__ import annotations

from collections.abc import Collection, Generator
from types import TracebackType
from typing import Self, TypeVar

import grpc

from els_client import _codec as codec
from els_client._channel import SAMPLE_TIMEOUT_S, UNARY_TIMEOUT_S, bearer, open_channel, own_errors
from els_client._types import Images, Integers, Levels, Model, Pixels, Sampler, Step, Tls, Want
from els_proto.denoise.v1 import denoise_pb2 as pb
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class Client:
    """A blocking client of one server, or of all that a name stands for.

    Safe to share between threads. Calls that find no server are retried for a second or two.

    Args:
        target: Address, such as ``"127.0.0.1:50051"`` or ``"dns:///els.example:50051"``.
        timeout_s: Deadline of every call in seconds; None means 60, and 600 for ``sample``.

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
    ) -> None:
        self._unary_timeout_s = UNARY_TIMEOUT_S if timeout_s is None else timeout_s
        self._sample_timeout_s = SAMPLE_TIMEOUT_S if timeout_s is None else timeout_s
        self._metadata = bearer(token)
        self._channel = open_channel(target, tls)
        self._stub = DenoiserServiceStub(self._channel)

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

    def models(self) -> list[Model]:
        """Return every model that can be asked now, sorted by name."""
        response = self._unary(self._stub.ListModels, pb.ListModelsRequest())
        return [codec.decode_model(model) for model in response.models]

    def model(self, name: str) -> Model:
        """Return one model's description.

        Raises:
            NotFoundError: No model has that name; the text says which there are.
        """
        request = pb.GetModelRequest(name=name)
        return codec.decode_model(self._unary(self._stub.GetModel, request).model)

    def denoise(
        self,
        x: Pixels,
        *,
        model: str,
        sigma: Levels | None = None,
        alpha_bar: Levels | None = None,
        time: Levels | None = None,
        label: Integers | None = None,
        window: Integers | None = None,
    ) -> Images:
        """Return the clean image expected behind each noisy one, E[x0 | x], float32 [B, C, H, W].

        Name exactly one noise level. Level, label and window are one for all images or one each.

        Args:
            x: Noisy images [B, C, H, W] with pixels in [-1, 1] before noise was added; float16,
                float32 or float64 (rounded to float32), or uint8, where v stands for v/127.5 - 1.
            model: Name of the model.
            sigma: Noise level of x = x0 + σ·ε.
            alpha_bar: Noise level of x = √ᾱ·x0 + √(1-ᾱ)·ε, 0 < ᾱ < 1.
            time: Time on the model's own schedule, 0 < t <= 1.
            label: From 0 to ``Model.label_count`` - 1, or -1 for none.
            window: Odd side of the patch in pixels; None means the model's own.

        Raises:
            InvalidArgumentError: A field is wrong; ``violations`` says which.
            NotFoundError: No model has that name.
            ElsError: Any other failure.

        Example:
            >>> client.denoise(noisy, model="fashion-els", sigma=[0.5, 2.0]).shape
            (2, 1, 28, 28)
        """
        level = codec.encode_level(sigma, alpha_bar, time)
        request = codec.encode_query(pb.DenoiseRequest, x, model, level, label, window)
        return codec.decode_tensor(self._unary(self._stub.Denoise, request).denoised)

    def denoise_with_evidence(
        self,
        x: Pixels,
        *,
        model: str,
        sigma: Levels | None = None,
        alpha_bar: Levels | None = None,
        time: Levels | None = None,
        label: Integers | None = None,
        window: Integers | None = None,
    ) -> tuple[Images, Images]:
        """Return what ``denoise`` does and the log evidence of each pixel, float32 [B, H, W].

        It is log Σ exp(logit) over a pixel's sources, unnormalised. Arguments and errors are those
        of ``denoise``; also an ``InvalidArgumentError`` unless ``Model.has_log_evidence``.
        """
        level = codec.encode_level(sigma, alpha_bar, time)
        request = codec.encode_query(pb.DenoiseRequest, x, model, level, label, window, True)
        response = self._unary(self._stub.Denoise, request)
        return codec.decode_tensor(response.denoised), codec.decode_tensor(response.log_evidence)

    def score(
        self,
        x: Pixels,
        *,
        model: str,
        sigma: Levels | None = None,
        alpha_bar: Levels | None = None,
        time: Levels | None = None,
        label: Integers | None = None,
        window: Integers | None = None,
    ) -> Images:
        """Return the score of each noisy image, ∇ log p(x), float32 [B, C, H, W] in 1/pixel.

        Arguments and errors are those of ``denoise``.
        """
        level = codec.encode_level(sigma, alpha_bar, time)
        request = codec.encode_query(pb.ScoreRequest, x, model, level, label, window)
        return codec.decode_tensor(self._unary(self._stub.Score, request).score)

    def sample(
        self,
        *,
        model: str,
        count: int = 1,
        seed: int = 0,
        steps: int = 20,
        sampler: Sampler = "ddim",
        label: Integers | None = None,
        eta: float | None = 0.0,
        churn: float = 0.0,
        want: Collection[Want] = ("x", "denoised"),
        window: Integers | None = None,
    ) -> Generator[Step, None, None]:
        """Draw images by reverse diffusion; iterates over the steps, the last has the result.

        The call starts with the first step asked for. Leaving the loop, or ``close()``, cancels it.

        Args:
            model: Name of the model.
            count: How many images, 1 to ``Limits.max_images``.
            seed: 0 to 2**64 - 1; image i draws its noise from (seed, i), alone or in any batch.
            steps: 1 to ``Limits.max_steps``; at least 2 for ddim_released.
            sampler: "ddim", "ddim_released", "ddpm" or "heun".
            label: One for all images or one each; -1 for none.
            eta: Noise that each step of ddpm adds, 0 to 1; None means 1 there.
            churn: Noise that heun adds in all, S_churn of EDM, 0 to ``steps``.
            want: What each step carries; the last always carries "x" and "denoised", and the
                first alone "noise", which the trajectory started from.
            window: Odd side of the patch in pixels, one for all images or one each.

        Raises:
            InvalidArgumentError: A field is wrong; ``violations`` says which.
            NotFoundError: No model has that name.
            ElsError: Any other failure.

        Example:
            >>> for step in client.sample(model="fashion-els", count=2, label=[7, 9]):
            ...     print(step.index, step.total, step.denoised.shape)
        """
        request = codec.encode_sample(
            model=model,
            count=count,
            seed=seed,
            steps=steps,
            sampler=sampler,
            label=label,
            window=window,
            eta=eta,
            churn=churn,
            want=want,
        )
        return self._steps(request)

    def _unary(
        self, method: grpc.UnaryUnaryMultiCallable[_Request, _Response], request: _Request
    ) -> _Response:
        with own_errors():
            return method(request, timeout=self._unary_timeout_s, metadata=self._metadata)

    def _steps(self, request: pb.SampleRequest) -> Generator[Step, None, None]:
        call = self._stub.Sample(request, timeout=self._sample_timeout_s, metadata=self._metadata)
        try:
            with own_errors():
                for message in call:
                    yield codec.decode_step(message)
        finally:
            call.cancel()
