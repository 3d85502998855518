"""Error classes and their gRPC status codes.

    ElsError                    INTERNAL
    ├── InvalidArgumentError    INVALID_ARGUMENT     invalid field of the request
    ├── UnauthenticatedError    UNAUTHENTICATED      missing or unknown token
    ├── PermissionDeniedError   PERMISSION_DENIED    caller lacks the role
    ├── NotFoundError           NOT_FOUND            no model of that name
    ├── ResourceExhaustedError  RESOURCE_EXHAUSTED   over a published limit
    ├── QueueFullError          RESOURCE_EXHAUSTED   queue full; has a retry delay
    ├── DeadlineExceededError   DEADLINE_EXCEEDED    deadline passed or unreachable
    ├── UnavailableError        UNAVAILABLE          loading or draining
    ├── UnsupportedError        FAILED_PRECONDITION  the model cannot do this
    └── LoadError               FAILED_PRECONDITION  invalid bank, model or setting

Status codes are strings: only ``server`` depends on gRPC. Callers get the text of an ``ElsError``;
for any other exception they get a generic text, and the log has the cause.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

_LONGEST = 200
"""Maximum characters of one part of a text: a status is sent in headers, of which 8 KiB are
safe."""
_MOST_BYTES = 1500
_LONGEST_REASON = 4096
"""Maximum characters of a LoadError's reason and file name, for logs and the index of models."""


class ElsError(Exception):
    """An error whose text is sent to the caller."""

    code: ClassVar[str] = "INTERNAL"
    retry_after_s: float | None = None
    """Seconds after which a retry may succeed; None if unknown."""


@dataclass(frozen=True)
class Violation:
    """An invalid field: its path, expected, got; long parts are shortened."""

    field: str
    expected: str
    got: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "expected", shortened(self.expected))
        object.__setattr__(self, "got", shortened(self.got))

    def __str__(self) -> str:
        return f"{self.field}: expected {self.expected}, got {self.got}"


def shortened(text: str, longest: int = _LONGEST) -> str:
    """Return the text, truncated with "…" if longer than ``longest`` characters."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def fit_for_headers(text: str) -> str:
    """Return the text truncated to the size of a status, which sends it twice and encoded."""
    data = text.encode()
    return text if len(data) <= _MOST_BYTES else data[:_MOST_BYTES].decode(errors="ignore") + "…"


def printable(text: str) -> str:
    """Return the text with nonprintable characters escaped, for terminals and UTF-8."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class InvalidArgumentError(ElsError, ValueError):
    """Invalid field of the request; names field, expected and got."""

    code = "INVALID_ARGUMENT"

    def __init__(self, field: str, expected: str, got: object) -> None:
        self.violation = Violation(field, expected, str(got))
        super().__init__(str(self.violation))


class UnauthenticatedError(ElsError):
    """Missing or unknown token; the text never contains the token."""

    code = "UNAUTHENTICATED"


class PermissionDeniedError(ElsError):
    """The caller lacks the permission for this call."""

    code = "PERMISSION_DENIED"


class NotFoundError(ElsError):
    """The named model or version is not served."""

    code = "NOT_FOUND"


class ResourceExhaustedError(ElsError):
    """The request exceeds a published limit; names field, expected and got."""

    code = "RESOURCE_EXHAUSTED"

    def __init__(self, field: str, expected: str, got: object) -> None:
        self.violation = Violation(field, expected, str(got))
        super().__init__(str(self.violation))


class QueueFullError(ElsError):
    """The queue is full."""

    code = "RESOURCE_EXHAUSTED"

    def __init__(self, text: str, *, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(text)


class DeadlineExceededError(ElsError):
    """The deadline passed, or would pass before the result is computed.

    Args:
        text: reason.
        retry_after_s: seconds after which a retry may succeed; None if unknown.
        left_s: seconds until the deadline, for a request that needs more by prediction; None for
            others. The text then asks for a longer deadline.
    """

    code = "DEADLINE_EXCEEDED"

    def __init__(
        self, text: str, *, retry_after_s: float | None = None, left_s: float | None = None
    ) -> None:
        self.retry_after_s, self.is_too_short = retry_after_s, left_s is not None
        if left_s is not None:
            left = f"{max(left_s, 0.0):.3g} s are left of the time allowed"
            text = f"{text}; {left}: raise the call's deadline"
        super().__init__(text)


class UnavailableError(ElsError):
    """The service is temporarily unavailable."""

    code = "UNAVAILABLE"


class UnsupportedError(ElsError):
    """The model does not support this call; the text names the model."""

    code = "FAILED_PRECONDITION"


class LoadError(ElsError, ValueError):
    """Invalid file; names file and reason, each of at most ``_LONGEST_REASON`` characters."""

    code = "FAILED_PRECONDITION"

    def __init__(self, path: object, reason: str) -> None:
        # File names and document keys may have any characters.
        self.path = printable(shortened(str(path), _LONGEST_REASON))
        # Truncated first, because escaping a long text is slow.
        self.reason = printable(shortened(reason, _LONGEST_REASON))
        super().__init__(f"{self.path}: {self.reason}")
