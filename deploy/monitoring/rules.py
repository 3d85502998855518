"""Recording and alerting rules for Prometheus.

An alert's expression keeps the labels that identify what is affected; ``hold`` is how long it must
be true. Every alert has a page in ``runbooks/``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from promql_parser import parse

OBJECTIVE = 0.995
"""Share of successful calls over 30 days."""
BUDGET = round(1 - OBJECTIVE, 6)

_MODEL_METHODS = '"Denoise|DenoiseStream|ModelInfer|Sample|Score"'
"""Methods that use a model, not those that describe the server."""
MODEL_CALLS = f"method=~{_MODEL_METHODS}"
"""Label matcher of those methods."""
_CALLS = f"grpc_server_handled_total{{grpc_method=~{_MODEL_METHODS}"
_FAILURES = (
    'grpc_code=~"DeadlineExceeded|FailedPrecondition|Internal|ResourceExhausted|Unavailable"'
)
"""Statuses caused by the service or its lack of capacity."""
_CALL_RATE, _ERROR_RATE = "namespace_job:els_calls:rate5m", "namespace_job:els_errors:rate5m"
_WINDOWS = ("5m", "30m", "1h", "2h", "6h", "1d", "3d")

Severity = Literal["critical", "warning"]


@dataclass(frozen=True)
class Alert:
    """One alerting rule.

    Args:
        name: of the alert and its runbook.
        expression: PromQL; each series that it returns raises an alert.
        summary: one sentence, with the template variables ``$labels`` and ``$value``.
        hold: how long the expression must be true, as a PromQL duration.
        severity: critical if callers are affected now or soon and it does not resolve itself.
        labels: further labels, which distinguish rules of one name.
    """

    name: str
    expression: str
    summary: str
    hold: str = "0s"
    severity: Severity = "warning"
    labels: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Burn:
    """Burn rate of the error budget that raises an alert, over a long and a short window.

    The pairs are those of the Site Reliability Workbook, chapter 5: 2 % of the budget of 30 days in
    an hour, 5 % in 6 hours, 10 % in a day and in three days.
    """

    factor: float
    long: str
    short: str
    hold: str
    severity: Severity


BURNS = (
    Burn(14.4, "1h", "5m", "2m", "critical"),
    Burn(6, "6h", "30m", "15m", "critical"),
    Burn(3, "1d", "2h", "1h", "warning"),
    Burn(1, "3d", "6h", "3h", "warning"),
)


def error_ratio(window: str) -> str:
    """Return the name of the recorded share of failed calls in a window."""
    return f"namespace_job:els_errors:ratio_rate{window}"


def _burn_alert(burn: Burn) -> Alert:
    limit = f"{burn.factor} * {BUDGET}"
    return Alert(
        "ElsErrorBudgetBurn",
        f"{error_ratio(burn.long)} > {limit} and {error_ratio(burn.short)} > {limit}",
        f"{{{{ $value | humanizePercentage }}}} of the calls to {{{{ $labels.job }}}} fail: "
        f"{burn.factor:g} times what the objective of {OBJECTIVE:.1%} allows, over {burn.long}",
        burn.hold,
        burn.severity,
        (("window", burn.long),),
    )


BURN_ALERTS = tuple(map(_burn_alert, BURNS))
ALERTS = (
    Alert(
        "ElsNothingServing",
        "max by (namespace, job) (max_over_time(els_serving[1h]))"
        " unless max by (namespace, job) (els_serving) == 1"
        " or absent_over_time(els_serving[1h])",
        "No replica of {{ $labels.job }} serves",
        hold="1m",
        severity="critical",
    ),
    Alert(
        "ElsReplicaNotServing",
        "max by (namespace, pod) (els_serving) == 0"
        " and max by (namespace, pod) (els_draining_seconds) == 0",
        "{{ $labels.pod }} runs, but serves no model",
        hold="10m",
    ),
    Alert(
        "ElsReplicaUnreachable",
        "up == 0 and on (namespace, job, instance) last_over_time(els_build_info[1h])",
        "{{ $labels.pod }} cannot be scraped",
        hold="3m",
    ),
    Alert(
        "ElsReplicaRestarted",
        "max by (namespace, pod) (changes(process_start_time_seconds[15m])"
        " and ignoring (version, commit) els_build_info) > 0",
        "{{ $labels.pod }} ended and was restarted: it lost its device, crashed or was killed",
    ),
    Alert(
        "ElsWorkerStuck",
        "max by (namespace, pod, device)"
        " (els_device_stalled_seconds / ignoring (device) group_left () els_watchdog_seconds)"
        # Not during warm-up, which may take long.
        " > 0.25 and on (namespace, pod) max by (namespace, pod) (els_serving) == 1"
        " or sum by (namespace, pod) (min_over_time(els_queue_items[2m])) > 0"
        " and sum by (namespace, pod) (rate(els_compute_seconds_count[2m])) == 0",
        "{{ $labels.pod }} makes no progress: a batch is stalled, or no batch ends",
        # No hold: by default the watchdog ends the process a minute and a half later.
        severity="critical",
    ),
    Alert(
        "ElsQueueSaturated",
        "max by (namespace, pod, model)"
        " (els_queue_cost_seconds / ignoring (model) group_left () els_queue_limit_seconds) > 0.8"
        " or sum by (namespace, pod, model)"
        ' (rate(els_dropped_total{reason=~"rejected_full|evicted"}[5m])) > 0',
        "The queue of {{ $labels.model }} on {{ $labels.pod }} is nearly full, or rejects requests",
        hold="5m",
    ),
    Alert(
        "ElsDeadlineMisses",
        "sum by (namespace, job, model) (rate(els_request_seconds_count"
        f'{{{MODEL_CALLS}, code="DEADLINE_EXCEEDED"}}[10m]))'
        f" / sum by (namespace, job, model) (rate(els_request_seconds_count{{{MODEL_CALLS}}}[10m]))"
        " > 0.05",
        "{{ $value | humanizePercentage }} of the calls to {{ $labels.model }} miss their deadline",
        hold="10m",
    ),
    Alert(
        "ElsDrainCutShort",
        "last_over_time(els_calls_in_flight[10m]) > 0 and last_over_time(els_draining_seconds[10m])"
        " > 0.5 * last_over_time(els_drain_limit_seconds[10m])",
        "{{ $labels.pod }} was last scraped late in its drain, with {{ $value }} calls in flight",
    ),
    Alert(
        "ElsModelRefused",
        "sum by (namespace, job, model) (els_model_refused) > 0",
        "{{ $value }} replicas cannot load {{ $labels.model }}",
        hold="5m",
    ),
    Alert(
        "ElsReloadedFileStale",
        "max by (namespace, pod, file) (els_reloaded_file_stale_seconds) > 60",
        "{{ $labels.pod }} cannot use its {{ $labels.file }} file and still uses the previous "
        "content, for {{ $value | humanizeDuration }} so far: later changes have no effect",
        hold="1m",
    ),
    Alert(
        "ElsEventLoopLag",
        "histogram_quantile(0.99,"
        " sum by (namespace, pod, le) (rate(els_event_loop_lag_seconds_bucket[5m]))) > 0.1",
        "The event loop of {{ $labels.pod }} is {{ $value | humanizeDuration }} late",
        hold="10m",
    ),
)


def runbook(name: str) -> str:
    """Return the path of an alert's runbook from the root of the repository."""
    return f"deploy/monitoring/runbooks/{name}.md"


def document() -> dict[str, Any]:
    """Return the rules as a Prometheus rule file, or the ``spec`` of a PrometheusRule."""
    budget = [*_records(), *map(_alerting, BURN_ALERTS)]
    return {
        "groups": [
            {"name": "els-error-budget", "rules": budget},
            {"name": "els", "rules": [_alerting(alert) for alert in ALERTS]},
        ]
    }


def _records() -> Iterator[dict[str, str]]:
    yield _recording(_CALL_RATE, f"sum by (namespace, job) (rate({_CALLS}}}[5m]))")
    yield _recording(_ERROR_RATE, f"sum by (namespace, job) (rate({_CALLS}, {_FAILURES}}}[5m]))")
    for window in _WINDOWS:
        # From the recorded sums, as days of every replica's series are too many samples.
        ratio = f"sum_over_time({_ERROR_RATE}[{window}]) / sum_over_time({_CALL_RATE}[{window}])"
        yield _recording(error_ratio(window), ratio)


def _recording(name: str, expression: str) -> dict[str, str]:
    return {"record": name, "expr": parse(expression).prettify()}


def _alerting(alert: Alert) -> dict[str, Any]:
    return {
        "alert": alert.name,
        "expr": parse(alert.expression).prettify(),
        "for": alert.hold,
        "labels": {"service": "els-denoise", "severity": alert.severity, **dict(alert.labels)},
        "annotations": {"summary": alert.summary, "runbook": runbook(alert.name)},
    }
