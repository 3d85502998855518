"""Types of gRPC and of its generated code that their stubs cannot express."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from els_service.errors import ElsError

Handler = Any
"""A ``grpc.RpcMethodHandler``; the stubs cannot express its request and response types."""
Response = Any
"""A response message or its serialised bytes; the generated bases allow messages only."""
Context = Any
"""A ``grpc.aio.ServicerContext``; the generated bases expect the synchronous type as well."""
Reject = Callable[[Context, ElsError], Awaitable[None]]
"""Ends a call with the status of an error, and counts and logs it."""
