"""Build of the native CPU kernel: one source, compiled for each instruction set, in one library.

Run by the build hook, or as ``python kernels/native_build.py`` in a checkout.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NATIVE = Path("kernels/els_kernels/native")
LIBRARY = NATIVE / "libels_native.so"

COMMON = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    # False positives of GCC 12 in its own AVX-512 header; clang lacks the second option.
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"),
    # No vector is passed to a function of another translation unit.
    "-Wno-psabi",
)
_AVX512 = ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma")
KERNELS: dict[str, tuple[str, ...]] = {
    "avx512": (*_AVX512, "-mprefer-vector-width=512"),
    "avx2": ("-mavx2", "-mfma"),
    "baseline": ("-DELS_ANY_CHANNELS",),
}
"""Kernel → compiler flags on x86-64, where processors without AVX2 are older than 2013."""
_ONLY: dict[str, tuple[str, ...]] = {"baseline": ()}
"""The same on other processors."""
_NEEDS = {"avx512": {"avx512f", "avx512dq"}, "avx2": {"avx2", "fma"}, "baseline": set[str]()}
"""Kernel → what the library asks of a processor before it selects it, as Linux names it."""


class NativeBuildError(Exception):
    """The library cannot be built; the text gives the reason."""


def compile_native(root: Path, *, everywhere: bool = True) -> Path:
    """Compile the library of the checkout at ``root`` and return its path.

    The compiler is ``$CXX``, else the first of c++, g++ and clang++ that is found. Unless it is to
    run ``everywhere``, kernels that this processor lacks are left out, and the baseline is hardly
    optimised if the processor has another: half of the time.

    Raises:
        NativeBuildError: No compiler was found, or compilation failed.
    """
    library = root / LIBRARY
    library.unlink(missing_ok=True)
    compiler = _compiler()
    with tempfile.TemporaryDirectory() as folder:
        objects = compile_objects(
            compiler, root, Path(folder), platform.machine(), everywhere=everywhere
        )
        linked = Path(folder, library.name)
        run(*compiler, "-shared", "-pthread", *map(str, objects), "-o", str(linked))
        shutil.move(linked, library)
    return library


def compile_objects(
    compiler: list[str],
    root: Path,
    folder: Path,
    machine: str,
    library: Path | None = None,
    *,
    everywhere: bool = True,
) -> list[Path]:
    """Compile the kernels of an architecture and the code that selects one; return the objects.

    ``library`` replaces the library's own source, which it includes; used by tests.
    """
    source = root / NATIVE / "src"
    kernels = KERNELS if machine.lower() in ("x86_64", "amd64") else _ONLY
    if not everywhere and (features := _features()):
        kernels = {name: flags for name, flags in kernels.items() if _NEEDS[name] <= features}
        if len(kernels) > 1:
            # Tests alone select it. Its bits are the same: it has no instruction that adds and
            # multiplies with one rounding, which a compiler would use as it optimises.
            kernels["baseline"] += ("-O1",)
    names = (
        f'-DELS_SOURCES="{digest(source)}"',
        *(f"-DELS_HAS_{name.upper()}" for name in kernels),
    )
    jobs: dict[Path, tuple[str, ...]] = {
        folder / "library.o": (f"-I{source}", *names, str(library or source / "library.cpp"))
    }
    for name, flags in kernels.items():
        symbol = (f"-DELS_KERNEL=els_kernel_{name}", f'-DELS_KERNEL_NAME="{name}"')
        jobs[folder / f"{name}.o"] = (*flags, *symbol, str(source / "kernel.cpp"))

    def compile_one(job: tuple[Path, tuple[str, ...]]) -> None:
        run(*compiler, *COMMON, *job[1], "-c", "-o", str(job[0]))

    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, jobs.items()))
    return list(jobs)


def _features() -> set[str]:
    """Return the features of this processor by Linux's names; empty where they cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {name for line in lines if line.startswith("flags") for name in line.split()}


def digest(folder: Path) -> str:
    """Return the digest of the sources in a folder, which ``native/binding.py`` compares."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.[ch]pp")):
        found.update(path.read_bytes())
    return found.hexdigest()


def _compiler() -> list[str]:
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise NativeBuildError("no C++ compiler found: looked for c++, g++, clang++ and $CXX")


def run(*command: str) -> None:
    """Run a compiler; raise NativeBuildError with its output if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NativeBuildError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        raise NativeBuildError(f"{shlex.join(command)}\n{done.stderr}")
    if done.stderr:
        sys.stderr.write(done.stderr)


if __name__ == "__main__":
    print(compile_native(Path(__file__).parent.parent))
