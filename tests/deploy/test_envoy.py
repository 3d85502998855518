"""What Envoy is told: that it takes it, and that rendering changes addresses and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from benchmarks.deploy import envoy
from deploy.envoy.render import SOURCE, Address, rendered

LISTEN, ADMIN = Address("127.0.0.1", 1), Address("127.0.0.1", 2)
SERVERS = [Address("127.0.0.1", 3), Address("::1", 4)]

needs_envoy = pytest.mark.skipif(
    envoy.program() is None, reason="needs envoy on the path or in .venv-deploy: make deploy-tools"
)


def cluster(text: str) -> dict[str, Any]:
    (found,) = yaml.safe_load(text)["static_resources"]["clusters"]
    assert isinstance(found, dict)
    return found


@needs_envoy
@pytest.mark.slow
def test_envoy_takes_the_configuration_as_it_is_and_as_it_is_rendered() -> None:
    assert envoy.check(SOURCE.read_text()) == ""
    assert envoy.check(rendered(listen=LISTEN, admin=ADMIN, servers=SERVERS)) == ""


@needs_envoy
def test_what_envoy_does_not_know_is_named() -> None:
    assert "grpc_helth_check" in envoy.check(
        SOURCE.read_text().replace("grpc_health_check", "grpc_helth_check")
    )


def test_rendering_changes_addresses_alone() -> None:
    source = yaml.safe_load(SOURCE.read_text())
    there = yaml.safe_load(rendered(listen=LISTEN, admin=ADMIN, servers=SERVERS))
    (old,), (new,) = (each["static_resources"].pop("clusters") for each in (source, there))
    assert new["type"] == "STATIC"
    changed = {"type", "cluster_type", "load_assignment"}
    assert {k: v for k, v in new.items() if k not in changed} == {
        k: v for k, v in old.items() if k not in changed
    }
    for each in (source, there):
        del each["admin"]["address"], each["static_resources"]["listeners"][0]["address"]
    assert there == source


def test_a_name_stays_a_name_where_a_resolver_is_told() -> None:
    name = Address("els-denoise-headless.test", 50051)
    text = rendered(listen=LISTEN, admin=ADMIN, servers=[name], resolver=Address("127.0.0.1", 53))
    assert cluster(text)["cluster_type"]["name"] == "envoy.cluster.dns"


def test_only_single_questions_are_asked_again() -> None:
    resources = yaml.safe_load(SOURCE.read_text())["static_resources"]
    manager = resources["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    routes = manager["route_config"]["virtual_hosts"][0]["routes"]
    retried = [each["match"] for each in routes if "retry_policy" in each.get("route", {})]
    streams = {
        each["match"]["path"] for each in routes if "retry_policy" not in each.get("route", {})
    }
    assert retried == [{"prefix": "/", "grpc": {}}]
    assert {path.rpartition("/")[2] for path in streams} >= {
        *("Sample", "DenoiseStream", "ModelStreamInfer", "Watch"),
        *("RepositoryModelLoad", "RepositoryModelUnload", "LogSettings"),
    }


@pytest.mark.parametrize("text", ["", "host", "host:", ":1", "host:x"])
def test_an_address_without_host_or_port_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected HOST:PORT"):
        Address.parse(text)
