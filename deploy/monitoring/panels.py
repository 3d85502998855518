"""Table of the dashboard's panels: health, where time is spent, differences between replicas."""

from __future__ import annotations

from dataclasses import dataclass

from deploy.monitoring.rules import BUDGET, MODEL_CALLS, error_ratio

NAMESPACE = 'namespace=~"$namespace"'
PODS = f'{NAMESPACE}, pod=~"$pod"'
_MODELS = f'{PODS}, model=~"$model"'
_RATE = "[$__rate_interval]"


@dataclass(frozen=True)
class Graph:
    """One panel.

    Args:
        title: of the panel.
        text: description, how to read it.
        unit: by its name in Grafana.
        queries: (legend, PromQL) of each set of lines.
        stacked: whether the lines add up to a total.
        single: whether to show the latest value instead of lines.
        width: in columns, of 24.
    """

    title: str
    text: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    stacked: bool = False
    single: bool = False
    width: int = 8


def _rate(metric: str, by: str, which: str) -> str:
    return f"sum by ({by}) (rate({metric}{{{which}}}{_RATE}))"


def _quantile(share: float, metric: str, by: str, which: str) -> str:
    return f"histogram_quantile({share}, {_rate(f'{metric}_bucket', f'{by}, le', which)})"


def _percentiles(metric: str, by: str, which: str) -> tuple[tuple[str, str], ...]:
    """Return the queries of median and 99th percentile, one line of each per value of ``by``."""
    shares = {"p50": 0.5, "p99": 0.99}
    return tuple(
        (f"{{{{{by}}}}} {name}", _quantile(share, metric, by, which))
        for name, share in shares.items()
    )


def _mean(metric: str, by: str, which: str) -> str:
    return f"{_rate(f'{metric}_sum', by, which)} / {_rate(f'{metric}_count', by, which)}"


def _each(metric: str, by: str, which: str) -> str:
    return f"sum by ({by}) ({metric}{{{which}}})"


_SUCCEEDED = f'{_MODELS}, {MODEL_CALLS}, code="OK"'

ROWS: tuple[tuple[str, tuple[Graph, ...]], ...] = (
    (
        "Is the service healthy?",
        (
            Graph(
                "Serving replicas",
                "Replicas whose health is SERVING.",
                "none",
                (("serving", f"sum(els_serving{{{PODS}}})"),),
                single=True,
                width=6,
            ),
            Graph(
                "Burn of the error budget, 1 h",
                "1 spends the budget in exactly 30 days; 14.4 raises a critical alert.",
                "none",
                (("burn", f"max({error_ratio('1h')}{{{NAMESPACE}}}) / {BUDGET}"),),
                single=True,
                width=6,
            ),
            Graph(
                "Images per second",
                "Computed for all callers; every step of a trajectory counts.",
                "none",
                (("images", f"sum(rate(els_batch_size_sum{{{_MODELS}}}{_RATE}))"),),
                single=True,
                width=6,
            ),
            Graph(
                "Models rejected",
                "Models whose latest load failed; each replica counts.",
                "none",
                (("refused", f"sum(els_model_refused{{{_MODELS}}})"),),
                single=True,
                width=6,
            ),
            Graph(
                "Calls by status",
                "DEADLINE_EXCEEDED and RESOURCE_EXHAUSTED are rejections under load, INTERNAL and "
                "UNAVAILABLE failures of the service; the others are errors of callers.",
                "reqps",
                (("{{code}}", _rate("els_request_seconds_count", "code", _MODELS)),),
                stacked=True,
                width=12,
            ),
            Graph(
                "Share of failed calls",
                "As recorded for the error-budget alerts.",
                "percentunit",
                tuple(
                    (f"{{{{job}}}} {window}", f"{error_ratio(window)}{{{NAMESPACE}}}")
                    for window in ("5m", "1h", "6h")
                ),
                width=12,
            ),
            Graph(
                "Latency to the last response, by method",
                "Of successful calls; a stream ends when its caller ends it.",
                "s",
                _percentiles("els_request_seconds", "method", _SUCCEEDED),
                width=12,
            ),
            Graph(
                "Requests without a response, by reason",
                "Rejected on arrival (rejected), dropped from the queue (expired, cancelled, "
                "evicted), computed after a disconnect (discarded), failed (faulted, interrupted).",
                "cps",
                (("{{reason}}", _rate("els_dropped_total", "reason", _MODELS)),),
                stacked=True,
                width=12,
            ),
        ),
    ),
    (
        "Where does the time go?",
        (
            Graph(
                "Queued work",
                "Predicted seconds by model, worst replica; above the limit, rejections.",
                "s",
                (
                    ("{{model}}", f"max by (model) (els_queue_cost_seconds{{{_MODELS}}})"),
                    ("limit", f"min(els_queue_limit_seconds{{{PODS}}})"),
                ),
            ),
            Graph(
                "Queueing time",
                "Of requests that were queued.",
                "s",
                _percentiles("els_queue_seconds", "model", _MODELS),
            ),
            Graph(
                "Batch time",
                "Duration of one batch on a device.",
                "s",
                _percentiles("els_compute_seconds", "model", _MODELS),
            ),
            Graph(
                "Images per batch",
                "Mean; grows with the load as far as larger batches are cheaper per image.",
                "none",
                (("{{model}}", _mean("els_batch_size", "model", _MODELS)),),
            ),
            Graph(
                "Device utilisation",
                "Share of the time that each device computes; near 1 only more replicas help.",
                "percentunit",
                (
                    (
                        "{{pod}} {{device}}",
                        _rate("els_device_busy_seconds_total", "pod, device", PODS),
                    ),
                ),
            ),
            Graph(
                "Measured over predicted batch time",
                "Far from 1 the cost model is off: rejections come too late (above) or too early.",
                "none",
                (
                    (
                        "{{model}}",
                        f"{_rate('els_compute_seconds_sum', 'model', _MODELS)}"
                        f" / {_rate('els_batch_cost_seconds_sum', 'model', _MODELS)}",
                    ),
                ),
            ),
        ),
    ),
    (
        "Which replica is different?",
        (
            Graph(
                "Calls in flight",
                "A drain ends when none is left.",
                "none",
                (("{{pod}}", _each("els_calls_in_flight", "pod", PODS)),),
            ),
            Graph(
                "Queue length, running trajectories",
                "Each trajectory has at most one request in the queue.",
                "none",
                (
                    ("{{pod}} queued", _each("els_queue_items", "pod", _MODELS)),
                    ("{{pod}} trajectories", _each("els_trajectories", "pod", PODS)),
                ),
            ),
            Graph(
                "Time without progress of the running batch",
                "At the watchdog's limit the process exits; slow batches with progress do not.",
                "s",
                (
                    (
                        "{{pod}} {{device}}",
                        _each("els_device_stalled_seconds", "pod, device", PODS),
                    ),
                    ("watchdog", f"min(els_watchdog_seconds{{{PODS}}})"),
                ),
            ),
            Graph(
                "Drains",
                "Seconds since SIGTERM of each draining replica, and its limit.",
                "s",
                (
                    ("{{pod}}", f"{_each('els_draining_seconds', 'pod', PODS)} > 0"),
                    ("limit", f"min(els_drain_limit_seconds{{{PODS}}})"),
                ),
            ),
            Graph(
                "Event loop lag",
                "p99 and latest value; delays every call.",
                "s",
                (
                    ("{{pod}} p99", _quantile(0.99, "els_event_loop_lag_seconds", "pod", PODS)),
                    (
                        "{{pod}} latest",
                        _each("els_event_loop_lag_latest_seconds", "pod", PODS),
                    ),
                ),
            ),
            Graph(
                "Processor cores in use",
                "CPU time of the process: computation and gRPC.",
                "none",
                (("{{pod}}", _rate("process_cpu_seconds_total", "pod", PODS)),),
            ),
            Graph(
                "Memory",
                "Resident memory of the process, and memory of its models.",
                "bytes",
                (
                    ("{{pod}}", _each("process_resident_memory_bytes", "pod", PODS)),
                    ("{{pod}} models", _each("els_model_memory_bytes", "pod", _MODELS)),
                ),
            ),
            Graph(
                "Open files and connections",
                "Each connection is a file descriptor.",
                "none",
                (("{{pod}}", _each("process_open_fds", "pod", PODS)),),
            ),
            Graph(
                "Started calls, by method",
                "Without health and reflection; with calls whose token was rejected.",
                "reqps",
                (("{{grpc_method}}", _rate("grpc_server_started_total", "grpc_method", PODS)),),
            ),
            Graph(
                "Messages",
                "Each message of a stream counts.",
                "cps",
                (
                    ("received", f"sum(rate(grpc_server_msg_received_total{{{PODS}}}{_RATE}))"),
                    ("sent", f"sum(rate(grpc_server_msg_sent_total{{{PODS}}}{_RATE}))"),
                ),
            ),
            Graph(
                "Versions",
                "Replicas by version; two versions during a rollout.",
                "none",
                (
                    (
                        "{{version}} {{commit}}",
                        f"count by (version, commit) (els_build_info{{{PODS}}})",
                    ),
                ),
                stacked=True,
            ),
            Graph(
                "Stale reloaded files",
                "Time since a tokens or TLS file became invalid; its previous content is in use.",
                "s",
                (
                    (
                        "{{pod}} {{file}}",
                        _each("els_reloaded_file_stale_seconds", "pod, file", PODS),
                    ),
                ),
            ),
            Graph(
                "Log records lost",
                "The destination of the log does not accept records.",
                "none",
                (("{{pod}}", _each("els_log_records_lost_total", "pod", PODS)),),
            ),
        ),
    ),
)
