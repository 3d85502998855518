"""Admission: callers share the room of a queue and of memory, whatever one of them sends."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.engine.conftest import SHAPE, query
from tests.engine.simulation import SimulatedDenoiser, World, simulate
from tests.support.examples import examples

from els_service.config import Scheduling
from els_service.denoisers.noise import seeded_noise
from els_service.denoisers.samplers import SAMPLERS, Options, Resume, Step
from els_service.engine.budget import Budget
from els_service.engine.loaded_model import LoadedModel
from els_service.engine.request_context import RequestContext
from els_service.engine.reservations import NamedBudget
from els_service.engine.sampling import SamplingRun
from els_service.errors import QueueFullError

IMAGE_S = 0.02
SAMPLE_BYTES = 144
"""That a trajectory of one image holds."""


def served(scheduling: Scheduling, estimate_s: float = IMAGE_S) -> World:
    """Return a world with a model of 20 ms an image."""
    world = World(scheduling)
    world.serve("model", SimulatedDenoiser(world.device, IMAGE_S, estimate_s=estimate_s))
    return world


def lane_of(world: World) -> LoadedModel:
    loaded = world.engine.models.find("model").loaded
    assert loaded is not None
    return loaded


def run_of(steps: int, seed: int = 0, count: int = 1, resume: Resume | None = None) -> SamplingRun:
    return SamplingRun(
        SAMPLERS["ddim"](seeded_noise(seed, count, SHAPE), Options(steps=steps), resume),
        np.full(count, -1),
        np.zeros(count, np.int64),
        steps,
    )


async def drawn(world: World, run: SamplingRun, taken: list[Step], caller: str = "") -> None:
    """Append the steps of a trajectory to ``taken``."""
    async for step in world.engine.sample("model", run, RequestContext(caller=caller)):
        taken.append(step)


@pytest.mark.parametrize("images", [1, 8])
@pytest.mark.parametrize("priority", [1, 3])
def test_a_caller_within_its_share_is_not_rejected_beside_one_who_keeps_the_queue_full(
    priority: int, images: int
) -> None:
    async def main() -> None:
        world = served(Scheduling(queue_s=2.0))
        for _ in range(4):
            await world.ask(0)
        outcomes: Counter[str] = Counter()
        ended = asyncio.Event()

        async def flood() -> None:
            while not ended.is_set():
                try:
                    await world.ask(*range(16), caller="a", priority=3)
                    outcomes["answered"] += 1
                except QueueFullError as error:
                    outcomes["evicted" if "evicted from" in str(error) else "rejected"] += 1
                    await asyncio.sleep(error.retry_after_s or 0)

        floods = [asyncio.ensure_future(flood()) for _ in range(20)]
        await asyncio.sleep(1.0)
        held = lane_of(world).seconds.budget
        for _ in range(60):
            assert held.held_by("a") > held.capacity / 2
            await world.ask(*range(images), caller="b", priority=priority)
        ended.set()
        await asyncio.gather(*floods)
        assert outcomes["answered"] > 10
        assert outcomes["rejected"] > 10
        assert outcomes["evicted"] or images == 1  # a single image finds room by chance
        assert world.is_idle()

    simulate(main())


def test_an_eviction_names_the_shares_and_a_retry_delay() -> None:
    async def main() -> None:
        world = served(Scheduling(queue_s=0.2))
        asked = [asyncio.ensure_future(world.ask(i, caller="a")) for i in range(11)]
        await asyncio.sleep(0)
        other = asyncio.ensure_future(world.ask(99, caller="b"))
        told = (
            r"the queue of model: its caller held 0\.2 s of the 0\.2 s allowed, and other callers"
        )
        with pytest.raises(QueueFullError, match=told) as evicted:
            await asked[-1]  # the newest
        assert evicted.value.retry_after_s == pytest.approx(0.1)
        assert world.observed.reasons == ["evicted"]
        await asyncio.gather(other, *asked[:-1])
        assert world.is_idle()

    simulate(main())


def test_samples_of_one_caller_do_not_close_the_door_for_another() -> None:
    async def main() -> None:
        world = served(Scheduling(queue_s=2.0))
        for _ in range(4):
            await world.ask(0)
        taken: list[list[Step]] = [[] for _ in range(140)]
        samples = [
            asyncio.ensure_future(drawn(world, run_of(10, i), steps, "a"))
            for i, steps in enumerate(taken)
        ]
        await asyncio.sleep(0.5)
        loaded = lane_of(world)
        assert loaded.waiting_s <= 2.0 + 1e-6
        for i in range(20):
            await world.ask(i, caller="b")
        more: list[Step] = []
        await drawn(world, run_of(10, 7), more, "b")
        ends = await asyncio.gather(*samples, return_exceptions=True)
        refused = [end for end in ends if end is not None]
        assert 40 <= len(refused) < 50
        assert all(isinstance(end, QueueFullError) for end in refused)
        assert len(more) == 10
        assert world.is_idle()

    simulate(main())


def test_trajectories_give_way_when_others_need_memory_and_are_resumed_with_the_same_bits() -> None:
    async def main() -> None:
        world = served(Scheduling(in_flight_bytes=4 * SAMPLE_BYTES))
        alone: list[Step] = []
        await drawn(world, run_of(20, 3), alone, "a")
        taken: list[list[Step]] = [[] for _ in range(4)]
        samples = [
            asyncio.ensure_future(drawn(world, run_of(20, i), steps, "a"))
            for i, steps in enumerate(taken)
        ]
        await asyncio.sleep(0.5)
        other: list[Step] = []
        await drawn(world, run_of(3, 9), other, "b")
        assert len(other) == 3
        told = "the memory for requests in flight: its caller held 576 bytes of the 576 bytes"
        with pytest.raises(QueueFullError, match=told):
            await samples[3]
        await asyncio.gather(*samples[:3])
        last = taken[3][-1]
        assert 0 < last.index < 20
        rest: list[Step] = []
        await drawn(world, run_of(20, 3, resume=Resume(last.index, last.state)), rest, "a")
        whole = taken[3] + rest
        assert [step.index for step in whole] == list(range(1, 21))
        assert all(torch.equal(one.x, two.x) for one, two in zip(whole, alone, strict=True))
        assert world.is_idle()

    simulate(main())


@dataclass(frozen=True)
class Act:
    """What one caller asks, when, and whether it is a trajectory."""

    after_s: float
    images: int
    caller: str
    priority: int
    sample: bool
    leaves_s: float


ACTS = st.lists(
    st.builds(
        Act,
        after_s=st.sampled_from([0.0, 0.0, 0.0, 0.01, 0.1, 1.0]),
        images=st.integers(1, 6),
        caller=st.sampled_from("aaabc"),
        priority=st.integers(1, 3),
        sample=st.booleans(),
        leaves_s=st.sampled_from([1e6, 1e6, 1e6, 0.02, 0.3]),
    ),
    max_size=24,
)


@pytest.mark.slow
@examples(150)
@given(
    acts=ACTS,
    estimate=st.sampled_from([0.1, 1.0, 10.0]),
    queue_bytes=st.sampled_from([100, 1 << 20]),
    queue_s=st.sampled_from([0.1, 0.3]),
)
def test_nobody_within_its_share_is_rejected_and_no_room_overflows(
    acts: list[Act], estimate: float, queue_bytes: int, queue_s: float
) -> None:
    simulate(_shares_hold(acts, estimate, Scheduling(queue_s=queue_s, queue_bytes=queue_bytes)))


async def _shares_hold(acts: list[Act], estimate: float, scheduling: Scheduling) -> None:
    world = served(scheduling, estimate * IMAGE_S)
    loaded = lane_of(world)

    async def caller(act: Act) -> None:
        numbers = list(range(act.images))
        context = RequestContext(caller=act.caller, priority=act.priority)
        wanted = loaded.costs.marginal(estimate * IMAGE_S * act.images)
        before = _shares(loaded.budgets, act.caller, (wanted, query(*numbers).nbytes))
        try:
            if act.sample:
                run = run_of(3, count=act.images)
                async for _ in world.engine.sample("model", run, context):
                    _check_bounds(loaded.budgets)
            else:
                await world.ask(*numbers, caller=act.caller, priority=act.priority)
        except QueueFullError as error:
            if "is full" in str(error):
                # A trajectory is admitted by seconds alone.
                assert any(before[:1] if act.sample else before)
            else:
                assert act.caller in crowding
        finally:
            _check_bounds(loaded.budgets)

    # Whose holdings are evicted holds more than its share just before.
    crowding: set[str] = set()
    for room in loaded.budgets:
        _watch_evictions(room.budget, crowding)
    calls = []
    for act in acts:
        if act.after_s:
            await asyncio.sleep(act.after_s)
        call = asyncio.ensure_future(caller(act))
        asyncio.get_running_loop().call_later(act.leaves_s, call.cancel)
        calls.append(call)
        await asyncio.sleep(0)
        _check_bounds(loaded.budgets)
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        assert outcome is None or isinstance(outcome, asyncio.CancelledError), outcome
    await asyncio.sleep(10)  # those who left may have left a batch that is being computed
    assert world.is_idle()


def _shares(rooms: Sequence[NamedBudget], caller: str, wanted: Sequence[float]) -> list[bool]:
    """Return of each room whether a caller who gets what it wants has more than its share."""
    more = []
    for room, amount in zip(rooms, wanted, strict=True):
        budget = room.budget
        callers = budget.callers + (budget.held_by(caller) == 0)
        more.append(budget.held_by(caller) + amount > budget.capacity / callers - 1e-9)
    return more


def _check_bounds(rooms: Sequence[NamedBudget]) -> None:
    for room in rooms:
        budget = room.budget
        assert budget.used <= budget.capacity + 1e-6 or len(_holdings(budget)) == 1


def _holdings(budget: Budget) -> list[object]:
    return [each for account in budget._accounts.values() for each in account.holdings]


def _watch_evictions(budget: Budget, evicted: set[str]) -> None:
    """Note whose holdings are evicted, and see that it has more than its share."""
    evict = budget._evict_newest

    def watched(account: Any) -> None:
        (name,) = (name for name, each in budget._accounts.items() if each is account)
        assert budget.held_by(name) > budget.capacity / (budget.callers + 1) - 1e-9
        evicted.add(name)
        evict(account)

    # mypy does not allow the assignment of methods; the budget lives for one test only.
    budget._evict_newest = watched  # type: ignore[method-assign]
