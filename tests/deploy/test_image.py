"""The Containerfile keeps what it promises; test_image_runs.py runs what it builds."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from deploy.image import build
from packaging.requirements import Requirement
from packaging.version import Version

from els_service.config import Settings

HERE = build.FILE.parent
LOCKS = HERE / "locks"
TARGETS = ("cpu", "ray", "gpu")
TEXT = build.FILE.read_text()
PROJECT = tomllib.loads((build.ROOT / "pyproject.toml").read_text())
KINDS = ("server", "web", "tracing", "onnx", "diffusers")
EXTRAS = {
    "cpu": (*KINDS, "openvino"),
    "ray": (*KINDS, "openvino", "ray"),
    "gpu": (*KINDS, "gpu"),
}
ENGINES = {"torch": "torch", "openvino": "openvino", "onnxruntime": "onnxruntime"}
"""Engine → the package that it needs."""


def stages() -> dict[str, tuple[str, list[str]]]:
    """Return, by a stage's name, what it stands on and its instructions, a line each."""
    joined = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", TEXT, flags=re.MULTILINE))
    found: dict[str, tuple[str, list[str]]] = {}
    for line in filter(None, joined.splitlines()):
        if match := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            found[match[2]] = (match[1], [])
        elif found:
            found[next(reversed(found))][1].append(" ".join(line.split()))
    return found


def instructions(target: str) -> list[str]:
    """Return what makes a target, from its base on."""
    found = stages()
    lines: list[str] = []
    while target in found:
        target, own = found[target][0], [*found[target][1]]
        lines[:0] = own
    return lines


def pins(name: str) -> dict[str, Version]:
    lines = re.findall(r"^(\S+)===?(\S+) \\$", (LOCKS / f"{name}.txt").read_text(), re.MULTILINE)
    return {package: Version(version) for package, version in lines}


def linter() -> str | None:
    return shutil.which("hadolint", path=f"{build.ROOT / '.venv-deploy' / 'bin'}:/usr/bin")


# The linter is a program of its own, which the tests can do without.
@pytest.mark.skipif(linter() is None, reason="needs hadolint: make deploy-tools")
def test_the_linter_finds_no_fault() -> None:
    done = subprocess.run([str(linter()), build.FILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_cpu_target_is_the_last_and_gets_no_compiler() -> None:
    assert next(reversed(stages())) == "cpu"
    for target in ("cpu", "ray"):
        assert not [line for line in instructions(target) if line.startswith("RUN")]
    assert "gcc" in " ".join(instructions("gpu"))


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_runs_as_nobody_in_particular_and_tells_its_health(target: str) -> None:
    lines = instructions(target)
    assert lines[-1] == "USER 10001:10001"
    (health,) = (line for line in lines if line.startswith("HEALTHCHECK"))
    assert 'CMD ["els-server", "probe"' in health
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    assert f"EXPOSE {defaults['port']} {defaults['metrics_port']}" in lines


def test_the_gpu_target_has_a_cache_for_kernels_where_the_manifests_mount_one() -> None:
    folder = "/var/cache/triton"
    lines = " ".join(instructions("gpu"))
    assert f"TRITON_CACHE_DIR={folder}" in lines
    assert f"VOLUME {folder}" in lines
    # What is put into a volume after its declaration is lost.
    assert lines.index("els_kernels.triton.compile") < lines.index(f"VOLUME {folder}")
    component = (build.ROOT / "deploy/components/gpu/deployment.yaml").read_text()
    assert f"mountPath: {folder}" in component
    assert f"command: [cp, --recursive, {folder}/., /kernels]" in component


@pytest.mark.parametrize("target", TARGETS)
def test_a_lock_pins_all_that_the_project_asks_for(target: str) -> None:
    optional = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"]]
    wanted += [line for extra in EXTRAS[target] for line in optional[extra]]
    pinned = pins(target)
    for requirement in map(Requirement, wanted):
        assert pinned[requirement.name] in requirement.specifier, requirement
    assert (str(pinned["torch"].local) == "cpu", "triton" in pinned) == (
        target != "gpu",
        target == "gpu",
    )


@pytest.mark.parametrize("target", TARGETS)
def test_the_engines_of_a_target_are_those_that_the_page_says(target: str) -> None:
    page = (build.ROOT / "docs/engines.md").read_text().partition("## Images")[2]
    (row,) = re.findall(rf"^\| `{target}` \|(.*)\|$", page, re.MULTILINE)
    pinned = pins(target)
    # torch.compile needs a C++ compiler on a CPU, and Triton on a GPU.
    found = {engine for engine, package in ENGINES.items() if package in pinned}
    found |= {"compile"} if "triton" in pinned else set()
    assert set(re.findall(r"`(\w+)`", row)) == found


def test_the_ray_target_has_the_packages_of_the_cpu_target_and_the_manifests_its_version() -> None:
    ray = pins("ray")
    assert pins("cpu").items() <= ray.items()
    component = yaml.safe_load(
        (build.ROOT / "deploy/components/ray/kustomization.yaml").read_text()
    )
    (image,) = component["images"]
    assert image["newTag"].endswith("-ray")
    cluster = (build.ROOT / "deploy/components/ray/raycluster.yaml").read_text()
    assert f'rayVersion: "{ray["ray"]}"' in cluster


def test_no_target_can_get_the_others_torch() -> None:
    hashes = [
        set(
            re.findall(
                r"sha256:\w+",
                (LOCKS / f"{target}.txt").read_text().split("\ntorch==")[1].split("\ntqdm")[0],
            )
        )
        for target in ("cpu", "gpu")
    ]
    assert hashes[0].isdisjoint(hashes[1])


def test_the_tools_are_those_that_pyproject_builds_with() -> None:
    pinned = pins("tools")
    for requirement in map(Requirement, PROJECT["build-system"]["requires"]):
        if requirement.marker and not requirement.marker.evaluate({"python_version": "3.11"}):
            continue
        assert pinned[requirement.name] in requirement.specifier, requirement


@pytest.mark.parametrize("lock", sorted(LOCKS.glob("*.txt")), ids=lambda path: path.name)
def test_every_package_of_a_lock_has_its_hashes_and_no_address(lock: Path) -> None:
    text = lock.read_text()
    assert len(re.findall(r"^\S+==\S+ \\\n    --hash=sha256:", text, re.MULTILINE)) == len(
        re.findall(r"^[^\s#]", text, re.MULTILINE)
    )
    assert "://" not in text


def test_local_paths_are_those_that_pips_configuration_names(tmp_path: Path) -> None:
    index = tmp_path / "index" / "simple"
    index.mkdir(parents=True)
    values = [f"https://example.com/simple\nfile://{index}", str(tmp_path), "/not/there", "1"]
    assert list(build.local_paths(values)) == [tmp_path / "index", tmp_path]
