from __future__ import annotations

import pickle
import subprocess
import sys
from typing import get_type_hints

import pytest

import els_client
from els_client import AsyncClient, Client, errors


def test_the_public_names_are_sorted_and_there() -> None:
    assert els_client.__all__ == sorted(els_client.__all__)
    assert all(hasattr(els_client, name) for name in els_client.__all__)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_no_grpc_or_protobuf_type_is_in_a_public_signature(kind: type) -> None:
    # Also those of its bases.
    public = [getattr(kind, name) for name in dir(kind) if not name.startswith("_")]
    assert len(public) > 10
    methods = [one.fget if isinstance(one, property) else one for one in public]
    hints = [str(hint) for method in methods for hint in get_type_hints(method).values()]
    assert not [hint for hint in hints if "grpc" in hint or "pb2" in hint]


@pytest.mark.slow
def test_importing_the_client_takes_no_torch_no_server_and_no_extra() -> None:
    script = "import sys, els_client, els_client.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    extras = {"hdrh", "matplotlib", "locust", "uvloop"}
    others = {"torch", "els_service", "els_kernels"}
    assert not (others | extras) & set(loaded.stdout.decode().split())


def test_every_error_is_drawn_in_the_tree_with_its_code() -> None:
    for error in errors.ElsError.__subclasses__():
        assert f"{error.__name__:<24}{error.code}" in str(errors.__doc__)


def test_errors_survive_pickling() -> None:
    error = errors.error_of("INVALID_ARGUMENT", "x: wrong", [errors.Violation("x", "wrong")])
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is errors.InvalidArgumentError
    assert (str(copy), copy.violations) == (str(error), error.violations)
