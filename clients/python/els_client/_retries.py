"""Retry policy of both clients: which errors are retried, and after what delay."""

from __future__ import annotations

import math
import random
import time

from els_client import _moments as moments
from els_client._step import Step
from els_client.errors import ElsError, ResourceExhaustedError, UnavailableError, error_of
from els_proto.denoise.v1 import denoise_pb2 as pb

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0
_MAX_CONSECUTIVE_FAILURES = 5


class RetryState:
    """Retry state of one call: its deadline and its consecutive failures.

    Args:
        timeout_s: Deadline of all attempts together; None means none.
        wait_when_full: Whether to retry after the retry delay of a full server; a sample that has
            started is resumed in any case.
    """

    def __init__(self, timeout_s: float | None, *, wait_when_full: bool = False) -> None:
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self.wait_when_full = wait_when_full
        self._consecutive_failures = 0
        self._broken = False

    def left_s(self) -> float | None:
        """Return the remaining seconds of the deadline."""
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)

    def progressed(self) -> None:
        """Reset the consecutive failures: this attempt made progress."""
        self._consecutive_failures = 0

    def pause_s(self, error: ElsError) -> float:
        """Return the delay before a retry, or raise ``error``.

        gRPC retries by itself, but not once a response has started. Whether it had is not visible
        here, so an UNAVAILABLE call is retried once more.
        """
        if not isinstance(error, UnavailableError) or self._broken:
            return self.pause_if_full_s(error)
        self._broken = True
        return self._pause_s(error)

    def pause_if_full_s(self, error: ElsError) -> float:
        """Return the delay before a retry at a full server, or raise ``error``."""
        if not (_is_full(error) and self.wait_when_full):
            raise error
        return self._pause_s(error)

    def pause_if_away_s(self, error: ElsError) -> float:
        """Return the delay before a trajectory is resumed, or raise ``error``.

        It is resumed by another server, or by the same one if it was preempted for other callers.
        """
        resumable = isinstance(error, UnavailableError) or _is_full(error)
        if not resumable or self._consecutive_failures >= _MAX_CONSECUTIVE_FAILURES:
            raise error
        return self._pause_s(error)

    def _pause_s(self, error: ElsError) -> float:
        backoff = min(math.ldexp(_FIRST_PAUSE_S, self._consecutive_failures), _LONGEST_PAUSE_S)
        # Jitter: callers rejected together do not retry together.
        pause = max(error.retry_after_s or 0.0, backoff) * random.uniform(1.0, 1.25)
        left = self.left_s()
        if left is not None and left <= pause:
            raise error
        self._consecutive_failures += 1
        return pause


class Trajectory:
    """A sample that is resumed at other servers; each step is delivered once, in order.

    Attributes:
        request: Request of the next attempt.
        attempts: Retry state.
    """

    def __init__(self, request: pb.SampleRequest, attempts: RetryState) -> None:
        self.request = request
        self.attempts = attempts
        self._index = 0
        self._total = -1

    def accept(self, message: pb.SampleResponse) -> Step | None:
        """Return the step of a message, or None if it has none or a known one.

        Raises:
            ElsError: A step is missing before this one.
        """
        if message.resume_token:
            self.request.resume_token = message.resume_token
        # A message with only a token has index 0; a resumed attempt may repeat known steps.
        if message.index <= self._index:
            return None
        if message.index != self._index + 1:
            text = f"the server returned step {message.index} after step {self._index}"
            raise error_of("INTERNAL", text)
        self._index, self._total = message.index, message.total
        self.attempts.progressed()
        return moments.decode_step(message)

    def check_complete(self) -> None:
        """Raise an ``ElsError`` unless the last step was received."""
        if self._index != self._total:
            text = f"the server ended after step {self._index} of {self._total}"
            raise error_of("INTERNAL", text)

    def pause_s(self, error: ElsError) -> float:
        """Return the delay before the next attempt, or raise ``error``."""
        if _is_full(error) and self.attempts.wait_when_full:
            return self.attempts.pause_if_full_s(error)
        if not self.request.resume_token:
            raise error
        return self.attempts.pause_if_away_s(error)


def _is_full(error: ElsError) -> bool:
    """Return whether a server is full and gives a retry delay."""
    return isinstance(error, ResourceExhaustedError) and error.retry_after_s is not None
