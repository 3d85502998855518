"""Rows of parametrised tests that every run has, and those of ``make test-nightly`` alone.

A test over several parameters has a row for each combination. The mark ``nightly`` leaves the rows
that prove least to ``make test-nightly``, which has all of them:

- ``telling(predicate)`` keeps the rows that a predicate of some of the parameters names;
- ``latin(n, "form", "name", "shape")`` keeps one row in n, along a diagonal: with the length of the
  shortest parameter as n, every pair of values of two other parameters still meets, once;
- ``pytest.mark.nightly`` without arguments leaves a whole test, or the rows of one
  ``pytest.param``.

Several of them on one test: a row has to be kept by each.

``make test-fast`` has one row of each test: the first that is kept.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from hypothesis import settings

Keeps = Callable[[dict[str, Any], dict[str, int]], bool]
"""Whether every run has a row, by its values and by their positions."""


def telling(predicate: Callable[..., bool]) -> pytest.MarkDecorator:
    """Return a mark that leaves rows to the nightly run unless the predicate holds.

    Args:
        predicate: of parameters of the test or of its fixtures, by their names.
    """
    names = [*inspect.signature(predicate).parameters]
    return _mark(lambda values, _: predicate(**{name: values[name] for name in names}))


def latin(n: int, *names: str) -> pytest.MarkDecorator:
    """Return a mark that keeps the rows whose positions add up to a multiple of n.

    Args:
        n: one row in n is kept.
        names: of parameters, whose values are numbered as they appear.
    """
    return _mark(lambda _, positions: sum(positions[name] for name in names) % n == 0)


def _mark(keeps: Keeps) -> pytest.MarkDecorator:
    # Called with a function alone, a mark would take it for the test.
    return pytest.mark.nightly.with_args(keeps)


def all_rows() -> bool:
    """Return whether this run is nightly."""
    return settings.get_current_profile_name() == "nightly"


def kept(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """Return the rows of tests that this run has, which is not nightly."""
    most = 1 if settings.get_current_profile_name() == "fast" else None
    tests: dict[tuple[object, str], list[pytest.Item]] = {}
    for item in items:
        tests.setdefault((item.parent, item.name.partition("[")[0]), []).append(item)
    return {row for rows in tests.values() for row in itertools.islice(_kept(rows), most)}


def _kept(rows: list[pytest.Item]) -> Iterator[pytest.Item]:
    """Yield the rows of one test that its marks keep."""
    known: dict[str, dict[int, int]] = {}
    for row in rows:
        call: Any = getattr(row, "callspec", None)
        values: dict[str, Any] = {} if call is None else call.params
        positions = {}
        for name, value in values.items():
            # Rows share the objects of a parameter, which need not be hashable.
            seen = known.setdefault(name, {})
            positions[name] = seen.setdefault(id(value), len(seen))
        marks = row.iter_markers("nightly")
        if all(mark.args and mark.args[0](values, positions) for mark in marks):
            yield row
