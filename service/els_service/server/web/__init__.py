"""HTTP port: the Open Inference Protocol over REST, JSON of ``denoise.v1``, and the live page.

A request becomes the message of an RPC, whose registered handler answers it: tokens, limits,
memory, fairness, deadlines, metrics, logs and traces are those of gRPC.
"""

from __future__ import annotations

from importlib import import_module

from els_service.config import Settings
from els_service.errors import LoadError

_MODULES = ("httptools", "orjson", "starlette")
"""Modules of the extra."""


def check_installed(settings: Settings) -> None:
    """Check that the extra ``web`` is installed if the settings have an HTTP port.

    Raises:
        LoadError: It is not.
    """
    if settings.http_port is None:
        return
    try:
        for name in _MODULES:
            import_module(name)
    except ImportError as error:
        needs = "expected the extra 'web' to be installed: pip install 'els-denoise[web]'"
        raise LoadError("http_port", f"{needs} ({error})") from error
