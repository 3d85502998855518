"""Renders ``envoy.yaml`` with other addresses: a list of servers, or another name.

python -m deploy.envoy.render --listen 127.0.0.1:50050 --server 127.0.0.1:50051 [--server …]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SOURCE = Path(__file__).with_name("envoy.yaml")

_RESOLVER = "type.googleapis.com/envoy.extensions.network.dns_resolver.cares.v3"


@dataclass(frozen=True)
class Address:
    """Host (an address or a name) and port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Return the address of ``HOST:PORT``.

        Raises:
            ValueError: The text has another form.
        """
        host, colon, port = text.rpartition(":")
        if not (host and colon and port.isdecimal()):
            raise ValueError(f"address: expected HOST:PORT, got {text}")
        return cls(host.strip("[]"), int(port))

    def document(self) -> dict[str, Any]:
        """Return the address in Envoy's configuration format."""
        return {"socket_address": {"address": self.host, "port_value": self.port}}


def rendered(
    *,
    listen: Address,
    admin: Address,
    servers: Sequence[Address],
    resolver: Address | None = None,
) -> str:
    """Return ``envoy.yaml`` with other addresses, otherwise unchanged.

    Args:
        listen: address for callers.
        admin: address of the admin interface; on loopback, because it also accepts commands.
        servers: IP addresses, at least one; with ``resolver`` one name.
        resolver: DNS server that resolves the name; None for IP addresses.
    """
    document = yaml.safe_load(SOURCE.read_text(encoding="utf-8"))
    document["admin"]["address"] = admin.document()
    resources = document["static_resources"]
    resources["listeners"][0]["address"] = listen.document()
    (cluster,) = resources["clusters"]
    endpoints = [{"endpoint": {"address": server.document()}} for server in servers]
    cluster["load_assignment"]["endpoints"] = [{"lb_endpoints": endpoints}]
    if resolver is None:
        del cluster["cluster_type"]
        cluster["type"] = "STATIC"
    else:
        cluster["cluster_type"]["typed_config"]["typed_dns_resolver_config"] = {
            "name": "envoy.network.dns_resolver.cares",
            "typed_config": {
                "@type": f"{_RESOLVER}.CaresDnsResolverConfig",
                "resolvers": [resolver.document()],
            },
        }
    return yaml.safe_dump(document, sort_keys=False)


def main() -> None:
    """Print the configuration for a list of servers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--listen", type=Address.parse, default=Address("127.0.0.1", 50050))
    parser.add_argument("--admin", type=Address.parse, default=Address("127.0.0.1", 9901))
    parser.add_argument("--server", type=Address.parse, action="append", required=True)
    options = parser.parse_args()
    print(rendered(listen=options.listen, admin=options.admin, servers=options.server), end="")


if __name__ == "__main__":
    main()
