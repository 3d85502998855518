"""Models come, change and go while they are asked."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.conftest import Observed, Recorder, ask, held, turns, values
from tests.support.models_folder import DOCUMENTS, write_models

from els_service.config import Scheduling
from els_service.denoisers.base import Denoised, Denoiser, DenoiserInfo, Query, make_query
from els_service.denoisers.levels import from_sigma
from els_service.engine.engine import Engine
from els_service.errors import (
    DeadlineExceededError,
    LoadError,
    NotFoundError,
    QueueFullError,
    UnavailableError,
)
from els_service.repository import ModelRepository, folders
from els_service.repository import repository as repository_module

GAUSSIAN = "kind: gaussian\nshape: [1, 2, 2]\nmean: {mean}\nvariance: 0\n"


def write(root: Path, name: str, mean: float, version: str = "") -> None:
    folder = root / name / version
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.yaml").write_text(GAUSSIAN.format(mean=mean))


async def mean(engine: Engine, name: str, version: str = "") -> float:
    """Return what a Gaussian without variance answers: its mean."""
    x = np.zeros((1, 1, 2, 2), np.float32)
    answer = engine.denoise(engine.models.find(name, version), make_query(x, from_sigma([1.0])))
    answer = answer if isinstance(answer, Denoised) else await answer
    return float(answer.pixels[0, 0, 0, 0])


async def test_good_models_are_served_and_bad_ones_are_explained(
    engine: Engine, tmp_path: Path
) -> None:
    root = write_models(tmp_path / "models", {**DOCUMENTS, "bad": "kind: magic\n", "worse": "["})
    await engine.models.load_all(ModelRepository(root))
    assert [served.model for served in engine.models.newest()] == sorted(DOCUMENTS)
    assert {name: error.path for name, error in engine.models.faults.items()} == {
        name: str(root / name / "model.yaml") for name in ("bad", "worse")
    }
    assert "zeros" in engine.models
    assert "bad" not in engine.models
    with pytest.raises(NotFoundError, match="bad failed to load"):
        engine.models.find("bad")
    states = {state.model: state for state in await engine.models.index()}
    assert states["zeros"].state == "READY"
    assert states["bad"].state == "UNAVAILABLE"
    assert "magic" in states["bad"].reason


async def test_a_model_that_fails_at_its_first_question_does_not_take_the_others_along(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_models(tmp_path / "models", {name: DOCUMENTS[name] for name in ("ideal", "zeros")})
    repository = ModelRepository(root)
    broken = Recorder(1e-6)
    broken.fails_on = {0.0}
    load = repository.load
    monkeypatch.setattr(
        repository, "load", lambda name, *rest: broken if name == "ideal" else load(name, *rest)
    )
    await engine.models.load_all(repository)
    assert [served.model for served in engine.models.newest()] == ["zeros"]
    assert "failed its warm-up" in str(engine.models.faults["ideal"])


async def test_a_device_that_breaks_at_a_first_question_ends_the_engine(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Poisoned(Recorder):
        def denoise(self, query: Query) -> Denoised:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    write(tmp_path, "a", 0.0)
    repository = ModelRepository(tmp_path)
    monkeypatch.setattr(repository, "load", lambda *_: Poisoned())
    await engine.models.load_all(repository)
    assert "illegal memory access" in str(engine.models.faults["a"])
    assert "cpu is broken" in await asyncio.wait_for(engine.lost, 30)


async def test_a_model_asked_for_while_others_are_loaded_is_unavailable_then_not_found(
    engine: Engine,
) -> None:
    with pytest.raises(UnavailableError, match="still being loaded"):
        engine.models.find("zeros")
    engine.models.starting = False
    with pytest.raises(NotFoundError, match="expected one of none, got 'zeros'"):
        engine.models.find("zeros")


async def test_the_newest_version_answers_unless_another_is_named(
    engine: Engine, tmp_path: Path
) -> None:
    for version, value in (("2", 2.0), ("10", 10.0)):
        write(tmp_path, "model", value, version)
    await engine.models.load_all(ModelRepository(tmp_path))
    assert await mean(engine, "model") == 10
    assert await mean(engine, "model", "2") == 2
    for wrong in ("1", "two", "-2", "²"):
        with pytest.raises(NotFoundError, match="version of model: expected 2, 10, got"):
            engine.models.find("model", wrong)


async def test_a_reload_takes_effect_between_two_queries_and_what_was_asked_is_answered(
    engine: Engine, tmp_path: Path
) -> None:
    write(tmp_path, "model", 1.0)
    await engine.models.load_all(ModelRepository(tmp_path))
    old = engine.models.find("model").loaded
    write(tmp_path, "model", 5.0)
    assert await mean(engine, "model") == 1
    await engine.models.load("model")
    assert await mean(engine, "model") == 5
    assert engine.models.find("model").loaded is not old


async def refused_reload(engine: Engine, folder: Path) -> None:
    """Load a model that answers 1, then one in its place that is refused."""
    write(folder, "model", 1.0)
    await engine.models.load_all(ModelRepository(folder))
    (folder / "model" / "model.yaml").write_text("kind: magic\n")
    with pytest.raises(LoadError, match="magic"):
        await engine.models.load("model")


async def test_a_reload_that_fails_leaves_the_old_model_serving(
    engine: Engine, tmp_path: Path
) -> None:
    await refused_reload(engine, tmp_path)
    assert await mean(engine, "model") == 1
    assert [state.state for state in await engine.models.index()] == ["READY"]
    assert engine.models.refused() == {"model": True}
    write(tmp_path, "model", 3.0)
    await engine.models.load("model")
    assert engine.models.refused() == {"model": False}


async def test_who_unloads_a_model_that_was_refused_hears_no_more_of_it(
    engine: Engine, tmp_path: Path
) -> None:
    await refused_reload(engine, tmp_path)
    engine.models.unload("model")
    assert engine.models.refused() == {}


async def test_what_an_unloaded_model_was_asked_before_it_still_answers(engine: Engine) -> None:
    recorder = Recorder()
    first = await held(engine, recorder)
    waiting = ask(engine, 1)
    await turns()
    engine.models.unload("model")
    engine.models.starting = False
    with pytest.raises(NotFoundError, match="model is unloaded"):
        await ask(engine, 2)
    with pytest.raises(NotFoundError):
        engine.models.unload("model")
    recorder.go.set()
    assert values(await waiting) == [2]
    await first


async def test_what_is_looked_into_grows_with_the_models_not_with_their_square(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = 40
    for i in range(models):
        write(tmp_path, f"model-{i}", float(i))
    looks: list[Path] = []
    look = folders.versions

    def counted(folder: Path) -> list[tuple[int, Path]]:
        looks.append(folder)
        return look(folder)

    for module in (folders, repository_module):
        monkeypatch.setattr(module, "versions", counted)
    await engine.models.load_all(ModelRepository(tmp_path))
    assert len(engine.models.newest()) == models
    assert len(looks) <= 4 * models
    looks.clear()
    await engine.models.load("model-7")
    assert set(looks) == {tmp_path / "model-7"}


async def test_the_index_does_not_wait_for_a_load(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "model", 0.0)
    repository = ModelRepository(tmp_path)
    begun, go, load = threading.Event(), threading.Event(), repository.load

    def slow(*arguments: Any) -> Denoiser:
        begun.set()
        go.wait()
        return load(*arguments)

    monkeypatch.setattr(repository, "load", slow)
    loading = asyncio.ensure_future(engine.models.load_all(repository))
    try:
        assert await asyncio.to_thread(begun.wait, 30)
        states = await asyncio.wait_for(engine.models.index(), 30)
        assert [(state.model, state.state) for state in states] == [("model", "LOADING")]
    finally:
        go.set()
        await loading


async def test_a_model_that_goes_while_the_root_is_read_is_passed_over(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "there", 0.0)
    repository = ModelRepository(tmp_path)
    monkeypatch.setattr(repository, "names", lambda: ["gone", "there"])
    await engine.models.load_all(repository)
    assert [served.model for served in engine.models.newest()] == ["there"]


async def test_a_made_up_name_is_not_found_while_its_load_looks_for_it(
    engine: Engine, tmp_path: Path
) -> None:
    write(tmp_path, "model", 1.0)
    await engine.models.load_all(ModelRepository(tmp_path))
    looking = asyncio.ensure_future(engine.models.load("made-up"))
    await asyncio.sleep(0)  # it has begun
    with pytest.raises(NotFoundError, match="made-up"):
        engine.models.find("made-up")
    with pytest.raises(NotFoundError):
        await looking


async def test_an_unknown_model_cannot_be_loaded(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    write(tmp_path, "outside", 1.0)
    await engine.models.load_all(ModelRepository(tmp_path / "models"))
    for name in ("nothing", "../outside", "", "/"):
        with pytest.raises(NotFoundError, match="the repository has no"):
            await engine.models.load(name)


async def test_names_that_callers_make_up_leave_nothing_while_the_root_cannot_be_read(
    engine: Engine, tmp_path: Path
) -> None:
    root = tmp_path / "models"
    write(root, "served", 1.0)
    (root / "bad").mkdir()
    (root / "bad" / "model.yaml").write_text("kind: magic\n")
    await engine.models.load_all(ModelRepository(root))
    root.rename(tmp_path / "elsewhere")
    for name in ("made-up", "served", "bad"):
        with pytest.raises(LoadError, match="expected a folder of models that can be read"):
            await engine.models.load(name)
    assert engine.models.refused() == {"served": True, "bad": True}


async def test_a_refused_model_whose_folder_is_removed_counts_as_refused_no_more(
    engine: Engine, tmp_path: Path
) -> None:
    await refused_reload(engine, tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model.yaml").write_text("kind: magic\n")
    with pytest.raises(LoadError):
        await engine.models.load("bad")
    for name in ("bad", "model"):
        shutil.rmtree(tmp_path / name)
        with pytest.raises(NotFoundError, match="the repository has no"):
            await engine.models.load(name)
    assert engine.models.refused() == {"model": False}
    with pytest.raises(NotFoundError, match="expected one of model, got 'bad'"):
        engine.models.find("bad")


class Heavy(Recorder):
    """Takes a hundred bytes."""

    @property
    def info(self) -> DenoiserInfo:
        return DenoiserInfo(kind="heavy", shape=(1, 2, 3), has_log_evidence=True, memory_bytes=100)


async def test_over_the_memory_budget_the_model_asked_longest_ago_sleeps_until_it_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(Observed(), Scheduling(memory_bytes=250))
    for name in "abc":
        write(tmp_path, name, 0.0)
    repository = ModelRepository(tmp_path)
    loads: list[str] = []

    def load(name: str, *_: object) -> Heavy:
        loads.append(name)
        return Heavy()

    monkeypatch.setattr(repository, "load", load)
    try:
        await engine.models.load_all(repository)
        assert engine.models.memory() == {"b": 100, "c": 100}
        for name in "ba":
            assert values(await ask(engine, 1, model=name)) == [2]
        assert engine.models.memory() == {"a": 100, "b": 100}
        assert loads == ["a", "b", "c", "a"]
        # Asleep it is still listed, described and ready.
        index = {state.model: state for state in await engine.models.index()}
        assert index["c"].state == "READY"
        assert "until it is used" in index["c"].reason
        assert engine.models.find("c").info.kind == "heavy"
        several = await asyncio.gather(*(ask(engine, i, model="c") for i in range(5)))
        assert [values(answer) for answer in several] == [[2 * i] for i in range(5)]
        assert loads == ["a", "b", "c", "a", "c"]
    finally:
        engine.close()


async def test_who_cannot_wait_for_a_sleeping_model_or_is_one_too_many_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(Observed(), Scheduling(memory_bytes=150, in_flight_bytes=60))
    for name in "ab":
        write(tmp_path, name, 0.0)
    repository = ModelRepository(tmp_path)
    go = asyncio.Event()
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(repository, "load", lambda *_: Heavy())
    try:
        await engine.models.load_all(repository)

        def slow(*_: object) -> Heavy:
            asyncio.run_coroutine_threadsafe(go.wait(), loop).result()
            return Heavy()

        monkeypatch.setattr(repository, "load", slow)
        patient = ask(engine, 1, model="a")
        with pytest.raises(DeadlineExceededError, match="still being loaded"):
            await ask(engine, 2, model="a", deadline=time.monotonic() + 0.02)
        with pytest.raises(
            QueueFullError, match="24 bytes are held, 24 bytes by this caller; 60 bytes are"
        ):
            await ask(engine, 3, 4, model="a")
        go.set()
        assert values(await patient) == [2]
    finally:
        go.set()
        engine.close()
