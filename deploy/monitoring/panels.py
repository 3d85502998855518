"""What the dashboard shows, as a table: is it well, where does time go, which replica differs."""

from __future__ import annotations

from dataclasses import dataclass

from deploy.monitoring.rules import ASKING, BUDGET, error_ratio

NAMESPACE = 'namespace=~"$namespace"'
PODS = f'{NAMESPACE}, pod=~"$pod"'
_MODELS = f'{PODS}, model=~"$model"'
_RATE = "[$__rate_interval]"


@dataclass(frozen=True)
class Graph:
    """One panel.

    Args:
        title: what is shown.
        text: how to read it.
        unit: Grafana's name of it.
        queries: (legend, PromQL) of each set of lines.
        stacked: whether the lines are parts of a whole.
        single: whether the latest value is shown instead of lines.
        width: of the 24 columns.
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


def _mean(metric: str, by: str, which: str) -> str:
    return f"{_rate(f'{metric}_sum', by, which)} / {_rate(f'{metric}_count', by, which)}"


def _each(metric: str, by: str, which: str) -> str:
    return f"sum by ({by}) ({metric}{{{which}}})"


_ANSWERED = f'{_MODELS}, {ASKING}, code="OK"'

ROWS: tuple[tuple[str, tuple[Graph, ...]], ...] = (
    (
        "Is it well?",
        (
            Graph(
                "Replicas that serve",
                "Those whose health is SERVING.",
                "none",
                (("serving", f"sum(els_serving{{{PODS}}})"),),
                single=True,
                width=6,
            ),
            Graph(
                "Burn of the error budget, 1 h",
                "1 uses up the budget in exactly 30 days; at 14.4 somebody is called.",
                "none",
                (("burn", f"max({error_ratio('1h')}{{{NAMESPACE}}}) / {BUDGET}"),),
                single=True,
                width=6,
            ),
            Graph(
                "Images a second",
                "Computed, whoever asked; every step of a trajectory counts.",
                "none",
                (("images", f"sum(rate(els_batch_size_sum{{{_MODELS}}}{_RATE}))"),),
                single=True,
                width=6,
            ),
            Graph(
                "Models refused",
                "Loads that failed and were not made good; each replica counts.",
                "none",
                (("refused", f"sum(els_model_refused{{{_MODELS}}})"),),
                single=True,
                width=6,
            ),
            Graph(
                "Calls by status",
                "DEADLINE_EXCEEDED and RESOURCE_EXHAUSTED are refusals under load, INTERNAL and "
                "UNAVAILABLE faults; the others are the callers' own.",
                "reqps",
                (("{{code}}", _rate("els_request_seconds_count", "code", _MODELS)),),
                stacked=True,
                width=12,
            ),
            Graph(
                "Share of calls that broke the promise",
                "As recorded for the alerts on the error budget.",
                "percentunit",
                tuple(
                    (f"{{{{job}}}} {window}", f"{error_ratio(window)}{{{NAMESPACE}}}")
                    for window in ("5m", "1h", "6h")
                ),
                width=12,
            ),
            Graph(
                "Time to the last answer, by method",
                "Of calls that ended well. Streams last as long as their callers like.",
                "s",
                (
                    ("{{method}} p50", _quantile(0.5, "els_request_seconds", "method", _ANSWERED)),
                    ("{{method}} p99", _quantile(0.99, "els_request_seconds", "method", _ANSWERED)),
                ),
                width=12,
            ),
            Graph(
                "Questions without an answer, by reason",
                "Refused at the door (rejected), dropped in the queue (expired, cancelled, "
                "evicted), computed for nobody (discarded), failed (faulted, interrupted).",
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
                "Work that waits",
                "Predicted seconds by model, worst replica; at the limit more is refused.",
                "s",
                (
                    ("{{model}}", f"max by (model) (els_queue_cost_seconds{{{_MODELS}}})"),
                    ("limit", f"min(els_queue_limit_seconds{{{PODS}}})"),
                ),
            ),
            Graph(
                "Wait for a batch",
                "Of every question that had to wait.",
                "s",
                (
                    ("{{model}} p50", _quantile(0.5, "els_queue_seconds", "model", _MODELS)),
                    ("{{model}} p99", _quantile(0.99, "els_queue_seconds", "model", _MODELS)),
                ),
            ),
            Graph(
                "Time of a batch",
                "What one launch takes.",
                "s",
                (
                    ("{{model}} p50", _quantile(0.5, "els_compute_seconds", "model", _MODELS)),
                    ("{{model}} p99", _quantile(0.99, "els_compute_seconds", "model", _MODELS)),
                ),
            ),
            Graph(
                "Images in a batch",
                "Mean: it grows with the load, as far as that saves something.",
                "none",
                (("{{model}}", _mean("els_batch_size", "model", _MODELS)),),
            ),
            Graph(
                "Devices at work",
                "Share of the time; near 1 only more replicas help.",
                "percentunit",
                (
                    (
                        "{{pod}} {{device}}",
                        _rate("els_device_busy_seconds_total", "pod, device", PODS),
                    ),
                ),
            ),
            Graph(
                "Time taken over time predicted",
                "Far from 1, refusals for deadlines are wrong: too early above, too late below.",
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
                "Calls under way",
                "A drain ends when there is none.",
                "none",
                (("{{pod}}", _each("els_calls_in_flight", "pod", PODS)),),
            ),
            Graph(
                "Items that wait, trajectories under way",
                "Each trajectory has one item in the queue at most.",
                "none",
                (
                    ("{{pod}} items", _each("els_queue_items", "pod", _MODELS)),
                    ("{{pod}} trajectories", _each("els_trajectories", "pod", PODS)),
                ),
            ),
            Graph(
                "Batch under way without progress",
                "At the watchdog's limit the process ends; a slow batch that goes on is none.",
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
                "Seconds since each replica was told to end, and what it has.",
                "s",
                (
                    ("{{pod}}", f"{_each('els_draining_seconds', 'pod', PODS)} > 0"),
                    ("limit", f"min(els_drain_limit_seconds{{{PODS}}})"),
                ),
            ),
            Graph(
                "Event loop lag",
                "p99, and the latest: every call waits this long before anything is done for it.",
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
                "Of the process: computing on the CPU, and all that gRPC does.",
                "none",
                (("{{pod}}", _rate("process_cpu_seconds_total", "pod", PODS)),),
            ),
            Graph(
                "Memory",
                "Of the process, and of what its models say that they hold.",
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
                "Calls begun, by method",
                "Health and reflection are not counted; refused tokens are.",
                "reqps",
                (("{{grpc_method}}", _rate("grpc_server_started_total", "grpc_method", PODS)),),
            ),
            Graph(
                "Messages",
                "Of streams each message counts.",
                "cps",
                (
                    ("received", f"sum(rate(grpc_server_msg_received_total{{{PODS}}}{_RATE}))"),
                    ("sent", f"sum(rate(grpc_server_msg_sent_total{{{PODS}}}{_RATE}))"),
                ),
            ),
            Graph(
                "Versions",
                "Replicas of each; two during a rollout.",
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
                "Reloaded files that are stale",
                "Since a tokens or TLS file was broken; the content before still counts.",
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
                "Where logs go, there is no room.",
                "none",
                (("{{pod}}", _each("els_log_records_lost_total", "pod", PODS)),),
            ),
        ),
    ),
)
