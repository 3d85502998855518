"""Connection of the blocking client, and the calls of all its methods."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar

from els_client._channel import (
    SAMPLE_TIMEOUT_S,
    UNARY_TIMEOUT_S,
    bearer,
    open_channel,
    own_errors,
    timeout_of,
)
from els_client._retries import RetryState
from els_client._route import Route
from els_client._types import Tls
from els_client.errors import ResourceExhaustedError, UnavailableError
from els_proto.denoise.v1.denoise_pb2_grpc import DenoiserServiceStub
from els_proto.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub

_Response = TypeVar("_Response")


class Connection:
    """Channel of a client, with its deadlines, credentials and retries."""

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
