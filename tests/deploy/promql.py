"""What PromQL expressions ask of metrics: which names, labels and values must be there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from string import Template

import promql_parser as promql

TARGET = {"namespace", "pod", "container", "endpoint", "instance", "job"}
"""Labels whose values are the deployment's."""
_BLOCK = re.compile(r"^```promql\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_METRIC = re.compile(r"`((?:els|grpc_server|process)_[a-z0-9_]+|up)`")
_VARIABLES = {"namespace": ".*", "pod": ".*", "model": ".*", "__rate_interval": "1m"}


def as_grafana(expression: str) -> str:
    """Return an expression, its variables replaced by everything there is."""
    return Template(expression).substitute(_VARIABLES)


def queries_of(runbook: str) -> list[str]:
    """Return the queries of a runbook, and the metrics that its text names."""
    blocks = _BLOCK.findall(runbook)
    return [line for block in blocks for line in block.splitlines()] + _METRIC.findall(runbook)


@dataclass(frozen=True)
class Selected:
    """One metric that an expression reads.

    Args:
        name: the metric's.
        matchers: (label, values that it is or is not); ".*" is any.
        labels: that the expression groups or matches by, and so must be there.
    """

    name: str
    matchers: tuple[tuple[str, tuple[str, ...]], ...]
    labels: frozenset[str]


def selections(expression: str) -> Iterator[Selected]:
    """Yield every metric that an expression reads."""
    yield from _within(promql.parse(expression), frozenset())


def _within(node: promql.Expr, labels: frozenset[str]) -> Iterator[Selected]:
    match node:
        case promql.VectorSelector():
            assert node.name, f"expected a metric's name: {node}"
            yield Selected(node.name, tuple(map(_matcher, node.matchers.matchers)), labels)
        case promql.MatrixSelector():
            yield from _within(node.vector_selector, labels)
        case promql.AggregateExpr():
            # What is summed away is asked of nobody; what is kept, of everybody below.
            yield from _within(node.expr, _kept(node.modifier))
        case promql.BinaryExpr():
            on = _matched(node.modifier)
            yield from _within(node.lhs, labels | on)
            # The result has the labels of the left side, but for what "or" adds.
            yield from _within(node.rhs, labels | on if str(node.op) == "or" else on)
        case promql.Call():
            for argument in node.args:
                yield from _within(argument, labels)
        case promql.ParenExpr() | promql.SubqueryExpr() | promql.UnaryExpr():
            yield from _within(node.expr, labels)
        case promql.NumberLiteral() | promql.StringLiteral():
            pass
        case _:
            raise TypeError(f"expected a kind of expression known here, got {type(node).__name__}")


def _kept(modifier: promql.AggModifier | None) -> frozenset[str]:
    if modifier is None:
        return frozenset()
    assert modifier.type == promql.AggModifierType.By, "expected by, which names what is kept"
    return frozenset(modifier.labels)


def _matched(modifier: promql.BinModifier | None) -> frozenset[str]:
    matching = modifier.matching if modifier else None
    if matching is None or matching.type == promql.LabelModifierType.Exclude:
        return frozenset()
    return frozenset(matching.labels)


def _matcher(matcher: promql.Matcher) -> tuple[str, tuple[str, ...]]:
    if matcher.op in (promql.MatchOp.Equal, promql.MatchOp.NotEqual):
        return matcher.name, (matcher.value,)
    values = tuple(matcher.value.split("|"))
    for value in values:
        assert value == ".*" or value.isidentifier(), f"expected words, or everything: {value}"
    return matcher.name, values
