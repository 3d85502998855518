"""Settings of the server: one frozen object, and the only reader of the environment.

Precedence: command line > ``ELS_…`` variable > YAML file > default.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationInfo,
    field_validator,
)

from els_service.errors import LoadError
from els_service.yaml_files import read_yaml, validate

_SERVICE_LINK = re.compile(r"^(tcp|udp|sctp)://")
"""Value of ELS_PORT that Kubernetes sets for a service named ``els``; ignored."""

_CPU_MAX_V2 = Path("/sys/fs/cgroup/cpu.max")
_CPU_QUOTA_V1 = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_MEMORY_INFO = Path("/proc/meminfo")

_IN_FLIGHT_SHARE = 6
"""The memory limit divided by the default of ``in_flight_bytes``."""
_LEAST_IN_FLIGHT = 4
"""Minimum of ``in_flight_bytes`` in maximum messages: a message of uint8 pixels takes four times
its size as float32."""

_Port = Annotated[int, Field(ge=0, le=65535)]
_Positive = Annotated[int, Field(ge=1)]
# gRPC uses int32 milliseconds.
_Seconds = Annotated[float, Field(ge=0.001, le=2e6)]
_Pause = Annotated[float, Field(ge=0, le=2e6)]


@dataclass(frozen=True)
class Limits:
    """Limits of one request, published in the metadata."""

    max_images: int
    max_steps: int
    max_message_bytes: int
    max_pixels: int
    max_in_flight_bytes: int = 1 << 30
    """Limit of all requests together."""


@dataclass(frozen=True)
class Scheduling:
    """Limits of queues, batches and memory; see ``Settings``."""

    queue_s: float = 30.0
    queue_bytes: int = 1 << 30
    in_flight_bytes: int = 1 << 30
    batch_s: float = 0.25
    starvation_s: float = 1.0
    memory_bytes: int | None = None
    watchdog_s: float = 120.0
    load_s: float = 300.0


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


class Settings(BaseModel):
    """All settings of ``els-server run``."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    models: Path | None = None
    """Folder of models; None for the bundled ones."""
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to bind; TLS or ``insecure`` is required beyond loopback. ``unix:PATH`` binds a Unix
    socket, protected by file permissions."""
    port: _Port = 50051
    """Port of gRPC; 0 means any free port, as for the other ports."""
    metrics_port: _Port = 9090
    """Port of /metrics, /healthz and /readyz over HTTP."""
    metrics_host: Annotated[str, Field(min_length=1)] | None = None
    """Address of the HTTP endpoints; None for ``host`` if that is loopback, otherwise 127.0.0.1."""
    health_port: _Port | None = None
    """Port of a plaintext health service, for probes without TLS; None for none. ``port`` has the
    health service, too."""
    http_port: _Port | None = None
    """Port of the Open Inference Protocol over REST, of JSON with PNG, and of the live page, at the
    address and with the TLS and tokens of ``port``; None for none. Needs the extra web."""
    http_page: Literal["off", "read", "draw"] = "read"
    """Live page at the HTTP port: read shows models, queues and latency; draw also offers to draw,
    denoise and remix, for callers who may; off for none."""
    insecure: bool = False
    """Bind beyond loopback without TLS, such as behind a proxy that encrypts and authenticates."""
    tls_certificate: Path | None = None
    """PEM file of the server's certificate chain; reloaded when it changes."""
    tls_key: Path | None = None
    """PEM file of the certificate's private key, unencrypted."""
    tls_client_ca: Path | None = None
    """PEM file of certificate authorities; enables mutual TLS, so that clients need a
    certificate."""
    tokens: Path | None = None
    """YAML file of bearer token hashes; callers then need a token. Reloaded when it changes."""
    reflection: bool = True
    """Whether gRPC server reflection is enabled."""
    channelz: bool = False
    """Whether channelz is enabled; calls need the role admin."""
    keepalive_s: _Seconds = 60.0
    """Seconds without traffic after which a connection is pinged."""
    keepalive_timeout_s: _Seconds = 20.0
    """Seconds after which an unanswered ping closes the connection."""
    client_ping_s: _Seconds = 5.0
    """Minimum seconds between pings of a client, with or without calls; more frequent ones close
    the connection."""
    handshake_s: _Seconds = 20.0
    """Seconds within which a new connection must complete its HTTP/2 handshake."""
    receive_s: _Seconds = 60.0
    """Seconds within which the message of a unary call must arrive; streams are not limited."""
    max_connection_idle_s: _Seconds = 900.0
    """Seconds without calls after which a connection is closed."""
    max_connection_age_s: _Seconds = 1800.0
    """Maximum age of a connection in seconds; an older one gets GOAWAY, so that clients
    rebalance."""
    max_connection_age_grace_s: _Seconds = 900.0
    """Seconds for calls in flight to finish on a connection past its maximum age."""
    max_concurrent_streams: _Positive = 1024
    """Maximum concurrent calls on one connection; clients queue further ones."""
    health_watchers: _Positive = 2048
    """Maximum health watchers at each port; beyond it a new one is RESOURCE_EXHAUSTED, or replaces
    one of the connection with the most."""
    health_watchers_per_connection: _Positive = 256
    """Maximum health watchers on one connection, which callers behind a proxy may share."""
    max_connections: _Positive = 4096
    """Maximum connections; further ones are closed."""
    compression: bool = True
    """Whether gzip-compressed messages are accepted; otherwise such calls are UNIMPLEMENTED."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the models; auto means all GPUs, or the CPU if there are none."""
    threads: _Positive | None = None
    """Threads of one computation; None for the CPU limit of the container or machine."""
    engine: Literal["torch", "openvino", "onnxruntime", "compile", "auto"] = "torch"
    """Execution engine of trained networks whose model.yaml names none; auto times torch,
    OpenVINO and onnxruntime when a model is loaded. ONNX graphs have onnxruntime in place of torch
    and compile."""
    engine_precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of trained networks whose model.yaml names none."""
    engine_fallback: bool = True
    """Whether an engine or precision that the machine lacks is replaced, with the reason in the log
    and in the model's description; otherwise the model is rejected."""
    ray_address: Annotated[str, Field(pattern=r"^(auto|local|[^/:]+:\d+)$")] = "auto"
    """Ray cluster of banks in shards with ``engine: ray``: HOST:PORT; auto means the one that this
    machine belongs to, or else one of this machine; local always means the latter."""
    shard_stall_s: Annotated[float, Field(gt=0)] = 10.0
    """Seconds without progress of a shard after which its process is ended and started again."""
    shard_restart_s: _Pause = 30.0
    """Seconds that a call waits for a lost shard to come back; then it ends in UNAVAILABLE."""
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = (
        "info"
    )
    """Minimum level of log records."""
    traces: Annotated[str, Field(pattern=r"^https?://[^/:]+")] | None = None
    """OTLP/gRPC endpoint of the trace collector; None disables tracing."""
    traces_ratio: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Fraction of calls that are traced, unless the caller's trace context decides."""
    drain_s: _Pause = 30.0
    """Seconds for work in flight to finish after SIGTERM; the rest is UNAVAILABLE."""
    grace_s: _Pause = 1.0
    """Seconds for which new calls are accepted after SIGTERM, so that load balancers can react."""
    queue_s: Annotated[float, Field(gt=0)] = 30.0
    """Maximum predicted seconds of work queued for one model, including a step of each of its
    trajectories; more is RESOURCE_EXHAUSTED. Under contention callers get equal shares."""
    queue_bytes: _Positive = 1 << 30
    """Maximum bytes of pixels and conditions queued for one model, shared in the same way. Limits
    the part of ``in_flight_bytes`` that one model can use."""
    batch_s: Annotated[float, Field(gt=0)] = 0.25
    """Maximum predicted seconds of one batch, shorter if the overhead of a batch is small; a single
    image may take longer."""
    starvation_s: Annotated[float, Field(gt=0)] = 1.0
    """Maximum seconds between batches of a priority level with queued work: prevents starvation."""
    memory_bytes: _Positive | None = None
    """Memory budget of loaded models in bytes; beyond it the least recently used one is unloaded,
    and reloaded on demand."""
    watchdog_s: Annotated[float, Field(gt=0)] = 120.0
    """Seconds without progress of a batch after which the device counts as hung and the server
    exits (code 3). On a CPU progress is a tile or CPU time of the worker; on a GPU a batch may also
    take ten times its prediction."""
    load_s: _Seconds = 300.0
    """Maximum seconds to load a model; beyond it the model is rejected, and the others are
    served."""
    max_images: _Positive = 256
    """Maximum images of one call."""
    max_steps: _Positive = 1000
    """Maximum steps of one trajectory."""
    max_message_bytes: Annotated[int, Field(ge=1 << 16, lt=1 << 31)] = 64 << 20
    """Maximum bytes of a message, in either direction."""
    max_pixels: _Positive = 1 << 24
    """Maximum B·C·H·W of one call."""
    in_flight_bytes: _Positive | None = None
    """Maximum bytes of messages being received, parsed, queued and computed, and of trajectories,
    for all models and callers together; at least four times ``max_message_bytes``. None for a
    sixth of the memory limit of the container or machine, or that minimum if larger. Under
    contention callers get equal shares."""

    @field_validator("in_flight_bytes")
    @classmethod
    def _holds_large_messages(cls, value: int | None, info: ValidationInfo) -> int | None:
        most = info.data.get("max_message_bytes")
        if value is not None and most is not None and value < _LEAST_IN_FLIGHT * most:
            least = _LEAST_IN_FLIGHT * most
            raise ValueError(f"expected at least 4 times max_message_bytes, which is {least}")
        return value

    @property
    def limits(self) -> Limits:
        """Limits of one request."""
        return Limits(
            self.max_images,
            self.max_steps,
            self.max_message_bytes,
            self.max_pixels,
            self._in_flight_limit(),
        )

    @property
    def scheduling(self) -> Scheduling:
        """Limits of the scheduler."""
        values = {field.name: getattr(self, field.name) for field in fields(Scheduling)}
        return Scheduling(**{**values, "in_flight_bytes": self._in_flight_limit()})

    def _in_flight_limit(self) -> int:
        if self.in_flight_bytes is not None:
            return self.in_flight_bytes
        return max(memory_limit() // _IN_FLIGHT_SHARE, _LEAST_IN_FLIGHT * self.max_message_bytes)


_SETTINGS = TypeAdapter(Settings)


def load_settings(config: Path | None = None, **flags: Any) -> Settings:
    """Return the settings.

    Args:
        config: YAML file; None for the file named by ``ELS_CONFIG``, if set.
        flags: settings by name; None where a flag was not given.

    Raises:
        LoadError: The file cannot be read, or settings are unknown or invalid; names each.
    """
    path = config or (Path(name) if (name := os.environ.get("ELS_CONFIG")) else None)
    content = read_yaml(path) if path else None
    if not isinstance(content, dict | None):
        raise LoadError(path, f"expected settings by name, got {type(content).__name__}")
    given = {name: value for name, value in flags.items() if value is not None}
    sources = {str(path): content or {}, "ELS_… variables": _environment(), "flags": given}
    merged = {name: value for source in sources.values() for name, value in source.items()}
    named = ", ".join(name for name, source in sources.items() if source)
    return validate(_SETTINGS, merged, f"settings from {named}")


def _environment() -> dict[str, str]:
    """Return the settings of known ``ELS_…`` variables; others are ignored."""
    variables = {name: os.environ.get(f"ELS_{name.upper()}") for name in Settings.model_fields}
    return {
        name: value for name, value in variables.items() if value and not _SERVICE_LINK.match(value)
    }


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Return the sorted names of unknown ``ELS_…`` variables, which may be misspelt.

    Includes those in lower case, which are never read.
    """
    known = {"ELS_CONFIG", *(f"ELS_{name.upper()}" for name in Settings.model_fields)}
    ours = {name for name in environment if name.upper().startswith("ELS_")}
    return sorted(ours - known)


def cpu_limit() -> int:
    """Return the number of CPUs of this process by cgroup quota and affinity, at least 1."""
    available = len(os.sched_getaffinity(0))
    for path, parse in ((_CPU_MAX_V2, _quota_v2), (_CPU_QUOTA_V1, _quota_v1)):
        if path.is_file() and (quota := parse(path)) is not None:
            return max(1, min(available, math.ceil(quota)))
    return available


def _quota_v2(path: Path) -> float | None:
    quota, period = path.read_text().split()
    return None if quota == "max" else int(quota) / int(period)


def _quota_v1(path: Path) -> float | None:
    quota = int(path.read_text())
    period = int(path.with_name("cpu.cfs_period_us").read_text())
    return None if quota < 0 else quota / period


def memory_limit() -> int:
    """Return the memory limit of this process in bytes: the minimum of its cgroups and the machine.

    Limits of parent cgroups are included.
    """
    limits = [int(path.read_text()) for path in _memory_limits() if _is_number(path)]
    total = re.search(r"^MemTotal:\s+(\d+) kB", _MEMORY_INFO.read_text(), re.MULTILINE)
    if total is None:
        raise LoadError(_MEMORY_INFO, "expected MemTotal, got none")
    return min([*limits, int(total[1]) << 10])


def _memory_limits() -> Iterator[Path]:
    """Yield the files of memory limits, cgroup v2 and v1, from the process's own to the root."""
    # In a container its cgroup may be mounted as the root, although the path differs.
    lines = _OWN_CGROUPS.read_text().splitlines() if _OWN_CGROUPS.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if not controllers:
            mount, name = _CGROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = _CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        own = mount / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(mount):
                yield folder / name


def _is_number(path: Path) -> bool:
    """Return whether a file has a number: cgroup v2 has ``max`` without a limit."""
    return path.is_file() and path.read_text().strip().isdecimal()
