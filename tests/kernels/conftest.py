"""Every shared test asks every implementation; those that cannot be had here are skipped."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from tests.kernels.cases import NAMES, VARIANTS

from els_kernels import Geometry
from els_kernels.native import instruction_sets

_NO_SUCH_SET = "this processor has no"


def missing(variant: str) -> str | None:
    """Return why a variant cannot be had here, or None."""
    if variant == "triton" and find_spec("triton") is None:
        return "triton is not installed: pip install 'els-denoise[gpu]'"
    kind, _, name = variant.partition("-")
    if kind != "native":
        return None
    try:
        known = instruction_sets()
    except RuntimeError as error:
        return str(error)
    return None if name in known else f"{_NO_SUCH_SET} {name}"


@functools.cache
def widest(variant: str) -> bool:
    """Return whether a variant is not native, or has the widest vectors of this processor.

    The others are the same template with fewer lanes: they get fewer rows, see ``support.rows``.
    """
    kind, _, name = variant.partition("-")
    return kind != "native" or missing(variant) is not None or name == instruction_sets()[0]


def has_fold_row(variant: str, name: str) -> bool:
    """Return whether every run has the row of a fold: the widest native kernel has all.

    Narrower vectors have the machine of two kinds of patches, and the one of one place; torch has
    in addition clipped windows on the torus, and patches inside.
    """
    few = {"els-zeros", "local-circular"}
    if variant == "torch":
        return name in few | {"els-valid", "els-inside"}
    return widest(variant) or name in few


def variant(name: str) -> Any:
    """Return a parameter that is skipped where the variant cannot be had."""
    reason = missing(name)
    # Without a compiler, triton or a wide processor the rest of the suite still has to pass.
    skip = pytest.mark.skipif(reason is not None, reason=str(reason))
    interpreted = name == "triton" and not torch.cuda.is_available()
    return pytest.param(name, marks=[skip, pytest.mark.slow] if interpreted else skip)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let one test stand for all that a missing instruction set skips, so that its reason is read.

    The others are counted as deselected.
    """
    kept, deselected, seen = list[pytest.Item](), list[pytest.Item](), set[str]()
    for item in items:
        marks = item.iter_markers("skipif")
        reason = next((m.kwargs["reason"] for m in marks if any(m.args)), "")
        repeated = reason.startswith(_NO_SUCH_SET) and reason in seen
        seen.add(reason)
        (deselected if repeated else kept).append(item)
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = kept


@pytest.fixture(scope="session", autouse=True)
def _nested_functions_are_patched_once() -> Iterator[None]:
    """Save a quarter of the time of Triton's interpreter.

    It replaces the functions of ``triton.language`` at each launch and again at each call of a
    nested function, by the same ones: the first call of each is enough.
    """
    if find_spec("triton") is None or torch.cuda.is_available():
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction

    patching, called = InterpretedFunction.__call__, set[Any]()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn in called:
            return self.rewrite()(*args, **kwargs)
        called.add(self.fn)
        return patching(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "__call__", call)
        yield


@pytest.fixture(scope="session", params=[variant(name) for name in VARIANTS if name != "reference"])
def implementation(request: pytest.FixtureRequest) -> str:
    """What is judged against the specification: every variant that is not the specification."""
    return str(request.param)


@pytest.fixture(
    scope="session", params=[variant(n) for n in VARIANTS if n not in ("reference", "triton")]
)
def compiled(request: pytest.FixtureRequest) -> str:
    """What is fast without a GPU."""
    return str(request.param)


@pytest.fixture(scope="session", params=[variant(name) for name in VARIANTS])
def any_implementation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session", params=[variant(name) for name in VARIANTS if name != "triton"])
def on_cpu(request: pytest.FixtureRequest) -> str:
    """Every variant but that of a GPU, whose launches show no progress."""
    return str(request.param)


@pytest.fixture(params=list(NAMES))
def geometry(request: pytest.FixtureRequest) -> Geometry:
    return NAMES[request.param]
