"""A device's watchdog ends what stands still, and not what is slow."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable

import pytest
import torch

from els_kernels import ComputationStoppedError, Control, checkpoint
from els_service.engine.device import DeviceLostError, WorkerDevice

WATCHDOG_S = 0.2
WAIT_S = 30


@pytest.fixture
async def cpu() -> AsyncIterator[WorkerDevice]:
    device = WorkerDevice("cpu")
    yield device
    device.close()


def for_seconds(seconds: float, step: Callable[[], object]) -> Callable[[], str]:
    """Return work that takes a step again and again, for so long."""

    def work() -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            step()
        return "done"

    return work


def a_tile_now_and_then() -> None:
    checkpoint()
    threading.Event().wait(WATCHDOG_S / 4)


@pytest.mark.slow
async def test_slow_work_that_goes_on_is_not_ended_by_its_tiles(cpu: WorkerDevice) -> None:
    work = for_seconds(4 * WATCHDOG_S, a_tile_now_and_then)
    assert (await cpu.run(work, WATCHDOG_S)).value == "done"


async def test_slow_work_without_tiles_is_not_ended_while_it_computes(cpu: WorkerDevice) -> None:
    square = torch.ones(64, 64)
    work = for_seconds(4 * WATCHDOG_S, lambda: square @ square)
    assert (await cpu.run(work, WATCHDOG_S)).value == "done"


async def test_work_that_sleeps_is_ended_and_told_so() -> None:
    device, go = WorkerDevice("cpu"), threading.Event()
    hangs = device.run(lambda: go.wait(WAIT_S), WATCHDOG_S)
    with pytest.raises(DeviceLostError, match=r"cpu hangs: .* made no progress for 0\.2 s"):
        await asyncio.wait_for(hangs, WAIT_S)
    with pytest.raises(DeviceLostError, match="cpu hangs"):
        await device.run(lambda: "done", WATCHDOG_S)
    go.set()
    device.close()


@pytest.mark.slow
async def test_work_that_wakes_up_now_and_then_for_nothing_is_ended() -> None:
    device, go = WorkerDevice("cpu"), threading.Event()
    began = time.monotonic()

    def polls() -> None:
        while not go.wait(0.5):
            pass

    with pytest.raises(DeviceLostError, match="cpu hangs"):
        await asyncio.wait_for(device.run(polls, 1.0), WAIT_S)
    assert time.monotonic() - began < 10
    go.set()
    device.close()


@pytest.mark.slow
async def test_an_endless_loop_without_tiles_is_ended_after_ten_times_its_limit() -> None:
    device, go = WorkerDevice("cpu"), threading.Event()
    began = time.monotonic()

    def loops() -> None:
        while not go.is_set():
            pass

    with pytest.raises(DeviceLostError, match="CPU time without a tile"):
        await asyncio.wait_for(device.run(loops, 0.05), WAIT_S)
    assert time.monotonic() - began >= 10 * 0.05
    go.set()
    device.close()


@pytest.mark.slow
async def test_time_in_which_nothing_ran_is_not_held_against_the_work(cpu: WorkerDevice) -> None:
    entered, go = threading.Event(), threading.Event()

    def work() -> bool:
        entered.set()
        return go.wait(WAIT_S)

    running = cpu.run(work, WATCHDOG_S)
    assert entered.wait(WAIT_S)
    time.sleep(4 * WATCHDOG_S)  # as SIGSTOP or a frozen container does to the loop
    # The watchdog is late, and is the first to be called.
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    go.set()
    assert (await running).value


async def test_other_devices_are_judged_by_time_alone() -> None:
    device = WorkerDevice("other")
    work = for_seconds(WAIT_S, a_tile_now_and_then)
    control = Control()
    with pytest.raises(DeviceLostError, match=r"not done after 0\.4 s"):
        await asyncio.wait_for(
            device.run(work, WATCHDOG_S, predicted_s=WATCHDOG_S / 10, control=control), WAIT_S
        )
    control.stop()
    device.close()


async def test_stopped_work_says_so_and_the_next_is_done(cpu: WorkerDevice) -> None:
    control = Control()
    stopped = cpu.run(for_seconds(WAIT_S, checkpoint), WAIT_S, control=control)
    while not control.progress:
        await asyncio.sleep(0)
    after = cpu.run(lambda: "done", WAIT_S)
    control.stop()
    with pytest.raises(ComputationStoppedError):
        await asyncio.wait_for(stopped, WAIT_S)
    assert (await after).value == "done"


@pytest.mark.slow
async def test_stalled_seconds_grow_while_nothing_happens_and_are_none_while_idle(
    cpu: WorkerDevice,
) -> None:
    go = threading.Event()
    assert cpu.stalled_s == 0
    running = cpu.run(lambda: go.wait(WAIT_S), 4.0)
    async with asyncio.timeout(WAIT_S):
        while cpu.stalled_s < 0.5:
            await asyncio.sleep(0.01)
    assert cpu.running_s >= cpu.stalled_s
    go.set()
    await running
    assert cpu.stalled_s == 0


async def test_a_driver_error_that_triton_meets_first_is_a_lost_device(cpu: WorkerDevice) -> None:
    def launch() -> None:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    with pytest.raises(DeviceLostError, match="cpu is broken: Triton Error"):
        await cpu.run(launch, WAIT_S)


async def test_a_launch_without_memory_fails_alone(cpu: WorkerDevice) -> None:
    def launch() -> None:
        raise RuntimeError("Triton Error [CUDA]: out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        await cpu.run(launch, WAIT_S)
    assert (await cpu.run(lambda: "done", WAIT_S)).value == "done"
