"""Loads on a real server, and what their reports say of it."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.support.fake_server import FakeDenoiser
from typer.testing import CliRunner

from els_client import InvalidArgumentError, NotFoundError
from els_client.bench import Plan, Report, run, run_all
from els_client.bench._worker import poisson
from els_client.bench.tally import Tally
from els_client.cli import app
from els_proto.denoise.v1 import denoise_pb2 as pb


def plan(target: str, **options: Any) -> Plan:
    defaults: dict[str, Any] = {"warm_up_s": 0.0, "duration_s": 5.0, "steps": 2}
    return Plan(**{"target": target, **defaults, **options})


@pytest.mark.slow
def test_a_closed_loop_asks_every_kind_until_its_count_is_up(
    target: str, fake: FakeDenoiser
) -> None:
    mix = {"denoise": 4.0, "score": 2.0, "sample": 1.0}
    asked = plan(target, callers=4, processes=2, count=101, mix=mix, images=3, priority=1)
    report = run(asked)
    assert (report.total.calls, report.total.ok, report.total.good) == (101, 101, 101)
    assert report.total.errors == {}
    kinds = {kind: outcome.calls for kind, outcome in report.kinds.items()}
    requests = [one for one in fake.requests if not isinstance(one, pb.GetModelRequest)]
    seen = Counter(type(one).__name__.removesuffix("Request").lower() for one in requests)
    assert kinds == seen
    assert kinds["denoise"] > kinds["score"] > kinds["sample"] > 0
    assert 0 < report.seconds_counted < 5
    assert report.throughput_per_s == pytest.approx(101 / report.seconds_counted)
    assert report.images_per_s == pytest.approx(3 * report.throughput_per_s)
    assert sum(second.ok for second in report.series) == 101
    first = requests[0]
    assert isinstance(first, pb.DenoiseRequest | pb.ScoreRequest)
    assert (len(first.level.sigma), first.priority) == (3, 1)
    latency = report.total.latency
    assert 0 < latency.p50_ms <= latency.p90_ms <= latency.p99_ms <= latency.p999_ms
    assert latency.p999_ms <= latency.max_ms * 1.001


@pytest.mark.slow
def test_an_open_loop_counts_the_wait_of_calls_that_a_stall_held_back(target: str) -> None:
    """A server stalls for 0.4 s: of 100 calls a second some 40 wait, all but one for others."""
    report = run(plan(target, model="stalls", rate_per_s=100.0, duration_s=1.0))
    assert report.total.calls == report.total.ok
    assert 60 < report.total.calls < 140
    assert report.total.latency.max_ms > 350
    # 0.3 s of the stall's arrivals waited longer than 0.1 s.
    assert report.total.latency.p90_ms > 100


@pytest.mark.slow
def test_answers_after_their_deadline_are_late_and_not_good(target: str) -> None:
    in_time = plan(target, name="in time", callers=2, count=10, deadline_s=2.0)
    late = replace(in_time, name="late", model="late", deadline_s=0.05)
    lost = replace(late, name="lost", grace_s=0.0)
    in_time_report, late_report, lost_report = run_all([in_time, late, lost])
    assert (in_time_report.total.good, in_time_report.total.late) == (10, 0)
    assert (late_report.total.ok, late_report.total.good, late_report.total.late) == (10, 0, 10)
    assert late_report.goodput_per_s == 0 < late_report.throughput_per_s
    assert 30 < late_report.total.latest_ms < 1000
    assert lost_report.total.errors == {"DEADLINE_EXCEEDED": 10}


@pytest.mark.slow
def test_deadlines_travel_with_their_calls(target: str, fake: FakeDenoiser) -> None:
    mix = {"denoise": 1.0, "sample": 1.0}
    run(plan(target, callers=1, count=10, deadline_s=3.0, grace_s=10.0, mix=mix))
    pairs = zip(fake.requests[1:], fake.remaining_s[1:], strict=True)
    for request, remaining_s in pairs:
        assert remaining_s is not None
        if isinstance(request, pb.DenoiseRequest):
            assert 2 < request.timeout_s <= 3
            assert remaining_s > 10
        else:
            assert remaining_s < 4


@pytest.mark.slow
def test_several_loads_run_at_once_each_with_its_own_token(
    target: str, fake: FakeDenoiser, capfd: pytest.CaptureFixture[str]
) -> None:
    plans = [plan(target, callers=1, count=5, token=f"t0ken-{name}") for name in "ab"]
    reports = run_all(plans)
    assert [report.total.ok for report in reports] == [5, 5]
    tokens = Counter(one["authorization"] for one in fake.metadata)
    assert tokens == {"Bearer t0ken-a": 6, "Bearer t0ken-b": 6}  # Each asks for its model too.
    told = repr(plans) + json.dumps([one.document() for one in reports]) + str(capfd.readouterr())
    assert "t0ken" not in told


@pytest.mark.parametrize(
    ("model", "outcome"),
    [
        ("fashion-els", {"ok": 30, "errors": {}}),
        ("away", {"ok": 0, "errors": {"UNAVAILABLE": 30}}),
    ],
)
@pytest.mark.parametrize("rate", [None, 200.0])
@pytest.mark.slow
def test_streams_answer_question_by_question(
    target: str, fake: FakeDenoiser, model: str, outcome: dict[str, Any], rate: float | None
) -> None:
    load: dict[str, Any] = {"rate_per_s": rate} if rate else {"callers": 6}
    report = run(plan(target, model=model, stream=True, connections=2, count=30, **load))
    assert {"ok": report.total.ok, "errors": report.total.errors} == outcome
    assert fake.calls["stream"] == 2


@pytest.mark.slow
def test_a_stream_that_ends_fails_what_it_held_and_is_opened_anew(
    target: str, fake: FakeDenoiser
) -> None:
    report = run(plan(target, model="drains", stream=True, callers=4, count=40))
    assert report.total.ok + report.total.errors["UNAVAILABLE"] == 40
    assert 2 <= report.total.errors["UNAVAILABLE"] <= 8
    assert fake.calls["stream"] == 3


@pytest.mark.slow
def test_what_is_not_answered_at_the_end_is_counted(target: str) -> None:
    report = run(
        plan(target, model="slow", callers=3, duration_s=0.2, deadline_s=60.0, drain_s=0.1)
    )
    assert report.total.errors == {"UNFINISHED": 3}


def test_a_server_that_cannot_be_asked_is_the_callers_error(target: str) -> None:
    with pytest.raises(NotFoundError):
        run(plan(target, model="missing", callers=1))


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"callers": 1, "rate_per_s": 1.0},
        {"callers": 0},
        {"callers": 1, "processes": 2},
        {"callers": 1, "sigma": (2.0, 1.0)},
        {"callers": 1, "mix": {"dream": 1.0}},
        {"callers": 1, "mix": {"score": 0.0}},
        {"callers": 1, "duration_s": 0.0},
        {"callers": 1, "warm_up_s": -1.0},
        *(
            {"callers": 1, name: value}
            for name in ("deadline_s", "duration_s", "warm_up_s", "grace_s", "drain_s")
            for value in (math.nan, math.inf, -1.0, 366 * 86_400.0)
        ),
    ],
)
def test_a_plan_that_is_no_load_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError):
        Plan(**wrong)


def test_arrivals_are_a_poisson_process_of_their_rate_and_seed() -> None:
    def times(seed: str, count: int | None = None) -> list[float]:
        return list(poisson(50.0, begin=0.0, start=100.0, stop=1000.0, count=count, seed=seed))

    arrivals = times("a")
    assert arrivals == times("a") != times("b")
    assert abs(len(arrivals) - 50_000) < 5 * 50_000**0.5
    gaps = [after - before for before, after in pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance == pytest.approx(mean**2, rel=0.05)  # As of an exponential distribution.
    assert sum(arrival >= 100 for arrival in times("a", count=7)) == 7


def test_warm_up_and_stragglers_count_where_they_belong() -> None:
    tally = Tally(start=10.0, stop=12.0, deadline_s=0.5)
    for intended, end, code in (
        (9.0, 9.5, "OK"),  # In the warm-up alone.
        (9.8, 10.2, "OK"),  # Begun in the warm-up: in the rates alone.
        (10.5, 10.9, "OK"),
        (10.6, 11.9, "OK"),  # Late.
        (11.0, 11.1, "INTERNAL"),
        (11.9, 12.2, "OK"),  # A straggler: in the latencies alone.
    ):
        tally.add("score", intended=intended, sent=intended, end=end, code=code)
    outcome = tally.outcomes["score"]
    assert outcome.codes == {"OK": 3, "INTERNAL": 1}
    assert (outcome.good, outcome.late, round(outcome.latest_s, 3)) == (2, 1, 0.8)
    assert tally.in_window == {"ok": 3, "good": 2}
    seconds = [(n, s["ok"], s["failed"]) for n, s in tally.document()["seconds"]]
    assert seconds == [(0, 2, 0), (1, 1, 1), (2, 1, 0)]


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_a_record_and_a_picture(
    target: str, tmp_path: Path
) -> None:
    record, picture = tmp_path / "load.json", tmp_path / "load.png"
    result = CliRunner().invoke(
        app,
        [
            *("--target", target, "bench", "--callers", "2", "--count", "40", "--warm-up", "0"),
            *("--mix", "denoise=3,score=1", "--sigma", "0.5", "--deadline", "5"),
            *("--json", str(record), "--plot", str(picture)),
        ],
    )
    assert result.exit_code == 0, result.output
    assert all(text in result.stdout for text in ("denoise", "score", "all", "p99.9", "40"))
    document = json.loads(record.read_text())
    assert document["plan"]["sigma"] == [0.5, 0.5]
    assert document["total"]["ok"] == 40
    with Image.open(picture) as image:
        assert image.width > 500


@pytest.mark.parametrize(
    "args",
    [
        *(("--mix", "dream=1"), ("--mix", "7"), ("--sigma", "low")),
        *(("--rate", "1", "--callers", "1"), ("--json", "/no/where"), ("--plot", "/no/where.png")),
    ],
)
def test_a_wrong_load_is_exit_code_two(args: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, ["bench", *args])
    assert result.exit_code == 2
    assert "expected" in result.stderr


@pytest.mark.slow
def test_a_report_is_written_as_it_is_documented(target: str, tmp_path: Path) -> None:
    report = run(plan(target, callers=1, count=1))
    report.write(tmp_path / "report.json")
    assert set(json.loads((tmp_path / "report.json").read_text())) == set(
        Report.__dataclass_fields__
    )
