"""Version of the distribution and commit of the build."""

from importlib.metadata import version

from els_proto.build_info import COMMIT

VERSION = version("els-denoise")
FULL = f"{VERSION}+{COMMIT}"

__all__ = ["COMMIT", "FULL", "VERSION"]
