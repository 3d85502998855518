"""A bank in processes of this machine: the bits of one process, whatever happens to them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.bank_parts import write_parts
from tests.support.preloaded import forked_shards
from tests.support.sharded_models import (
    BANK,
    FOLDS,
    MACHINES,
    SHAPE,
    add_model,
    block_bank,
    eventually,
    write_sharded_models,
)

from els_kernels import ComputationStoppedError, Control
from els_service.denoisers.banks import make_bank, save_bank
from els_service.denoisers.base import Query, make_query
from els_service.denoisers.levels import NoiseLevel
from els_service.denoisers.mixed_banks import make_mixed_bank
from els_service.errors import LoadError
from els_service.repository import ModelRepository
from els_service.shards.process import do_not_preempt
from els_service.shards.shard import ShardOptions
from els_service.shards.shard_set import ShardSet, ShardsUnavailableError

pytestmark = pytest.mark.slow

OPTIONS = ShardOptions(stall_s=3.0)
PAGE = Path(__file__).parents[2] / "docs" / "shards.md"


@pytest.fixture(scope="module", autouse=True)
def forked() -> Iterator[None]:
    # Those of the servers in tests/e2e/test_shards.py are executed.
    with forked_shards():
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sharded_models(tmp_path_factory.mktemp("sharded") / "models")


@pytest.fixture(scope="module")
def models(root: Path) -> Iterator[ModelRepository]:
    repository = ModelRepository(root, shards=OPTIONS)
    # Models of one bank share its shards, which end with the last of them.
    first = repository.load("ideal-sharded")
    yield repository
    del first


def queries() -> Query:
    """All images, each label, and one far from the bank at low noise."""
    x = np.random.default_rng(1).normal(size=(5, *SHAPE)).astype(np.float32)
    x[4] *= 1e4
    pairs = [(1.0, 0.3), (0.8, 0.6), (1.0, 2.0), (0.9, 0.2), (1.0, 1e-2)]
    return make_query(x, NoiseLevel.of(pairs), labels=[-1, 0, 1, 2, -1])


def shards_of(model: Any) -> ShardSet:
    found: ShardSet = model.attention.prepared.parts
    return found


def answers(model: Any) -> list[np.ndarray[Any, Any]]:
    query = queries()
    along = np.random.default_rng(2).normal(size=query.pixels.shape).astype(np.float32)
    denoised, explained = model.denoise(query), model.explain(query, 4)
    known = []
    if model.info.reuses_evidence:
        known = [model.product_from(query, along, model.evidence(query), "vjp").product]
    return [
        denoised.pixels,
        denoised.log_evidence,
        explained.variance,
        explained.entropy,
        explained.sources,
        explained.weights,
        explained.shares,
        model.variance(query),
        model.vjp(query, along).product,
        model.jvp(query, along).product,
        *known,
    ]


@pytest.mark.parametrize("machine", [*MACHINES, *FOLDS])
def test_two_processes_have_the_bits_of_one(machine: str, models: ModelRepository) -> None:
    one, two = models.load(machine), models.load(f"{machine}-sharded")
    for want, got in zip(answers(one), answers(two), strict=True):
        assert np.array_equal(got, want)


def test_a_fold_of_another_size_has_the_bits_of_one_process(models: ModelRepository) -> None:
    x = np.random.default_rng(3).normal(size=(2, 1, 9, 8)).astype(np.float32)
    query = make_query(x, NoiseLevel.of([(1.0, 0.3), (0.8, 0.6)]), labels=[-1, 2])
    one: Any = models.load("sized").denoise(query)
    two: Any = models.load("sized-sharded").denoise(query)
    assert np.array_equal(two.pixels, one.pixels)
    assert np.array_equal(two.log_evidence, one.log_evidence)


def test_shards_of_a_bank_in_parts_have_the_bits_of_the_bank_of_one_file(
    tmp_path: Path, models: ModelRepository
) -> None:
    # Blocks lie within a part and across two.
    write_parts(tmp_path / "_banks", block_bank(), [0, 500, 900, 1200])
    add_model(tmp_path, "parts", "machine: els\nwindow: 3\nbank: ../_banks\nshards: 2\n")
    got = ModelRepository(tmp_path, shards=OPTIONS).load("parts")
    for one, other in zip(answers(got), answers(models.load("zeros")), strict=True):
        assert np.array_equal(one, other)


def test_a_shard_that_wakes_does_not_preempt_the_server(models: ModelRepository) -> None:
    # In a thread, whose policy is its own.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(do_not_preempt).result()
        wanted = thread.submit(os.sched_getscheduler, 0).result()
    shards: Any = shards_of(models.load("ideal-sharded")).shards
    assert [os.sched_getscheduler(shard.pid) for shard in shards] == [wanted] * len(shards)


def test_a_sandbox_may_forbid_the_scheduling_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    do_not_preempt()


def test_the_example_of_the_page_loads(root: Path, models: ModelRepository) -> None:
    (root / "page").mkdir()
    example = PAGE.read_text().split("```yaml\n")[1].split("```")[0]
    (root / "page" / "model.yaml").write_text(example)
    model: Any = models.load("page")
    # Of the same bank, and so of the same processes.
    assert shards_of(model) is shards_of(models.load("ideal-sharded"))


def test_a_killed_shard_is_started_again_and_asked_once_more(models: ModelRepository) -> None:
    model, want = models.load("zeros-sharded"), models.load("zeros").denoise(queries())
    shard: Any = shards_of(model).shards[1]
    before = shard.restarts
    os.kill(shard.pid, signal.SIGKILL)
    got = model.denoise(queries())
    assert np.array_equal(got.pixels, want.pixels)
    assert shard.restarts == before + 1


def test_a_stopped_shard_is_ended_and_started_again(models: ModelRepository) -> None:
    model, want = models.load("zeros-sharded"), models.load("zeros").denoise(queries())
    shard: Any = shards_of(model).shards[0]
    before = shard.restarts
    os.kill(shard.pid, signal.SIGSTOP)
    got = model.denoise(queries())
    assert np.array_equal(got.pixels, want.pixels)
    assert shard.restarts == before + 1


def test_a_cancelled_computation_stops_in_the_shards(tmp_path: Path) -> None:
    root = tmp_path / "models"
    (root / "_banks").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (600, 3, 64, 64)).astype(np.uint8)
    save_bank(make_bank(pixels), root / "_banks" / "slow.safetensors")
    add_model(root, "slow", "machine: els\nbank: ../_banks/slow.safetensors\nshards: auto\n")
    model: Any = ModelRepository(root, shards=OPTIONS).load("slow")
    x = np.zeros((8, 3, 64, 64), np.float32)
    query = make_query(x, NoiseLevel.of([(1.0, 1.0)] * 8))
    assert model.predict_seconds(query) > 10
    control, began = Control(), time.monotonic()
    threading.Timer(0.3, control.stop).start()
    with pytest.raises(ComputationStoppedError), control:
        model.denoise(query)
    assert time.monotonic() - began < 10
    # The shard is free again: a computation of ten seconds is not waited for.
    small = make_query(x[:1], NoiseLevel.of([(1.0, 1.0)]), windows=1)
    shard: Any = shards_of(model).shards[0]
    with pytest.raises(ComputationStoppedError), control:
        model.denoise(small)
    assert shard.ready
    assert shard.restarts == 0


def test_an_answer_never_lacks_a_shard_whose_bank_changed(tmp_path: Path) -> None:
    root = write_sharded_models(tmp_path / "models", shards=1)
    repository = ModelRepository(root, shards=ShardOptions(restart_s=0.0))
    model: Any = repository.load("local-sharded")
    other: Any = repository.load("ideal-sharded")
    assert shards_of(other) is shards_of(model)
    want = model.denoise(queries())
    path = root / "_banks" / "fashion.safetensors"
    original = path.read_bytes()
    save_bank(block_bank(seed=1), path)
    shards = shards_of(model)
    shard: Any = shards.shards[0]
    os.kill(shard.pid, signal.SIGKILL)
    eventually(lambda: "changed since they were loaded" in shard.reason)
    incomplete = "is incomplete: shard 0 is not ready"
    with pytest.raises(ShardsUnavailableError, match=incomplete) as found:
        model.denoise(queries())
    assert found.value.retry_after_s == 5
    assert str(root) not in str(found.value)
    path.write_bytes(original)
    eventually(lambda: shard.ready)
    assert np.array_equal(model.denoise(queries()).pixels, want.pixels)
    # Processes are those of a bank, and end with the last model of it.
    del model, shards, found
    assert is_alive(shard.pid)
    del other
    eventually(lambda: not is_alive(shard.pid))


def test_others_are_answered_while_a_caller_waits_for_a_lost_shard(tmp_path: Path) -> None:
    root = write_sharded_models(tmp_path / "models")
    model: Any = ModelRepository(root, shards=OPTIONS).load("zeros-sharded")
    # Written where the answers to others were.
    levels = NoiseLevel.of([(1.0, 0.5)] * len(queries()))
    two = [queries(), make_query(np.ones_like(queries().pixels), levels)]
    wants = [model.denoise(query).pixels for query in two]
    bank, shards = root / "_banks" / "fashion.safetensors", shards_of(model)
    lost: Any = shards.shards[1]
    away = bank.rename(tmp_path / "away")
    os.kill(lost.pid, signal.SIGKILL)
    eventually(lambda: "No such file" in lost.reason)
    with ThreadPoolExecutor(2) as pool:
        asked = shards._asked
        waiting = [pool.submit(model.denoise, query) for query in two]
        eventually(lambda: shards._asked >= asked + 4)
        _, shares = model.denoise_partial(two[1])
        assert not any(one.done() for one in waiting)
        assert all(0 < share < 1 for share in shares)
        away.rename(bank)
        for one, want in zip(waiting, wants, strict=True):
            assert np.array_equal(one.result().pixels, want)


def is_alive(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


REJECTED = {
    "many": ("shards: 4\n", "shards: expected at most 3, the number of blocks of this bank, got 4"),
    "alone": ("engine: local\n", "engine: expected shards beside it, got local alone"),
    "none": (
        "shards: 0\n",
        "shards: input should be 'auto', or input should be greater than or equal to 1, got 0",
    ),
    "engine": ("shards: 2\nengine: dask\n", "engine: input should be 'local' or 'ray'"),
}


def test_a_bank_of_several_sizes_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "_banks").mkdir()
    images = [np.zeros((1, 4 + i, 5), np.uint8) for i in range(2)]
    save_bank(make_mixed_bank(images), tmp_path / "_banks" / "fashion.safetensors")
    add_model(tmp_path, "model", f"machine: els\n{BANK}shards: 1\n")
    with pytest.raises(LoadError, match="extents: expected images of one size, got several"):
        ModelRepository(tmp_path).load("model")


@pytest.mark.parametrize("name", REJECTED)
def test_what_shards_do_not_serve_is_rejected_by_name(name: str, tmp_path: Path) -> None:
    root = tmp_path / "models"
    (root / "_banks").mkdir(parents=True)
    save_bank(block_bank(), root / "_banks" / "fashion.safetensors")
    document, reason = REJECTED[name]
    add_model(root, "model", f"machine: els\n{BANK}{document}")
    with pytest.raises(LoadError, match=reason):
        ModelRepository(root).load("model")
