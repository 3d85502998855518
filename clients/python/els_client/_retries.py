"""When a failed call is worth another attempt, and after what pause: both clients ask here."""

from __future__ import annotations

import math
import random
import time

from els_client import _codec as codec
from els_client._types import Step
from els_client.errors import ElsError, ResourceExhaustedError, UnavailableError, error_of
from els_proto.denoise.v1 import denoise_pb2 as pb

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0
_MAX_CONSECUTIVE_FAILURES = 5


class RetryState:
    """The attempts of one call: until when, and how many in a row were in vain.

    Args:
        timeout_s: For all of them together; None means without end.
        wait_when_full: Whether a server that says when it will have room is asked again then; a
            sample that has begun is resumed in any case.
    """

    def __init__(self, timeout_s: float | None, *, wait_when_full: bool = False) -> None:
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self.wait_when_full = wait_when_full
        self._consecutive_failures = 0
        self._broken = False

    def left_s(self) -> float | None:
        """Return what is left of the deadline."""
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)

    def progressed(self) -> None:
        """Begin to count anew: this attempt was not in vain."""
        self._consecutive_failures = 0

    def pause_s(self, error: ElsError) -> float:
        """Return how long to wait before a question is asked again, or raise ``error``.

        gRPC asks again by itself, but not once an answer has begun, even if it breaks off. Whether
        it had cannot be seen from here, so whoever is told that nobody is there asks once more.
        """
        if not isinstance(error, UnavailableError) or self._broken:
            return self.pause_if_full_s(error)
        self._broken = True
        return self._pause_s(error)

    def pause_if_full_s(self, error: ElsError) -> float:
        """Return how long to wait for a full server, or raise ``error``."""
        if not (_is_full(error) and self.wait_when_full):
            raise error
        return self._pause_s(error)

    def pause_if_away_s(self, error: ElsError) -> float:
        """Return how long to wait before work is resumed, or raise ``error``.

        By a server's successor, or by the same server where the work gave way to other callers.
        """
        resumable = isinstance(error, UnavailableError) or _is_full(error)
        if not resumable or self._consecutive_failures >= _MAX_CONSECUTIVE_FAILURES:
            raise error
        return self._pause_s(error)

    def _pause_s(self, error: ElsError) -> float:
        backoff = min(math.ldexp(_FIRST_PAUSE_S, self._consecutive_failures), _LONGEST_PAUSE_S)
        # Random, or all who were refused together would come back together.
        pause = max(error.retry_after_s or 0.0, backoff) * random.uniform(1.0, 1.25)
        left = self.left_s()
        if left is not None and left <= pause:
            raise error
        self._consecutive_failures += 1
        return pause


class Trajectory:
    """A sample that outlives the server that began it: each step once, in order.

    Attributes:
        request: What the next attempt asks.
        attempts: When to ask.
    """

    def __init__(self, request: pb.SampleRequest, attempts: RetryState) -> None:
        self.request = request
        self.attempts = attempts
        self._index = 0
        self._total = -1

    def accept(self, message: pb.SampleResponse) -> Step | None:
        """Return the step that a message carries, if it does and it is new.

        Raises:
            ElsError: A step is missing between the last one and this.
        """
        if message.resume_token:
            self.request.resume_token = message.resume_token
        # A token alone has index 0; an attempt from an older token begins with steps that came.
        if message.index <= self._index:
            return None
        if message.index != self._index + 1:
            text = f"the server answered step {message.index} after step {self._index}"
            raise error_of("INTERNAL", text)
        self._index, self._total = message.index, message.total
        self.attempts.progressed()
        return codec.decode_step(message)

    def check_complete(self) -> None:
        """Raise an ``ElsError`` unless the last step has come."""
        if self._index != self._total:
            text = f"the server ended after step {self._index} of {self._total}"
            raise error_of("INTERNAL", text)

    def pause_s(self, error: ElsError) -> float:
        """Return how long to wait before the next attempt, or raise ``error``."""
        if _is_full(error) and self.attempts.wait_when_full:
            return self.attempts.pause_if_full_s(error)
        if not self.request.resume_token:
            raise error
        return self.attempts.pause_if_away_s(error)


def _is_full(error: ElsError) -> bool:
    """Return whether a server has no room now and says when it may."""
    return isinstance(error, ResourceExhaustedError) and error.retry_after_s is not None
