"""Compiles the native CPU kernel: one source, once for every instruction set, into one library.

Called by the build hook; ``python kernels/native_build.py`` does the same in a checkout.
"""

from __future__ import annotations

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
    # False alarms of GCC 12 within its own AVX-512 header; clang does not know the second.
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"),
    # No vector crosses a function that is called from another file.
    "-Wno-psabi",
)
_AVX512 = ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma")
KERNELS: dict[str, tuple[str, ...]] = {
    "avx512": (*_AVX512, "-mprefer-vector-width=512"),
    "avx2": ("-mavx2", "-mfma"),
    "baseline": (),
}
"""Kernel → compiler flags; on other processors than x86-64 there is only the baseline."""


class NativeBuildError(Exception):
    """There is no library; the text says why."""


def compile_native(root: Path) -> Path:
    """Compile the library of the checkout at ``root`` and return its path.

    The compiler is ``$CXX``, else the first of c++, g++ and clang++ that is found.

    Raises:
        NativeBuildError: No compiler, or it refused the source.
    """
    library = root / LIBRARY
    library.unlink(missing_ok=True)
    compiler = _compiler()
    with tempfile.TemporaryDirectory() as folder:
        objects = compile_objects(compiler, root, Path(folder), platform.machine())
        linked = Path(folder, library.name)
        run(*compiler, "-shared", "-pthread", *map(str, objects), "-o", str(linked))
        shutil.move(linked, library)
    return library


def compile_objects(
    compiler: list[str], root: Path, folder: Path, machine: str, library: Path | None = None
) -> list[Path]:
    """Compile the kernels of a kind of machine and what chooses among them; return the objects.

    ``library`` stands in for the library's own source, which it includes: for tests.
    """
    source = root / NATIVE / "src"
    kernels = KERNELS if machine.lower() in ("x86_64", "amd64") else ("baseline",)
    jobs: dict[Path, tuple[str, ...]] = {
        folder / "library.o": (f"-I{source}", str(library or source / "library.cpp"))
    }
    for name in kernels:
        symbol = (f"-DELS_KERNEL=els_kernel_{name}", f'-DELS_KERNEL_NAME="{name}"')
        jobs[folder / f"{name}.o"] = (*KERNELS[name], *symbol, str(source / "kernel.cpp"))

    def compile_one(job: tuple[Path, tuple[str, ...]]) -> None:
        run(*compiler, *COMMON, *job[1], "-c", "-o", str(job[0]))

    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, jobs.items()))
    return list(jobs)


def _compiler() -> list[str]:
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise NativeBuildError("no C++ compiler found: looked for c++, g++, clang++ and $CXX")


def run(*command: str) -> None:
    """Run a compiler, or raise NativeBuildError with what it said."""
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
