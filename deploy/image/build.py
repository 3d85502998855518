"""Builds an image with buildah: ``python -m deploy.image.build cpu --tag els-denoise:0.1.0-cpu``.

The user's pip configuration is passed as a build secret, so no layer contains it.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlparse

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deploy" / "image" / "Containerfile"
_PACKAGES = frozenset(
    ("cert", "extra-index-url", "find-links", "index-url", "no-index", "proxy", "trusted-host")
)
"""Options of pip that select package sources."""


def pip_configuration() -> dict[str, str]:
    """Return pip's package sources from its files and variables; variables take precedence."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pairs = [line.partition("=") for line in listed.splitlines()]
    # Files are listed first; the last value of a key applies.
    found = {key.rpartition(".")[2]: ast.literal_eval(value) for key, _, value in pairs}
    return {key: value for key, value in found.items() if key in _PACKAGES}


def local_paths(configuration: Iterable[str]) -> Iterator[Path]:
    """Yield the existing local paths in pip's configuration."""
    for part in " ".join(configuration).split():
        # An index needs the folder of its file.
        path = Path(urlparse(part).path).parent if part.startswith("file:") else Path(part)
        if path.is_absolute() and path.exists():
            yield path


def build(target: str, tag: str, *options: str) -> None:
    """Build a target of the Containerfile; ``options`` are passed to buildah.

    Raises:
        subprocess.CalledProcessError: The build failed; buildah prints the reason.
    """
    configuration = pip_configuration()
    lines = (f"{key} = {value.strip()}".replace("\n", "\n    ") for key, value in
             configuration.items())  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        secret = Path(folder) / "pip.conf"
        secret.write_text("\n".join(("[global]", *lines)) + "\n")
        secret.chmod(0o600)
        subprocess.run(
            [
                *("buildah", "build", "--isolation=chroot", "--layers"),
                # The other format has no HEALTHCHECK.
                "--format=docker",
                *(f"--file={FILE}", f"--target={target}", f"--tag={tag}"),
                f"--ignorefile={FILE}.dockerignore",
                f"--secret=id=pip,src={secret}",
                *(
                    f"--volume={path}:{path}:ro"
                    for path in set(local_paths(configuration.values()))
                ),
                f"--build-arg=COMMIT={_git('rev-parse', '--short=12', 'HEAD')}",
                f"--build-arg=CREATED={_created()}",
                *options,
                str(ROOT),
            ],
            check=True,
        )


def _created() -> str:
    """Return the time of the commit, so that repeated builds of it are equal."""
    return f"{datetime.fromtimestamp(int(_git('log', '-1', '--format=%ct')), UTC):%FT%TZ}"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Build the target; unknown options are passed to buildah."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=("cpu", "ray", "gpu"))
    parser.add_argument("--tag", required=True)
    known, options = parser.parse_known_args()
    try:
        build(known.target, known.tag, *options)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)


if __name__ == "__main__":
    main()
