"""Error classes and their gRPC status codes.

    ElsError                    any other status, in `code`
    ├── InvalidArgumentError    INVALID_ARGUMENT     invalid field (a ValueError)
    ├── UnauthenticatedError    UNAUTHENTICATED      missing or unknown token
    ├── PermissionDeniedError   PERMISSION_DENIED    the token lacks the required role
    ├── NotFoundError           NOT_FOUND            no model of that name
    ├── ResourceExhaustedError  RESOURCE_EXHAUSTED   full, or over a published limit
    ├── DeadlineExceededError   DEADLINE_EXCEEDED    no response within `timeout_s` (a TimeoutError)
    └── UnavailableError        UNAVAILABLE          no server reachable, even after retries

Arguments that the client rejects before sending raise ``InvalidArgumentError`` too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Violation:
    """An invalid field: its path in the request, and a description."""

    field: str
    description: str


class ElsError(Exception):
    """A call failed; the text is that of the server.

    Attributes:
        code: Name of the gRPC status, such as ``"INTERNAL"``.
        violations: Invalid fields, if the server names them.
        retry_after_s: Retry delay in seconds, if the server gives one.
    """

    code: str = "UNKNOWN"
    retry_after_s: float | None = None

    def __init__(self, message: str, violations: Sequence[Violation] = ()) -> None:
        super().__init__(message)
        self.violations = tuple(violations)


class InvalidArgumentError(ElsError, ValueError):
    """Invalid field of the request; ``violations`` names it."""

    code = "INVALID_ARGUMENT"


class UnauthenticatedError(ElsError):
    """Missing or unknown token."""

    code = "UNAUTHENTICATED"


class PermissionDeniedError(ElsError):
    """The token lacks the role required by the method."""

    code = "PERMISSION_DENIED"


class NotFoundError(ElsError):
    """The server has no model of that name."""

    code = "NOT_FOUND"


class ResourceExhaustedError(ElsError):
    """The server is full (``retry_after_s`` is the retry delay), or a limit is exceeded."""

    code = "RESOURCE_EXHAUSTED"


class DeadlineExceededError(ElsError, TimeoutError):
    """No response within the deadline."""

    code = "DEADLINE_EXCEEDED"


class UnavailableError(ElsError):
    """No server is reachable at the target, or it is loading or draining."""

    code = "UNAVAILABLE"


_BY_CODE: dict[str, type[ElsError]] = {
    error.code: error
    for error in (
        InvalidArgumentError,
        UnauthenticatedError,
        PermissionDeniedError,
        NotFoundError,
        ResourceExhaustedError,
        DeadlineExceededError,
        UnavailableError,
    )
}


def error_of(
    code: str,
    message: str,
    violations: Sequence[Violation] = (),
    retry_after_s: float | None = None,
) -> ElsError:
    """Return the error for a status; ``ElsError`` for codes without a subclass."""
    error = _BY_CODE.get(code, ElsError)(message, violations)
    error.code = code
    error.retry_after_s = retry_after_s
    return error
