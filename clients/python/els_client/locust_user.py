"""Locust user with an els-denoise client: subclass it and write tasks.

>>> class Caller(DenoiserUser):
...     @task
...     def denoise(self) -> None:
...         with self.counted("denoise"):
...             self.client.denoise(NOISY, model="fashion-els", sigma=0.5)

Requires the extra ``locust``. The load is closed-loop, and all users are greenlets of one core:
``els bench`` generates more load and supports open loops.
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
    """One user; Locust's ``--host`` is the target.

    Attributes:
        token: Bearer token of each call.
        tls: TLS options; None means plaintext.
        client: Client for the tasks.
    """

    abstract = True
    token: str | None = None
    tls: Tls | None = None

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        _patch_grpc_for_gevent()
        self.client = Client(self.host or "127.0.0.1:50051", tls=self.tls, token=self.token)

    def on_stop(self) -> None:
        """Close the client."""
        self.client.close()

    @contextmanager
    def counted(self, name: str) -> Iterator[None]:
        """Report the block to Locust as one request; errors are reported and not raised."""
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
def _patch_grpc_for_gevent() -> None:
    # Once per process, before the first channel: otherwise a call blocks all greenlets.
    grpc_gevent.init_gevent()
