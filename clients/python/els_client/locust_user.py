"""A Locust user with a client of ours: subclass it, write tasks, and Locust counts their calls.

>>> class Caller(DenoiserUser):
...     @task
...     def denoise(self) -> None:
...         with self.counted("denoise"):
...             self.client.denoise(NOISY, model="fashion-els", sigma=0.5)

Needs the extra ``locust``. Its loops are closed and its callers greenlets of one core:
``els bench`` loads harder and knows open loops.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import grpc.experimental.gevent as grpc_gevent
from locust import User
from locust.env import Environment

from els_client._client import Client
from els_client._types import Tls
from els_client.errors import ElsError


class DenoiserUser(User):
    """One caller; Locust's ``--host`` is the target.

    Attributes:
        token: Bearer token of each call.
        tls: How the connection is encrypted; None means not at all.
        client: What its tasks ask with.
    """

    abstract = True
    token: str | None = None
    tls: Tls | None = None

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        _make_grpc_wait_as_greenlets_do()
        self.client = Client(self.host or "127.0.0.1:50051", tls=self.tls, token=self.token)

    def on_stop(self) -> None:
        """Close the client."""
        self.client.close()

    @contextmanager
    def counted(self, name: str) -> Iterator[None]:
        """Have Locust count what happens inside as one request, a failure too: it is not raised."""
        began, failure = time.perf_counter(), None
        try:
            yield
        except ElsError as error:
            failure = error
        self.environment.events.request.fire(
            request_type="gRPC",
            name=name,
            response_time=(time.perf_counter() - began) * 1e3,
            response_length=0,
            exception=failure,
            context={},
        )


@cache
def _make_grpc_wait_as_greenlets_do() -> None:
    # Once a process, before the first channel: a call would stop all greenlets otherwise.
    grpc_gevent.init_gevent()
