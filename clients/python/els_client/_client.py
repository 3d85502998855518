"""The blocking client."""

from __future__ import annotations

from els_client._denoise_methods import DenoiseMethods
from els_client._explain_methods import ExplainMethods
from els_client._remix_methods import RemixMethods
from els_client._repository import Repository


class Client(DenoiseMethods, ExplainMethods, RemixMethods):
    """A blocking client of one server, or of all servers behind a name.

    Thread-safe. Calls are distributed round robin over all healthy servers; if there is none, they
    are retried for two or three seconds. Pings detect a hung server within about ten seconds.

    Args:
        target: Address, such as ``"127.0.0.1:50051"``, ``"dns:///els.example:50051"`` or
            ``"unix:/run/els.sock"``. For other targets than loopback and sockets gRPC uses the
            proxy
            in ``grpc_proxy``, ``https_proxy`` or ``http_proxy``, except for hosts in ``no_proxy``.
        timeout_s: Deadline of every call in seconds, more than 0 and at most a year; None means 60,
            and 600 for ``sample``. Values out of range are rejected before sending.
        tls: TLS options; None means plaintext.
        token: Bearer token of every call. Without ``tls`` it is sent in plaintext: use that only on
            loopback, or if the connection is encrypted otherwise.
        wait_when_full: Whether a call rejected by a full server is retried after the server's retry
            delay, within the deadline.
        healthy_only: Whether to use healthy servers only. Set it to False to load the first model
            of a server, which is not healthy before.

    Example:
        >>> with Client() as client:
        ...     clean = client.denoise(noisy, model="fashion-els", sigma=0.5)
    """

    @property
    def repository(self) -> Repository:
        """Administration of the server."""
        return Repository(self._operate)
