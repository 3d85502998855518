"""What the measurements of deployments stand on: the name server, and the simulated scaler."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmarks.deploy import names
from benchmarks.deploy.scaler import World, simulate
from benchmarks.deploy.simulate import row, scalers, service_times_s

CALL_S = 0.02
SMALL = World(service_s=[CALL_S], replicas=4, load=0.3, step=4.0, step_at_s=60.0, tick_s=0.2)
BRIEF = replace(SMALL, back_at_s=400.0, end_s=500.0)


def query(name: str, kind: int) -> bytes:
    labels = b"".join(bytes([len(each)]) + each.encode() for each in name.split("."))
    return struct.pack("!6H", 7, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!2H", kind, 1)


def test_a_name_has_the_addresses_that_it_was_given_and_no_other_name_has_any() -> None:
    found = names.answer(query(names.NAME, 1), ("127.0.1.1", "127.0.1.2"))
    assert struct.unpack_from("!6H", found) == (7, 0x8580, 1, 2, 0, 0)
    assert [found[-20:-16], found[-4:]] == [bytes([127, 0, 1, 1]), bytes([127, 0, 1, 2])]
    assert struct.unpack_from("!6H", names.answer(query(names.NAME, 28), ("127.0.1.1",)))[3] == 0
    code = struct.unpack_from("!6H", names.answer(query("other.test", 1), ("127.0.1.1",)))[1]
    assert code & 0xF == 3


def test_without_a_step_nothing_is_refused_and_nothing_is_scaled() -> None:
    trace = simulate(replace(BRIEF, step=1.0))
    assert set(trace.serving) == {4}
    assert trace.refused == 0
    expected = BRIEF.load * BRIEF.replicas / CALL_S * BRIEF.end_s
    assert trace.answered == pytest.approx(expected, rel=0.02)
    assert trace.paid_s == pytest.approx(4 * BRIEF.end_s)


def test_a_scaler_without_effect_leaves_the_excess_to_be_refused() -> None:
    trace = simulate(replace(BRIEF, most=1.0, queue_s=1.0))
    served = BRIEF.replicas / CALL_S * (BRIEF.back_at_s - BRIEF.step_at_s)
    offered = served * BRIEF.load * BRIEF.step
    assert trace.refused == pytest.approx(offered - served, rel=0.1)
    assert max(trace.waiting_s) == pytest.approx(1.0, abs=0.01)


def test_replicas_come_after_the_scrape_the_poll_and_their_start() -> None:
    trace = simulate(BRIEF)
    at_s = np.array(trace.at_s)
    wished = at_s[np.array(trace.wanted) > 4][0]
    served = at_s[np.array(trace.serving) > 4][0]
    assert 60.0 < wished <= 60.0 + BRIEF.scrape_s + BRIEF.poll_s
    assert served - wished == pytest.approx(BRIEF.start_s, abs=2 * BRIEF.tick_s)


@pytest.mark.slow
def test_a_scaler_that_sees_the_busy_share_holds_what_one_that_sees_queues_lets_go() -> None:
    long = replace(BRIEF, back_at_s=1200.0, end_s=1200.0)
    # By the manifest's own numbers: the first sees queues alone, the last is the manifest's.
    first, *_, last = scalers().values()
    queue, busy = (
        row("", each, simulate(each), 0.04)
        for each in (replace(long, **first), replace(long, **last))
    )
    assert {*last} - {*first} == {"busy_target"}
    assert busy["last_above_target_s"] < queue["last_above_target_s"]


def test_service_times_are_read_from_a_record_and_an_unknown_model_is_named(
    tmp_path: Path,
) -> None:
    record = tmp_path / "record.json"
    rows = [{"part": "service time", "model": "m", "quantiles_core_ms": [1.0, 2.0]}]
    record.write_text(json.dumps({"rows": rows}))
    assert service_times_s(record, "m") == [0.001, 0.002]
    with pytest.raises(ValueError, match="expected service times of n"):
        service_times_s(record, "n")
