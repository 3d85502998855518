from __future__ import annotations

from els_service.server.security.rejection_pace import AT_ONCE, DELAY_S, RejectionPace


def test_rejections_wait_once_there_are_many_in_a_second() -> None:
    now = 100.0
    pace = RejectionPace(lambda: now)
    assert {pace.delay_s() for _ in range(AT_ONCE)} == {0.0}
    now += 0.9
    assert pace.delay_s() == DELAY_S
    now += 0.1
    assert pace.delay_s() == 0.0
