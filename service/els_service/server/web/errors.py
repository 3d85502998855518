"""HTTP statuses and bodies of failed calls, by the mapping of ``google.rpc.Code``."""

from __future__ import annotations

import math
from typing import Any

import orjson
from google.rpc import code_pb2, error_details_pb2, status_pb2
from starlette.responses import Response

from els_service.errors import ElsError
from els_service.server.transport.status import status_of

JSON = "application/json"

STATUSES = {
    "OK": 200,
    "CANCELLED": 499,
    "UNKNOWN": 500,
    "INVALID_ARGUMENT": 400,
    "DEADLINE_EXCEEDED": 504,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "PERMISSION_DENIED": 403,
    "RESOURCE_EXHAUSTED": 429,
    "FAILED_PRECONDITION": 400,
    "ABORTED": 409,
    "OUT_OF_RANGE": 400,
    "UNIMPLEMENTED": 501,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DATA_LOSS": 500,
    "UNAUTHENTICATED": 401,
}
"""gRPC status code → HTTP status."""


class CallError(Exception):
    """A call that failed.

    Args:
        status: of the call.
        close: whether the connection is closed after the response, as the request was not read.
    """

    def __init__(self, status: status_pb2.Status, *, close: bool = False) -> None:
        super().__init__(status.message)
        self.status, self.close = status, close
        self.more: dict[str, Any] = {}
        """Further members of the body."""

    @classmethod
    def of(cls, error: Exception, *, close: bool = False) -> CallError:
        """Return the failure of an exception, with its text if it is an ``ElsError``."""
        return cls(status_of(error), close=close)

    def body(self) -> dict[str, Any]:
        """Return the JSON object: ``error``, ``code``, and ``field`` if one is wrong."""
        found: dict[str, Any] = {
            "error": self.status.message,
            "code": code_pb2.Code.Name(self.status.code),
        }
        for violation in self._details(error_details_pb2.BadRequest):
            first = violation.field_violations[0]
            found |= {"field": first.field, "description": first.description}
        return found | self.more

    def http_status(self) -> int:
        """Return the HTTP status: 400 for a request beyond a limit, which no retry mends."""
        code = code_pb2.Code.Name(self.status.code)
        if code == "RESOURCE_EXHAUSTED" and self._details(error_details_pb2.BadRequest):
            return 413 if self.body()["field"] == "body" else 400
        return STATUSES[code]

    def response(self) -> Response:
        """Return the HTTP response."""
        headers = {"cache-control": "no-store"}
        for retry in self._details(error_details_pb2.RetryInfo):
            seconds = retry.retry_delay.ToNanoseconds() / 1e9
            headers["retry-after"] = str(max(1, math.ceil(seconds)))
        status = self.http_status()
        if status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.close:
            headers["connection"] = "close"
        return Response(orjson.dumps(self.body()), status, headers, JSON)

    def _details(self, kind: Any) -> list[Any]:
        found = []
        for detail in self.status.details:
            message = kind()
            if detail.Unpack(message):
                found.append(message)
        return found


def failed(error: ElsError) -> Response:
    """Return the response to a request that is rejected before it becomes a call."""
    return CallError.of(error).response()


def method_not_allowed(allowed: str) -> Response:
    """Return the response to another method of HTTP than the route's."""
    return rejected(405, f"method: expected {allowed}", allow=allowed)


def rejected(status: int, text: str, **headers: str) -> Response:
    """Return a response of HTTP's own errors."""
    return Response(orjson.dumps({"error": text}), status, headers, JSON)
