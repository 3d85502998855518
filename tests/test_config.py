"""Settings: flag over variable over file over default; what is wrong is named."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from els_service import config
from els_service.config import Settings, cpu_limit, load_settings, memory_limit
from els_service.errors import LoadError

VALUES: dict[str, tuple[Any, Any, Any]] = {
    "models": (Path("/a"), Path("/b"), Path("/c")),
    "host": ("10.0.0.1", "10.0.0.2", "::1"),
    "port": (1, 2, 0),
    "metrics_port": (1, 2, 0),
    "health_port": (1, 2, 0),
    "http_port": (1, 2, 0),
    "http_page": ("draw", "off", "draw"),
    "metrics_host": ("10.0.0.1", "10.0.0.2", "::1"),
    "insecure": (True, True, True),
    "tls_certificate": (Path("/a"), Path("/b"), Path("/c")),
    "tls_key": (Path("/a"), Path("/b"), Path("/c")),
    "tls_client_ca": (Path("/a"), Path("/b"), Path("/c")),
    "tokens": (Path("/a"), Path("/b"), Path("/c")),
    "reflection": (False, False, False),
    "channelz": (True, True, True),
    "keepalive_s": (0.5, 1.5, 2.5),
    "keepalive_timeout_s": (0.5, 1.5, 2.5),
    "client_ping_s": (0.5, 1.5, 2.5),
    "handshake_s": (0.5, 1.5, 2.5),
    "receive_s": (0.5, 1.5, 2.5),
    "max_connection_idle_s": (0.5, 1.5, 2.5),
    "max_connection_age_s": (0.5, 1.5, 2.5),
    "max_connection_age_grace_s": (0.5, 1.5, 2.5),
    "max_concurrent_streams": (1, 2, 3),
    "max_connections": (1, 2, 3),
    "compression": (False, False, False),
    "health_watchers": (1, 2, 3),
    "health_watchers_per_connection": (1, 2, 3),
    "device": ("cpu", "cuda", "auto"),
    "threads": (1, 2, 3),
    "engine": ("auto", "openvino", "onnxruntime"),
    "engine_precision": ("bfloat16", "bfloat16", "bfloat16"),
    "engine_fallback": (False, False, False),
    "ray_address": ("local", "head:6379", "10.0.0.1:6379"),
    "shard_stall_s": (0.5, 1.5, 9.0),
    "shard_restart_s": (0.5, 1.5, 0.0),
    "log_level": ("debug", "warning", "error"),
    "traces": ("http://a:4317", "https://b:4317", "http://[::1]:4317"),
    "traces_ratio": (0.5, 1.0, 0.0),
    "drain_s": (0.5, 1.5, 0.0),
    "grace_s": (0.5, 1.5, 0.0),
    "queue_s": (0.5, 1.5, 9.0),
    "queue_bytes": (1, 2, 3),
    "batch_s": (0.5, 1.5, 9.0),
    "starvation_s": (0.5, 1.5, 9.0),
    "memory_bytes": (1, 2, 3),
    "watchdog_s": (0.5, 1.5, 9.0),
    "load_s": (0.5, 1.5, 9.0),
    "max_images": (1, 2, 3),
    "max_steps": (1, 2, 3),
    "max_message_bytes": (1 << 16, 1 << 17, 1 << 18),
    "max_pixels": (1, 2, 3),
    "in_flight_bytes": (1 << 28, 1 << 29, 1 << 30),
}
"""Of every setting three values that are not its default: for file, variable and flag."""


@pytest.fixture(autouse=True)
def _no_settings_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("ELS_")]:
        monkeypatch.delenv(name)


def written(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_every_setting_is_tested_here() -> None:
    assert set(VALUES) == set(Settings.model_fields)


def test_defaults_are_what_the_documentation_says() -> None:
    settings = load_settings()
    assert (settings.host, settings.port, settings.metrics_port) == ("127.0.0.1", 50051, 9090)
    assert (settings.models, settings.device, settings.threads) == (None, "auto", None)
    limits = settings.limits
    assert (limits.max_images, limits.max_steps) == (256, 1000)
    assert limits.max_message_bytes == 64 << 20


@pytest.mark.parametrize("name", VALUES)
def test_a_flag_outranks_a_variable_and_that_the_file_and_that_the_default(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = getattr(load_settings(), name)
    in_file, in_variable, in_flag = VALUES[name]
    plain = str(in_file) if isinstance(in_file, Path) else in_file
    path = written(tmp_path, {name: plain})
    found = [default, getattr(load_settings(path), name)]
    monkeypatch.setenv(f"ELS_{name.upper()}", str(in_variable))
    found.append(getattr(load_settings(path), name))
    found.append(getattr(load_settings(path, **{name: in_flag}), name))
    found.append(getattr(load_settings(path, **{name: None}), name))
    assert found == [default, in_file, in_variable, in_flag, in_variable]


def test_a_variable_names_the_file_unless_a_flag_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.setenv("ELS_CONFIG", str(written(tmp_path, {"port": 1})))
    assert load_settings().port == 1
    assert load_settings(written(tmp_path / "other", {"port": 2})).port == 2


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}"])
def test_an_empty_file_says_nothing(tmp_path: Path, text: str) -> None:
    assert load_settings(written(tmp_path, text)) == load_settings()


def test_variables_that_are_no_settings_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_settings()
    for name in ("ELS_SERVICE_HOST", "ELS_PORT_50051_TCP_ADDR", "ELS_NONSENSE", "ELS_LIMITS"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("els_port", "7")
    assert load_settings() == before


@pytest.mark.parametrize("name", ["ELS_PORT", "ELS_METRICS_PORT"])
@pytest.mark.parametrize("scheme", ["tcp", "udp", "sctp"])
def test_what_kubernetes_calls_a_port_is_ignored(
    monkeypatch: pytest.MonkeyPatch, name: str, scheme: str
) -> None:
    monkeypatch.setenv(name, f"{scheme}://10.96.0.7:50051")
    assert load_settings() == Settings()


@pytest.mark.parametrize(
    ("content", "faults"),
    [
        ({"prot": 1}, ["prot: extra inputs are not permitted"]),
        ({"port": 65536}, ["port: input should be less than or equal to 65535, got 65536"]),
        ({"port": -1}, ["port: "]),
        ({"port": "many"}, ["port: ", "got 'many'"]),
        ({"threads": 0}, ["threads: "]),
        ({"device": "abacus"}, ["device: input should be 'auto', 'cpu' or 'cuda'"]),
        ({"log_level": "loud"}, ["log_level: "]),
        ({"drain_s": -1}, ["drain_s: "]),
        ({"drain_s": float("inf"), "grace_s": float("inf")}, ["drain_s: ", "grace_s: "]),
        ({"traces": "http://:4317"}, ["traces: "]),
        ({"max_images": 0}, ["max_images: "]),
        ({"max_pixels": 0}, ["max_pixels: "]),
        ({"keepalive_s": 0}, ["keepalive_s: "]),
        ({"max_connection_age_s": 1e9}, ["max_connection_age_s: "]),
        ({"insecure": "perhaps"}, ["insecure: "]),
        ({"max_message_bytes": 1}, ["max_message_bytes: "]),
        ({"prot": 1, "port": "x", "threads": 0}, ["prot: ", "port: ", "threads: "]),
        ([1, 2], ["expected settings by name, got list"]),
        ("port: {", ["expected YAML"]),
        ("1: 2", ["1: "]),
    ],
)
def test_a_file_that_is_wrong_is_named_with_every_fault(
    tmp_path: Path, content: object, faults: list[str]
) -> None:
    path = written(tmp_path, content)
    with pytest.raises(LoadError) as caught:
        load_settings(path)
    assert str(path) in str(caught.value)
    for fault in faults:
        assert fault in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"none\.yaml: expected a readable file"):
        load_settings(tmp_path / "none.yaml")


def test_a_variable_that_is_wrong_is_not_blamed_on_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELS_PORT", "many")
    with pytest.raises(LoadError, match=r"settings from ELS_… variables: port: .* got 'many'"):
        load_settings()


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings().port = 1


@pytest.mark.parametrize(
    ("v2", "v1", "expected"),
    [
        (None, None, 8),
        ("max 100000", None, 8),
        ("200000 100000", None, 2),
        ("150000 100000", None, 2),
        ("50000 100000", None, 1),
        ("9900000 100000", None, 8),
        (None, (-1, 100000), 8),
        (None, (300000, 100000), 3),
        ("max 100000", (300000, 100000), 3),
        ("200000 100000", (300000, 100000), 2),
    ],
)
def test_the_cpu_limit_is_the_cgroup_s_quota_rounded_up_within_the_affinity(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    v2: str | None,
    v1: tuple[int, int] | None,
    expected: int,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(config, "_CPU_MAX_V2", tmp_path / "cpu.max")
    monkeypatch.setattr(config, "_CPU_QUOTA_V1", tmp_path / "cpu.cfs_quota_us")
    if v2 is not None:
        (tmp_path / "cpu.max").write_text(v2 + "\n")
    if v1 is not None:
        (tmp_path / "cpu.cfs_quota_us").write_text(f"{v1[0]}\n")
        (tmp_path / "cpu.cfs_period_us").write_text(f"{v1[1]}\n")
    assert cpu_limit() == expected


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        ("0::/", {}, 8 << 30),
        ("0::/", {"memory.max": "max"}, 8 << 30),
        ("0::/", {"memory.max": "2147483648"}, 2 << 30),
        ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": "1000000"}, 1_000_000),
        ("0::/a/b", {"a/b/memory.max": "1000000", "a/memory.max": "max"}, 1_000_000),
        ("0::/elsewhere", {"memory.max": "1000000"}, 1_000_000),
        ("0::/a", {"b/memory.max": "1000000"}, 8 << 30),
        ("4:cpu,memory:/a", {"memory/a/memory.limit_in_bytes": "1000000"}, 1_000_000),
        ("4:memory:/a", {"memory/memory.limit_in_bytes": "9223372036854771712"}, 8 << 30),
    ],
)
def test_the_memory_limit_is_the_least_of_the_machine_s_and_the_own_cgroups(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own: str,
    limits: dict[str, str],
    expected: int,
) -> None:
    cgroups, info, mine = tmp_path / "cgroup", tmp_path / "meminfo", tmp_path / "own"
    monkeypatch.setattr(config, "_CGROUPS", cgroups)
    monkeypatch.setattr(config, "_MEMORY_INFO", info)
    monkeypatch.setattr(config, "_OWN_CGROUPS", mine)
    info.write_text("MemTotal:        8388608 kB\nMemFree:         10 kB\n")
    mine.write_text(own + "\n")
    for name, limit in limits.items():
        (cgroups / name).parent.mkdir(parents=True, exist_ok=True)
        (cgroups / name).write_text(limit + "\n")
    assert memory_limit() == expected


@pytest.mark.parametrize(("limit", "expected"), [(6 << 30, 1 << 30), (1 << 20, 256 << 20)])
def test_requests_in_flight_may_take_a_sixth_of_the_memory_and_always_four_large_messages(
    monkeypatch: pytest.MonkeyPatch, limit: int, expected: int
) -> None:
    monkeypatch.setattr(config, "memory_limit", lambda: limit)
    settings = load_settings()
    assert settings.scheduling.in_flight_bytes == expected
    assert settings.limits.max_in_flight_bytes == expected


def test_fewer_bytes_in_flight_than_four_large_messages_are_refused() -> None:
    assert load_settings(in_flight_bytes=256 << 20).scheduling.in_flight_bytes == 1 << 28
    with pytest.raises(LoadError, match=r"in_flight_bytes.*at least 4 times max_message_bytes"):
        load_settings(in_flight_bytes=(256 << 20) - 1)
