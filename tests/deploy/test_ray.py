"""The Ray cluster of the component: sized, confined, its head without work."""

from __future__ import annotations

from typing import Any

import pytest
from tests.deploy.manifests import needs_kubectl, numbers, of_kind, pods, selected

pytestmark = needs_kubectl

COMBINATION = ("cpu", ("keda", "model-volume-pvc", "podmonitor", "ray"))
STORE = "object-store-memory"


def cluster() -> dict[str, Any]:
    (found,) = of_kind(COMBINATION, "RayCluster")
    return dict(found["spec"])


def groups() -> list[dict[str, Any]]:
    """Return head and workers."""
    return [cluster()["headGroupSpec"], *cluster()["workerGroupSpecs"]]


def beside() -> dict[str, Any]:
    """Return the container of Ray beside the server."""
    (found,) = (one for one in pods(COMBINATION).containers if one["name"] == "ray-node")
    return dict(found)


def shm_bytes(spec: dict[str, Any], container: dict[str, Any]) -> float:
    """Return the size of the memory volume at /dev/shm."""
    (mount,) = (one for one in container["volumeMounts"] if one["mountPath"] == "/dev/shm")
    (volume,) = (one["emptyDir"] for one in spec["volumes"] if one["name"] == mount["name"])
    assert volume["medium"] == "Memory"
    (size,) = numbers([volume["sizeLimit"]])
    return size


def test_the_object_store_fits_its_shared_memory_and_that_the_limit() -> None:
    for group in groups():
        spec = group["template"]["spec"]
        (container,) = spec["containers"]
        (limit,) = numbers([container["resources"]["limits"]["memory"]])
        shm = shm_bytes(spec, container)
        assert int(group["rayStartParams"][STORE]) < shm < limit / 2
    options = dict(one.partition("=")[::2] for one in beside()["command"])
    (limit,) = numbers([beside()["resources"]["limits"]["memory"]])
    assert int(options[f"--{STORE}"]) < shm_bytes(pods(COMBINATION).spec, beside()) < limit / 2


def test_only_workers_have_cpus_as_many_as_their_limit() -> None:
    head, *workers = groups()
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "--num-cpus=0" in beside()["command"]
    assert workers
    for group in workers:
        (container,) = group["template"]["spec"]["containers"]
        limits, requests = (container["resources"][name] for name in ("limits", "requests"))
        assert group["rayStartParams"]["num-cpus"] == limits["cpu"] == requests["cpu"]
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]


def test_the_server_joins_the_cluster_through_the_node_beside_it() -> None:
    (found,) = of_kind(COMBINATION, "RayCluster")
    address = f"{found['metadata']['name']}-head-svc:6379"
    assert f"--address={address}" in beside()["command"]
    # A sidecar: it runs before the server starts and until it has ended.
    assert beside()["restartPolicy"] == "Always"
    server = pods(COMBINATION).server
    assert {"name": "ELS_RAY_ADDRESS", "value": address} in server["env"]
    paths = {one["mountPath"]: one["name"] for one in beside()["volumeMounts"]}
    assert (
        paths.items() <= {one["mountPath"]: one["name"] for one in server["volumeMounts"]}.items()
    )


def test_every_node_has_the_server_s_image_and_confinement() -> None:
    found = pods(COMBINATION)
    for group in groups():
        spec = group["template"]["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert spec["securityContext"] == found.spec["securityContext"]
        (container,) = spec["containers"]
        assert container["image"] == found.server["image"] == beside()["image"]
        assert container["securityContext"] == found.server["securityContext"]
        volumes = {one["name"]: one for one in spec["volumes"]}
        for mount in container["volumeMounts"]:
            assert mount.get("readOnly") or "emptyDir" in volumes[mount["name"]]


def test_workers_read_the_models_where_the_server_does() -> None:
    def models(spec: dict[str, Any], container: dict[str, Any]) -> tuple[str, Any]:
        (mount,) = (one for one in container["volumeMounts"] if one["name"] == "models")
        (volume,) = (one for one in spec["volumes"] if one["name"] == "models")
        return mount["mountPath"], volume["persistentVolumeClaim"]

    found = pods(COMBINATION)
    for group in cluster()["workerGroupSpecs"]:
        spec = group["template"]["spec"]
        assert models(spec, spec["containers"][0]) == models(found.spec, found.server)


@pytest.mark.parametrize("direction", ["ingress", "egress"])
def test_nodes_of_ray_talk_to_one_another_and_to_dns_only(direction: str) -> None:
    (policy,) = (
        one["spec"]
        for one in of_kind(COMBINATION, "NetworkPolicy")
        if one["metadata"]["name"] == "els-denoise-ray"
    )
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    labels = [
        pods(COMBINATION).labels,
        *(one["template"]["metadata"]["labels"] for one in groups()),
    ]
    for one in labels:
        assert selected(policy["podSelector"]["matchLabels"], one)
    first, *rest = policy[direction]
    (peer,) = first["from" if direction == "ingress" else "to"]
    assert all(selected(peer["podSelector"]["matchLabels"], one) for one in labels)
    assert [port["port"] for rule in rest for port in rule["ports"]] == (
        [] if direction == "ingress" else [53, 53]
    )


def test_services_of_the_server_do_not_find_nodes_of_ray() -> None:
    for group in groups():
        labels = group["template"]["metadata"]["labels"]
        for service in of_kind(COMBINATION, "Service"):
            assert not selected(service["spec"]["selector"], labels)
