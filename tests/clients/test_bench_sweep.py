"""Sweeps of the request rate: ceiling, wait for admission, gain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from els_client import InvalidArgumentError, UnavailableError
from els_client.bench import Plan, Report, Sweep, run, sweep
from els_client.bench.report import summed
from els_client.bench.sweep import served_per_s
from els_client.bench.tally import Tally
from els_client.cli import app


def load(calls: list[tuple[float, float, float]], **options: Any) -> Report:
    """Return the report of samples of (scheduled, first message, end), in seconds."""
    plan = Plan(warm_up_s=0, duration_s=2.0, **options)
    tally = Tally(start=0.0, stop=2.0, deadline_s=None)
    for intended, first, end in calls:
        tally.add("sample", intended=intended, sent=intended, end=end, code="OK", first=first)
    return summed(plan, [tally.document() | {"busy_share": 0.1}], "now")


def of_seconds(first: float, last: float, count: int, **options: Any) -> Report:
    return load([(0.0, first, last)] * count, **options)


@pytest.mark.slow
def test_ceiling_and_gain_are_of_successful_calls_and_admission_is_beyond_one_caller() -> None:
    serial = of_seconds(0.1, 0.4, 4, callers=1)
    closed = of_seconds(0.3, 0.9, 10, callers=8)
    calm, full = (
        of_seconds(first, 1.0, 12, rate_per_s=rate) for first, rate in ((0.05, 3), (0.6, 9))
    )
    swept = Sweep(serial=serial, closed=closed, points=[calm, full])
    assert (swept.ceiling_per_s, swept.gain) == (6.0, 3.0)
    assert swept.admission_ms(calm) == (0.0, 0.0)
    assert swept.admission_ms(full) == pytest.approx((500, 500), rel=0.01)
    document = swept.document()
    assert [row["rate_per_s"] for row in document["rates"]] == [3, 9]
    assert document["rates"][1]["p99_ms"] == pytest.approx(1000, rel=0.01)
    assert document["first_alone_p50_ms"] == pytest.approx(100, rel=0.01)


def test_responses_after_the_end_of_an_overload_count_over_the_time_that_they_took() -> None:
    report = of_seconds(0.1, 0.4, 4, callers=1)
    overload = load([(0.0, 1.0, 6.5 + 0.1 * n) for n in range(4)], rate_per_s=2)
    swept = Sweep(serial=report, closed=report, points=[overload])
    assert overload.throughput_per_s == 0
    assert served_per_s(overload) == swept.document()["rates"][0]["served_per_s"] == 4 / 7


@pytest.mark.slow
def test_a_generator_that_lags_or_uses_its_core_is_named() -> None:
    report = of_seconds(0.1, 0.4, 4, callers=1)
    swept = Sweep(serial=report, closed=report, points=[])
    assert swept.generator_kept_up(report)
    for share, lag in ((0.95, 0.0), (0.1, 0.1)):
        tally = Tally(start=0.0, stop=2.0, deadline_s=None)
        tally.add("sample", intended=0.0, sent=lag, end=0.4, code="OK")
        busy = summed(Plan(callers=1), [tally.document() | {"busy_share": share}], "now")
        assert not swept.generator_kept_up(busy)


@pytest.mark.slow
def test_the_first_message_of_a_sample_comes_before_its_last(target: str) -> None:
    options: dict[str, Any] = {"warm_up_s": 0.0, "duration_s": 5.0, "callers": 1, "count": 5}
    report = run(Plan(target=target, mix={"sample": 1.0}, steps=20, **options))
    total = report.total
    assert total.ok == 5
    assert 0 < total.first.p50_ms < total.latency.p50_ms
    answered = run(Plan(target=target, **options)).total
    assert answered.first == answered.latency


def test_wrong_rates_and_a_server_that_never_answers_are_refused(target: str) -> None:
    plan = Plan(target=target, callers=2, warm_up_s=0, duration_s=0.1)
    for rates in ([0.0], [float("inf")], [1.0] * 51):
        with pytest.raises(InvalidArgumentError, match="rates: expected at most 50 rates"):
            sweep(plan, rates)
    with pytest.raises(InvalidArgumentError, match="callers: expected a number"):
        sweep(Plan(target=target, rate_per_s=1.0))
    with pytest.raises(UnavailableError, match="serial: expected a successful response"):
        sweep(Plan(target=target, model="broken", callers=2, warm_up_s=0, duration_s=0.1))


@pytest.mark.slow
def test_the_command_sweeps_and_writes_a_record_and_a_picture(target: str, tmp_path: Path) -> None:
    record, picture = tmp_path / "sweep.json", tmp_path / "sweep.png"
    shared = ("--target", target, "bench", "--mix", "sample=1", "--steps", "2")
    loads = ("--sweep", "20,40", "--callers", "4", "--warm-up", "0", "--duration", "0.5")
    files = ("--json", str(record), "--plot", str(picture))
    result = CliRunner().invoke(app, [*shared, *loads, *files])
    assert result.exit_code == 0, result.output
    assert all(text in result.stdout for text in ("ceiling: ", "gain: ", "admission", "20", "40"))
    document = json.loads(record.read_text())
    assert [row["rate_per_s"] for row in document["rates"]] == [20, 40]
    assert document["ceiling_per_s"] >= document["closed"]["throughput_per_s"] > 0
    with Image.open(picture) as image:
        assert image.width > 500


@pytest.mark.parametrize("args", [("--sweep", "fast"), ("--sweep", "auto", "--rate", "3")])
def test_a_wrong_sweep_is_exit_code_two(args: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, ["bench", *args])
    assert result.exit_code == 2
    assert "expected" in result.stderr


@pytest.mark.parametrize(
    ("option", "name", "expected"),
    [
        ("--plot", "load.xyz", "expected a name of a picture"),
        ("--plot", "load", "expected a name of a picture"),
        ("--plot", "folder.png", "expected a file, got a folder"),
        ("--json", "folder.png", "expected a file, got a folder"),
        ("--json", "absent/load.json", "expected an existing folder"),
    ],
)
@pytest.mark.slow
def test_a_file_that_cannot_be_written_is_rejected_before_the_load(
    tmp_path: Path, option: str, name: str, expected: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    # No server is there: a load would fail with another text.
    target = "127.0.0.1:9"
    command = ["bench", "--target", target, option, str(tmp_path / name)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert expected in result.stderr.replace("\n", " ")
