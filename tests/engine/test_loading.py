"""A model that loads slowly, hangs or cannot be read in time keeps no other from being served."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.engine.conftest import WAIT_S, Observed
from tests.repository.malformed import ALIASES
from tests.support.models_folder import DOCUMENTS, write_models

from els_service.config import Scheduling
from els_service.denoisers import mixed_banks
from els_service.engine.engine import Engine
from els_service.engine.loading import Loader
from els_service.errors import LoadError
from els_service.repository import ModelRepository, bank_cache

GOOD = ("ideal", "zeros")
HOSTILE = {
    "a-kind": f"{ALIASES}kind: *a11\n",
    "a-list": f"{ALIASES}kind: wiener\nbank: x\n",
    "a-merge": "a: &a {<<: *a}\nkind: wiener\n",
    "a-tag": f"kind: [{', '.join(['*t'] * 3000)}]\nt: &t {'x' * 60_000}\n",
    "a-text": f"t: &t {'x' * 60_000}\nkind: [{', '.join(['*t'] * 3000)}]\n",
}


@pytest.fixture
def hang() -> Iterator[threading.Event]:
    """What a load waits for that hangs; it goes on after the test, so that its thread ends."""
    event = threading.Event()
    yield event
    event.set()


def models(folder: Path, *bad: str) -> Path:
    return write_models(folder / "models", {name: DOCUMENTS[name] for name in (*GOOD, *bad)})


async def test_good_models_are_served_within_seconds_beside_documents_without_end(
    engine: Engine, tmp_path: Path
) -> None:
    documents = {**HOSTILE, **{name: DOCUMENTS[name] for name in GOOD}}
    root = write_models(tmp_path / "models", documents)
    await asyncio.wait_for(engine.models.load_all(ModelRepository(root)), 10)
    assert [entry.model for entry in engine.models.newest()] == list(GOOD)
    assert engine.models.faults.keys() == HOSTILE.keys()
    for fault in engine.models.faults.values():
        assert len(str(fault)) < 5000
        assert (fault.__cause__, fault.__context__, fault.__traceback__) == (None, None, None)


@pytest.mark.slow
async def test_models_are_served_while_one_hangs_which_is_refused_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hang: threading.Event
) -> None:
    engine = Engine(Observed(), Scheduling(load_s=2.0))
    engine.models._loader.slow_s = 0.2
    repository = ModelRepository(models(tmp_path, "circular"))
    load, served = repository.load, asyncio.Event()
    loop = asyncio.get_running_loop()

    def loaded(name: str, *rest: Any) -> Any:
        if name == "circular":
            hang.wait(WAIT_S)
        elif name == "zeros":
            loop.call_soon_threadsafe(served.set)
        return load(name, *rest)

    monkeypatch.setattr(repository, "load", loaded)
    try:
        loading = asyncio.ensure_future(engine.models.load_all(repository))
        await asyncio.wait_for(served.wait(), WAIT_S)
        assert not loading.done()
        assert {s.model: s.state for s in await engine.models.index()}["circular"] == "LOADING"
        await asyncio.wait_for(loading, WAIT_S)
        assert [entry.model for entry in engine.models.newest()] == list(GOOD)
        assert "expected to be loaded within 2 s" in str(engine.models.faults["circular"])
        threads = threading.active_count()
        for _ in range(3):
            with pytest.raises(LoadError, match="expected an earlier load to end, but it hangs"):
                await engine.models.load("circular")
        assert threading.active_count() <= threads
        await asyncio.wait_for(engine.models.load("zeros"), WAIT_S)
        hang.set()
        while "circular" in engine.models._loader._abandoned:
            await asyncio.sleep(0.001)
        await engine.models.load("circular")
    finally:
        engine.close()


async def test_a_caller_that_leaves_a_load_that_hangs_keeps_no_other_from_loading(
    hang: threading.Event,
) -> None:
    loader = Loader(WAIT_S)
    left = asyncio.ensure_future(loader.run("a", lambda: hang.wait(WAIT_S)))
    await asyncio.sleep(0)
    left.cancel()
    assert await asyncio.wait_for(loader.run("b", lambda: 1), WAIT_S) == 1
    loader.close()


async def test_loads_run_one_at_a_time_in_one_thread_in_their_order() -> None:
    loader = Loader(WAIT_S)
    seen: list[tuple[int, threading.Thread]] = []

    def load(number: int) -> int:
        seen.append((number, threading.current_thread()))
        return number

    async def run(number: int) -> int:
        return await loader.run("a", lambda: load(number))

    assert await asyncio.gather(*map(run, range(10))) == list(range(10))
    assert [number for number, _ in seen] == list(range(10))
    assert len({thread for _, thread in seen}) == 1
    loader.close()
    assert not seen[0][1].is_alive()


async def test_a_load_that_would_end_the_process_is_refused_and_ends_nothing() -> None:
    loader = Loader(WAIT_S)

    def ends() -> None:
        raise SystemExit(3)

    with pytest.raises(LoadError, match=r"a: ends in SystemExit\(3\)"):
        await loader.run("a", ends)
    assert await loader.run("a", lambda: 1) == 1
    loader.close()


async def test_an_engine_closes_while_a_load_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hang: threading.Event
) -> None:
    engine = Engine(Observed(), Scheduling(load_s=0.1))
    repository = ModelRepository(models(tmp_path))
    monkeypatch.setattr(repository, "load", lambda *_: hang.wait(WAIT_S))
    await engine.models.load_all(repository)
    assert not engine.models.newest()
    begin = time.monotonic()
    engine.close()
    assert time.monotonic() - begin < 4


def test_a_bank_is_read_once_however_many_threads_load_models_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = ModelRepository(models(tmp_path, "circular", "wiener"))
    reads = []

    def read(path: Path) -> mixed_banks.AnyBank:
        reads.append(path)
        time.sleep(0.05)  # long enough for the others to come
        return mixed_banks.load_any_bank(path)

    monkeypatch.setattr(bank_cache, "load_any_bank", read)
    names = (*GOOD, "circular", "wiener")
    kept: list[Any] = []
    threads = [
        threading.Thread(target=lambda name=name: kept.append(repository.load(name)))
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert (len(reads), len(kept)) == (1, len(names))
