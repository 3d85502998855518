"""Exceptions as ``google.rpc.Status``.

A status carries ``google.rpc.BadRequest`` if a field is wrong, and ``google.rpc.RetryInfo`` if the
error has a retry delay.
"""

from __future__ import annotations

from google.rpc import code_pb2, error_details_pb2, status_pb2

from els_service.errors import (
    DeadlineExceededError,
    ElsError,
    InvalidArgumentError,
    ResourceExhaustedError,
    fit_for_headers,
)

DEADLINE_OPTIONS = "timeout_s, --timeout"
"""Names of a call's deadline: of ``els_client`` and of its command."""


def status_of(error: Exception, deadline_options: str = DEADLINE_OPTIONS) -> status_pb2.Status:
    """Return the status of an exception.

    An exception that is no ``ElsError`` becomes INTERNAL with a generic text, so that internals do
    not leak to clients.

    Args:
        error: any exception.
        deadline_options: names of what sets a call's deadline, for errors that ask for a longer
            one.
    """
    if not isinstance(error, ElsError):
        text = "internal error; the server's log has the cause"
        return status_pb2.Status(code=code_pb2.INTERNAL, message=text)
    text = str(error)
    if isinstance(error, DeadlineExceededError) and error.is_too_short:
        text += f" ({deadline_options})"
    status = status_pb2.Status(code=code_pb2.Code.Value(error.code), message=fit_for_headers(text))
    if isinstance(error, InvalidArgumentError | ResourceExhaustedError):
        violation = error.violation
        bad_request = error_details_pb2.BadRequest(
            field_violations=[
                error_details_pb2.BadRequest.FieldViolation(
                    field=violation.field,
                    description=f"expected {violation.expected}, got {violation.got}",
                )
            ]
        )
        status.details.add().Pack(bad_request)
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(round(error.retry_after_s * 1e9))
        status.details.add().Pack(retry)
    return status


def drop_tracebacks(error: BaseException | None) -> None:
    """Drop the tracebacks of an exception, its causes and its contexts.

    Their frames reference the request and the exception, a cycle that would keep both in memory
    until the next garbage collection.
    """
    seen: set[int] = set()
    pending = [error]
    while pending:
        one = pending.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            one.__traceback__ = None
            pending += (one.__cause__, one.__context__)
