"""One tree of errors, each with the status that its caller sees.

    ElsError                    INTERNAL
    ├── InvalidArgumentError    INVALID_ARGUMENT     a field of the request is wrong
    ├── UnauthenticatedError    UNAUTHENTICATED      no token that is known
    ├── PermissionDeniedError   PERMISSION_DENIED    a caller without the role
    ├── NotFoundError           NOT_FOUND            no model of that name
    ├── ResourceExhaustedError  RESOURCE_EXHAUSTED   over a published limit
    ├── QueueFullError          RESOURCE_EXHAUSTED   too much work waits; says when to come again
    ├── DeadlineExceededError   DEADLINE_EXCEEDED    too late to be worth computing
    ├── UnavailableError        UNAVAILABLE          still loading, or draining
    └── LoadError               FAILED_PRECONDITION  a bank, model or setting is refused

Status codes are plain strings: only the wire knows gRPC. The text of an ``ElsError`` reaches the
caller; of any other exception the caller sees a neutral text and the log has the cause.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

_LONGEST = 200
"""Characters of one part of a text: a status travels in headers, of which 8 KiB are safe."""
_MOST_BYTES = 1500
_LONGEST_REASON = 4096
"""Characters of why a file is refused, and of its name: for logs and the index of models."""


class ElsError(Exception):
    """An error whose text may reach the caller."""

    code: ClassVar[str] = "INTERNAL"
    retry_after_s: float | None = None
    """Seconds after which asking again may help; None where nothing is known."""


@dataclass(frozen=True)
class Violation:
    """What is wrong with one field: its path, what was expected, what came; long parts cut."""

    field: str
    expected: str
    got: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "expected", shortened(self.expected))
        object.__setattr__(self, "got", shortened(self.got))

    def __str__(self) -> str:
        return f"{self.field}: expected {self.expected}, got {self.got}"


def shortened(text: str, longest: int = _LONGEST) -> str:
    """Return the text, its end replaced by "…" if it is longer than ``longest`` characters."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def fit_for_headers(text: str) -> str:
    """Return the text, cut to as many bytes as a status may have: sent twice, it triples."""
    data = text.encode()
    return text if len(data) <= _MOST_BYTES else data[:_MOST_BYTES].decode(errors="ignore") + "…"


def printable(text: str) -> str:
    """Return the text with everything escaped that is no sign: it may reach terminals and UTF-8."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class InvalidArgumentError(ElsError, ValueError):
    """A field of the request is wrong; says field, expected and got."""

    code = "INVALID_ARGUMENT"

    def __init__(self, field: str, expected: str, got: object) -> None:
        self.violation = Violation(field, expected, str(got))
        super().__init__(str(self.violation))


class UnauthenticatedError(ElsError):
    """The caller shows no token that is known; never says which was shown."""

    code = "UNAUTHENTICATED"


class PermissionDeniedError(ElsError):
    """The caller is known, or need not be, but may not do this."""

    code = "PERMISSION_DENIED"


class NotFoundError(ElsError):
    """The named thing is not served here."""

    code = "NOT_FOUND"


class ResourceExhaustedError(ElsError):
    """The request is over a limit that the metadata publishes; says field, expected and got."""

    code = "RESOURCE_EXHAUSTED"

    def __init__(self, field: str, expected: str, got: object) -> None:
        self.violation = Violation(field, expected, str(got))
        super().__init__(str(self.violation))


class QueueFullError(ElsError):
    """More work waits than is allowed."""

    code = "RESOURCE_EXHAUSTED"

    def __init__(self, text: str, *, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(text)


class DeadlineExceededError(ElsError):
    """The answer would come too late, or the deadline passed before the work began."""

    code = "DEADLINE_EXCEEDED"

    def __init__(self, text: str, *, retry_after_s: float | None = None) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(text)


class UnavailableError(ElsError):
    """The service cannot answer now but may soon."""

    code = "UNAVAILABLE"


class LoadError(ElsError, ValueError):
    """A file is refused; says which file and why, each cut to ``_LONGEST_REASON`` characters."""

    code = "FAILED_PRECONDITION"

    def __init__(self, path: object, reason: str) -> None:
        # Names of files and keys of documents may hold anything.
        self.path = printable(shortened(str(path), _LONGEST_REASON))
        # Cut first: escaping takes long texts apart sign by sign.
        self.reason = printable(shortened(reason, _LONGEST_REASON))
        super().__init__(f"{self.path}: {self.reason}")
