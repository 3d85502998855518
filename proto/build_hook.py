"""Compiles the contracts into ``els_proto``, notes the commit, and compiles the native kernel.

Runs inside every build (editable, wheel); what it writes is never committed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

CONTRACTS = ("denoise/v1/denoise.proto", "inference/grpc_service.proto")
IMPORTED = "google/rpc/status.proto"
"""Contract of others that these import; its module comes with googleapis-common-protos."""


class BuildHook(BuildHookInterface[Any]):
    """Writes ``proto/python/els_proto`` anew before the package is collected."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile contracts and kernel; ``version`` and ``build_data`` are hatchling's."""
        root = Path(self.root)
        compile_contracts(root)
        if self.target_name == "wheel":
            self._compile_native(root, build_data, everywhere=version != "editable")

    def _compile_native(
        self, root: Path, build_data: dict[str, Any], *, everywhere: bool = True
    ) -> None:
        """Compile the kernel and tag the wheel for this platform, or warn and go on without.

        Unless it is to run ``everywhere``, as a wheel is, it is compiled for this processor.
        """
        sys.path.insert(0, str(root / "kernels"))
        from native_build import NativeBuildError, compile_native

        try:
            compile_native(root, everywhere=everywhere)
        except NativeBuildError as error:
            self.app.display_warning(f"native CPU kernel not built, torch will serve: {error}")
        else:
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{_platform()}"


def compile_contracts(root: Path) -> None:
    """Write the generated package under ``root/proto/python``.

    Raises:
        subprocess.CalledProcessError: The compiler refused a contract; its text is on stderr.
    """
    proto, out = root / "proto", root / "proto" / "python"
    package = out / "els_proto"
    shutil.rmtree(package, ignore_errors=True)
    out.mkdir(exist_ok=True)
    tools = str(Path(sys.executable).parent)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            # The virtual path makes generated imports absolute: from els_proto.denoise.v1 import …
            f"-Iels_proto={proto}",
            f"-I{proto}",
            f"--python_out={out}",
            f"--grpc_python_out={out}",
            f"--mypy_out={out}",
            f"--mypy_grpc_out={out}",
            *(f"els_proto/{contract}" for contract in CONTRACTS),
        ],
        check=True,
        # The stub plugins stand beside the interpreter that runs the build.
        env={**os.environ, "PATH": os.pathsep.join((tools, os.environ.get("PATH", "")))},
    )
    for folder in (package, *(path for path in package.rglob("*") if path.is_dir())):
        (folder / "__init__.py").write_text('"""Generated from the contracts in proto/."""\n')
    (package / "py.typed").touch()
    for contract in (*CONTRACTS, IMPORTED, "google/LICENSE"):
        copy = package / "protos" / contract
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(proto / contract, copy)
    (package / "build_info.py").write_text(
        f'"""Generated: which commit this build is of."""\n\nCOMMIT = "{_commit(root)}"\n'
    )


def _platform() -> str:
    # The library is loaded through ctypes: any Python will do, but only this platform.
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")


def _commit(root: Path) -> str:
    """Return the commit of the checkout at ``root``, else ``ELS_COMMIT``, else ``unknown``."""
    git = (
        subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
        if shutil.which("git") and (root / ".git").exists()
        else None
    )
    if git is not None and git.returncode == 0:
        return git.stdout.strip()
    return os.environ.get("ELS_COMMIT", "unknown")
