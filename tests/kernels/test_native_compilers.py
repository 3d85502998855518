"""The native kernel by other compilers and for another processor, where those are at hand."""

from __future__ import annotations

import platform
import runpy
import shutil
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hatchling.bridge.app import Application
from tests.kernels.cases import NAMES, Case, assert_within_budget, random_case
from tests.support.rows import all_rows

import native_build
from els_kernels import Posterior
from els_kernels.native.binding import _PADDING, _SOURCES

ROOT = Path(__file__).parents[2]


class Target(NamedTuple):
    """A compiler, what it compiles for, and what runs its programs."""

    compiler: str
    machine: str
    runner: tuple[str, ...] = ()


TARGETS = {
    "clang": Target("clang++", platform.machine()),
    "aarch64": Target("aarch64-linux-gnu-g++", "aarch64", ("qemu-aarch64",)),
}


@pytest.fixture(scope="module", params=TARGETS)
def program(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, ...]:
    """The command that answers a call, compiled for this test."""
    target = TARGETS[request.param]
    for tool in (target.compiler, *target.runner):
        if shutil.which(tool) is None:
            # Nobody has to have every compiler.
            pytest.skip(f"{tool} is not installed: make compilers")
    return (*target.runner, str(compiled(target, tmp_path_factory.mktemp(request.param))))


def compiled(target: Target, folder: Path) -> Path:
    driver = Path(__file__).with_name("native_driver.cpp")
    out = folder / "driver"
    with pytest.MonkeyPatch.context() as patch:
        if not all_rows():
            # Vectors of the least width, code for any number of channels, and not optimised. The
            # nightly run compiles every kernel with the flags of the build, which takes a minute.
            one = {"baseline": native_build.KERNELS["baseline"]}
            flags = tuple(flag for flag in native_build.COMMON if flag != "-O3")
            for name, value in (("KERNELS", one), ("_ONLY", one), ("COMMON", flags)):
                patch.setattr(native_build, name, value)
        objects = native_build.compile_objects(
            [target.compiler], ROOT, folder, target.machine, library=driver
        )
    # Static, so that it runs where there is no loader for it.
    native_build.run(target.compiler, "-static", "-pthread", *map(str, objects), "-o", str(out))
    return out


def ask(program: tuple[str, ...], case: Case) -> Posterior:
    images, channels, height, width = case.bank.shape
    geometry, batch = case.geometry, len(case)
    window = torch.ones(batch) if case.window is None else case.window
    head = struct.pack(
        "=9q", images, channels, height, width, batch, 2,
        _SOURCES[geometry.sources], _PADDING[geometry.padding], geometry.whole,
    )  # fmt: skip
    centre = case.bank.mean((0, 2, 3), dtype=torch.float64)
    parts = (
        centre,
        case.a.double(),
        case.s.double(),
        window.long(),
        case.ranges,
        case.bank,
        case.x,
    )
    message = head + b"".join(part.contiguous().numpy().tobytes() for part in parts)
    done = subprocess.run(program, input=message, capture_output=True, check=True)
    numbers = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32)
    mean, evidence = numbers[: case.x.numel()], numbers[case.x.numel() :]
    return Posterior(mean.view(case.x.shape), evidence.view(batch, height, width))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_its_kernel_equals_the_reference(program: tuple[str, ...], name: str) -> None:
    for shape in ((19, 3, 6, 7), (5, 1, 8, 5), (6, 2, 5, 5)):
        case = random_case(NAMES[name], shape, None if NAMES[name].whole else [1, 3, 5])
        assert_within_budget(case, ask(program, case), case.attend("reference"))


@pytest.mark.parametrize(
    ("features", "everywhere", "expected"),
    [
        ({"sse2", "avx2", "fma"}, False, ["avx2", "baseline"]),
        ({"avx2", "fma", "avx512f", "avx512dq"}, False, ["avx512", "avx2", "baseline"]),
        ({"sse2"}, False, ["baseline"]),
        ({"sse2"}, True, ["avx512", "avx2", "baseline"]),
        (set[str](), False, ["avx512", "avx2", "baseline"]),
    ],
    ids=["avx2", "avx512", "neither", "wheel", "unknown"],
)
def test_an_editable_installation_has_the_kernels_of_its_processor_and_a_wheel_has_all(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    features: set[str],
    everywhere: bool,
    expected: list[str],
) -> None:
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(native_build, "run", lambda *command: commands.append(command))
    monkeypatch.setattr(native_build, "_features", lambda: features)
    objects = native_build.compile_objects(["c++"], ROOT, tmp_path, "x86_64", everywhere=everywhere)
    assert [one.stem for one in objects] == ["library", *expected]
    (library,) = (command for command in commands if command[-1].endswith("library.o"))
    selected = [one for one in library if one.startswith("-DELS_HAS_")]
    assert selected == [f"-DELS_HAS_{name.upper()}" for name in expected]
    (baseline,) = (command for command in commands if command[-1].endswith("baseline.o"))
    # Where it may be the one that is selected, it is optimised.
    assert ("-O1" in baseline) == (not everywhere and {"avx2"} <= features)


@pytest.mark.parametrize("why", ["no compiler", "a compiler that fails"])
def test_installing_without_a_compiler_works_says_so_and_leaves_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, why: str
) -> None:
    hook_of = runpy.run_path(str(ROOT / "proto" / "build_hook.py"))["BuildHook"]
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if why == "a compiler that fails":
        monkeypatch.setenv("CXX", "/bin/false")
    warnings: list[str] = []
    app = Application()
    monkeypatch.setattr(app, "display_warning", warnings.append)
    data: dict[str, object] = {}
    hook_of(str(tmp_path), {}, None, None, "", "wheel", app)._compile_native(tmp_path, data)
    assert warnings
    assert warnings[0].startswith("native CPU kernel not built, torch will serve: ")
    assert ("no C++ compiler found" in warnings[0]) == (why == "no compiler")
    # A wheel of pure Python, for every platform.
    assert data == {}
