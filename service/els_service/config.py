"""The server's settings: one frozen object, and the only reader of the environment.

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
"""What Kubernetes puts into ELS_PORT where a service is called ``els``: no setting of ours."""

_CPU_MAX_V2 = Path("/sys/fs/cgroup/cpu.max")
_CPU_QUOTA_V1 = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_MEMORY_INFO = Path("/proc/meminfo")

_LEAST_IN_FLIGHT = 4
"""Largest messages that may be in flight at least: one alone takes four times its size as float32,
if its pixels are bytes."""

_Port = Annotated[int, Field(ge=0, le=65535)]
_Positive = Annotated[int, Field(ge=1)]
# gRPC counts in int32 milliseconds.
_Seconds = Annotated[float, Field(ge=0.001, le=2e6)]
_Pause = Annotated[float, Field(ge=0, le=2e6)]


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; published in the metadata."""

    max_images: int
    max_steps: int
    max_message_bytes: int
    max_pixels: int
    max_in_flight_bytes: int = 1 << 30
    """Of all requests together."""


@dataclass(frozen=True)
class Scheduling:
    """Bounds of queues, batches and memory; see ``Settings``."""

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
    """Everything that ``els-server run`` can be told."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    models: Path | None = None
    """Folder of models; None for the bundled ones."""
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen at; beyond loopback TLS is needed, or ``insecure``. Or ``unix:PATH``, a
    socket that its file's permissions guard."""
    port: _Port = 50051
    """Port of gRPC; 0 takes any that is free, here and below."""
    metrics_port: _Port = 9090
    """Port of /metrics, /healthz and /readyz over HTTP."""
    metrics_host: Annotated[str, Field(min_length=1)] | None = None
    """Address of these, plain HTTP; None for ``host`` where that is loopback, else 127.0.0.1."""
    health_port: _Port | None = None
    """Port that answers health checks alone, in plain text, for probes that speak no TLS; None for
    none. Health is answered at ``port``, too."""
    insecure: bool = False
    """Listen beyond loopback without TLS: something in front encrypts and authenticates."""
    tls_certificate: Path | None = None
    """PEM file of the server's certificate and its chain; read anew when it changes."""
    tls_key: Path | None = None
    """PEM file of its private key, not encrypted."""
    tls_client_ca: Path | None = None
    """PEM file of authorities; clients must then show a certificate of one of them."""
    tokens: Path | None = None
    """File of bearer tokens' hashes; callers must then show a token. Read anew when it changes."""
    reflection: bool = True
    """Whether the contract can be asked of the server."""
    channelz: bool = False
    """Whether gRPC's own view of connections can be asked; needs the role admin."""
    keepalive_s: _Seconds = 60.0
    """A connection silent for this long is pinged."""
    keepalive_timeout_s: _Seconds = 20.0
    """A ping not answered for this long closes the connection."""
    client_ping_s: _Seconds = 5.0
    """How often a client may ping, in calls and between them; one in more haste is sent away."""
    handshake_s: _Seconds = 20.0
    """A connection that has not begun to speak HTTP/2 by then is closed."""
    receive_s: _Seconds = 60.0
    """How long the message of a call may take to arrive; those of a stream may take any time."""
    max_connection_idle_s: _Seconds = 900.0
    """A connection without calls for this long is closed."""
    max_connection_age_s: _Seconds = 1800.0
    """An older connection takes no new calls (GOAWAY), so that clients spread over servers."""
    max_connection_age_grace_s: _Seconds = 900.0
    """How long calls may go on on a connection that is too old."""
    max_concurrent_streams: _Positive = 1024
    """Calls at once on one connection; a client keeps further ones back."""
    health_watchers: _Positive = 2048
    """Watchers of the health at each port; beyond it a new one is RESOURCE_EXHAUSTED, or takes the
    place of one of the connection that has the most."""
    health_watchers_per_connection: _Positive = 256
    """Watchers of the health on one connection, which all callers behind a proxy may share."""
    max_connections: _Positive = 4096
    """Connections at once; a further one is closed."""
    compression: bool = True
    """Whether messages may come compressed with gzip; else such calls are UNIMPLEMENTED."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models compute; auto takes every GPU there is, else the CPU."""
    threads: _Positive | None = None
    """Threads of one computation; None for the CPU limit of the container or machine."""
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = (
        "info"
    )
    """What is logged: records of this level and above."""
    traces: Annotated[str, Field(pattern=r"^https?://[^/:]+")] | None = None
    """OTLP collector that speaks gRPC and takes the traces; None for none."""
    traces_ratio: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of the calls that are traced, where the caller has not decided."""
    drain_s: _Pause = 30.0
    """How long work in flight may take to finish after SIGTERM; then it is told UNAVAILABLE."""
    grace_s: _Pause = 1.0
    """How long new calls are taken after SIGTERM, so that balancers have time to look elsewhere."""
    queue_s: Annotated[float, Field(gt=0)] = 30.0
    """Work that may wait for one model, in predicted seconds, and a step of each of its
    trajectories; more is RESOURCE_EXHAUSTED. Where it is scarce callers get even shares."""
    queue_bytes: _Positive = 1 << 30
    """Pixels and conditions of requests that may wait for one model, in bytes, likewise shared.
    Beside ``in_flight_bytes``, so that one model cannot take all of that."""
    batch_s: Annotated[float, Field(gt=0)] = 0.25
    """Predicted time of one batch at most, shorter where launches cost little; a single image may
    take longer."""
    starvation_s: Annotated[float, Field(gt=0)] = 1.0
    """A priority level with work is served at least this often, whatever waits before it."""
    memory_bytes: _Positive | None = None
    """Budget for loaded models; beyond it the one asked longest ago is unloaded meanwhile."""
    watchdog_s: Annotated[float, Field(gt=0)] = 120.0
    """A batch without progress for this long means a hung device: the server ends. On a CPU
    progress is a tile or CPU time of the worker; a GPU's batch is done ten times its prediction
    later at the latest."""
    load_s: _Seconds = 300.0
    """How long a model may take to load; then it is refused, and the others are served."""
    max_images: _Positive = 256
    """Images in one call."""
    max_steps: _Positive = 1000
    """Steps of one trajectory."""
    max_message_bytes: Annotated[int, Field(ge=1 << 16, lt=1 << 31)] = 64 << 20
    """Size of a message in either direction."""
    max_pixels: _Positive = 1 << 24
    """B·C·H·W of one call."""
    in_flight_bytes: _Positive | None = None
    """Bytes of messages being received, parsed, queued and computed and of trajectories, of all
    models and callers together; None for a quarter of the memory limit of the container or
    machine, but four times ``max_message_bytes`` at least, which is the least it may be. Where it
    is scarce callers get even shares."""

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
        """The limits of one request."""
        return Limits(
            self.max_images,
            self.max_steps,
            self.max_message_bytes,
            self.max_pixels,
            self._in_flight_limit(),
        )

    @property
    def scheduling(self) -> Scheduling:
        """The bounds of the engine."""
        values = {field.name: getattr(self, field.name) for field in fields(Scheduling)}
        return Scheduling(**{**values, "in_flight_bytes": self._in_flight_limit()})

    def _in_flight_limit(self) -> int:
        if self.in_flight_bytes is not None:
            return self.in_flight_bytes
        return max(memory_limit() // 4, _LEAST_IN_FLIGHT * self.max_message_bytes)


_SETTINGS = TypeAdapter(Settings)


def load_settings(config: Path | None = None, **flags: Any) -> Settings:
    """Return the settings.

    Args:
        config: YAML file; None for the one that ``ELS_CONFIG`` names, if any.
        flags: settings by name; None where a flag was not given.

    Raises:
        LoadError: The file cannot be read, or a setting is unknown or illegal; each is named.
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
    """Return the settings that ``ELS_…`` variables name; others are not ours to judge."""
    variables = {name: os.environ.get(f"ELS_{name.upper()}") for name in Settings.model_fields}
    return {
        name: value for name, value in variables.items() if value and not _SERVICE_LINK.match(value)
    }


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Return the names of ``ELS_…`` variables that are no setting, sorted; misspelt, perhaps.

    Those in small letters, too, which nobody reads.
    """
    known = {"ELS_CONFIG", *(f"ELS_{name.upper()}" for name in Settings.model_fields)}
    ours = {name for name in environment if name.upper().startswith("ELS_")}
    return sorted(ours - known)


def cpu_limit() -> int:
    """Return how many CPUs this process may keep busy: cgroup quota and affinity, at least 1."""
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
    """Return how many bytes this process may use: the least limit of its cgroups and the machine.

    Limits of the cgroups above its own hold, too.
    """
    limits = [int(path.read_text()) for path in _memory_limits() if _is_number(path)]
    total = re.search(r"^MemTotal:\s+(\d+) kB", _MEMORY_INFO.read_text(), re.MULTILINE)
    if total is None:
        raise LoadError(_MEMORY_INFO, "expected MemTotal, got none")
    return min([*limits, int(total[1]) << 10])


def _memory_limits() -> Iterator[Path]:
    """Yield the files of limits of memory, cgroup v2 and v1, from the process's own up."""
    # Within a container its cgroup may be mounted as the root, whatever the path says.
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
    """Return whether a file holds a number: cgroup v2 says ``max`` where there is no limit."""
    return path.is_file() and path.read_text().strip().isdecimal()
