"""One tree of errors, each with the status that the server answered with.

    ElsError                    any other status; `code` says which
    ├── InvalidArgumentError    INVALID_ARGUMENT     a field is wrong (a ValueError)
    ├── UnauthenticatedError    UNAUTHENTICATED      the token is missing or unknown
    ├── PermissionDeniedError   PERMISSION_DENIED    the token is not of the role that is needed
    ├── NotFoundError           NOT_FOUND            no model of that name
    ├── ResourceExhaustedError  RESOURCE_EXHAUSTED   full, or over a published limit
    ├── DeadlineExceededError   DEADLINE_EXCEEDED    no answer within `timeout_s` (a TimeoutError)
    └── UnavailableError        UNAVAILABLE          nobody answers there, not even after retries

What the client refuses by itself, before anything is sent, is an ``InvalidArgumentError`` too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Violation:
    """One wrong field: its path in the request and what is wrong with it."""

    field: str
    description: str


class ElsError(Exception):
    """A call failed; the text is the server's own.

    Attributes:
        code: Name of the gRPC status, such as ``"INTERNAL"``.
        violations: The wrong fields, where the server names them.
        retry_after_s: When to ask again, where the server says so.
    """

    code: str = "UNKNOWN"
    retry_after_s: float | None = None

    def __init__(self, message: str, violations: Sequence[Violation] = ()) -> None:
        super().__init__(message)
        self.violations = tuple(violations)


class InvalidArgumentError(ElsError, ValueError):
    """A field of the request is wrong; ``violations`` says which."""

    code = "INVALID_ARGUMENT"


class UnauthenticatedError(ElsError):
    """The server knows no such token, or none came."""

    code = "UNAUTHENTICATED"


class PermissionDeniedError(ElsError):
    """The token is not of the role that the method needs."""

    code = "PERMISSION_DENIED"


class NotFoundError(ElsError):
    """The server has no model of that name."""

    code = "NOT_FOUND"


class ResourceExhaustedError(ElsError):
    """The server is full, and ``retry_after_s`` says for how long; or a limit is passed."""

    code = "RESOURCE_EXHAUSTED"


class DeadlineExceededError(ElsError, TimeoutError):
    """No answer came within the deadline."""

    code = "DEADLINE_EXCEEDED"


class UnavailableError(ElsError):
    """No server answers at the target, or it is loading or draining."""

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
    """Return the error that stands for a status; ``ElsError`` itself where the tree has none."""
    error = _BY_CODE.get(code, ElsError)(message, violations)
    error.code = code
    error.retry_after_s = retry_after_s
    return error
