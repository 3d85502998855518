"""Registry of served models and versions; unloads the least recently used under memory pressure.

A load is atomic: all versions of a model are loaded and warmed up while the old ones serve, and
replace them between two queries. Queued queries are answered by the version that they were sent to.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from weakref import WeakValueDictionary

from els_service.config import Scheduling
from els_service.denoisers.base import Denoiser
from els_service.engine.costs import CostModel
from els_service.engine.device import Device, DeviceLostError
from els_service.engine.estimates import warm
from els_service.engine.loaded_model import LoadedModel
from els_service.engine.loading import Loader
from els_service.engine.model_source import ModelSource
from els_service.engine.model_versions import ModelVersion, State, by_memory, memory_of
from els_service.errors import (
    ElsError,
    LoadError,
    NotFoundError,
    UnavailableError,
    shortened,
)

_log = logging.getLogger(__name__)

_LOAD_S = 600.0
"""Watchdog limit of the warm-up of a model."""


class ModelRegistry:
    """Registry of served models.

    Args:
        devices: devices, on all of which each model is loaded.
        scheduling: bounds of memory and queues.
        lost: called with the reason when a device is lost.
    """

    def __init__(
        self, devices: Sequence[Device], scheduling: Scheduling, lost: Callable[[str], None]
    ) -> None:
        self._devices, self._scheduling, self._lost = devices, scheduling, lost
        self._repository: ModelSource | None = None
        self._served: dict[str, dict[int, ModelVersion]] = {}
        self._newest: dict[str, ModelVersion] = {}
        self._reasons: dict[str, str] = {}
        """Model → reason why it is not served."""
        self._loading: set[str] = set()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """Model → lock of its loads."""
        self._reloads: dict[ModelVersion, asyncio.Task[LoadedModel]] = {}
        self._uses = 0
        self._loader = Loader(scheduling.load_s)
        self.faults: dict[str, LoadError] = {}
        """Model → error of its latest load."""
        self.starting = True

    def __contains__(self, name: object) -> bool:
        return name in self._served

    def __iter__(self) -> Iterator[ModelVersion]:
        """Yield all served versions, by name and number."""
        for _, versions in sorted(self._served.items()):
            yield from (served for _, served in sorted(versions.items()))

    def names(self) -> set[str]:
        """Return the names of models that are served or loading."""
        return {*self._served, *self._loading}

    def newest(self) -> list[ModelVersion]:
        """Return the newest version of each model, by name."""
        return [served for _, served in sorted(self._newest.items())]

    def find(self, name: str, version: str = "") -> ModelVersion:
        """Return a served version of a model, by default the newest.

        Raises:
            NotFoundError: No such model or version is served; lists those that are.
            UnavailableError: Models are still being loaded.
        """
        try:
            return self._served[name][_number(version)] if version else self._newest[name]
        except (KeyError, ValueError):
            raise self._missing(name, version) from None

    def _missing(self, name: str, version: str) -> ElsError:
        if name in self._served:
            known = ", ".join(map(str, sorted(self._served[name])))
            return NotFoundError(f"version of {name}: expected {known}, got {version[:100]!r}")
        if self.starting:
            return UnavailableError("models are still being loaded")
        if name in self._loading:
            return UnavailableError(f"model: {name} is being loaded")
        if name in self.faults:
            return NotFoundError(f"model: {name} failed to load")
        if name in self._reasons:
            return NotFoundError(f"model: {name} is {self._reasons[name]}")
        known = shortened(", ".join(sorted(self._served)) or "none")
        return NotFoundError(f"model: expected one of {known}, got {name[:100]!r}")

    def mark_used(self, served: ModelVersion) -> LoadedModel | None:
        """Record the use of a version; return its loaded model, None if it is unloaded."""
        self._uses += 1
        served.used = self._uses
        return served.loaded

    async def reload(self, served: ModelVersion) -> LoadedModel:
        """Reload a version that was unloaded to save memory; return its loaded model.

        Raises:
            LoadError: It can no longer be loaded.
        """
        if served.loaded is not None:
            return served.loaded
        task = self._reloads.get(served)
        if task is None:
            task = self._reloads[served] = asyncio.ensure_future(self._reload(served))
            task.add_done_callback(lambda _: self._reloads.pop(served, None))
        # Shielded: a cancelled caller must not cancel the load that others wait for.
        return await asyncio.shield(task)

    async def _reload(self, served: ModelVersion) -> LoadedModel:
        async with self._lock(served.model):
            fresh = await self._load_version(served.model, served.version)
            assert fresh.loaded is not None
            fresh.loaded.statistics = served.statistics
            served.loaded, served.info, served.content = fresh.loaded, fresh.info, fresh.content
            self._unload_least_used(served)
        return fresh.loaded

    async def load_all(self, repository: ModelSource) -> None:
        """Load and warm up all models of a repository; stores errors in ``faults``.

        One after the other, except that the next load does not wait for a slow one.

        Raises:
            LoadError: The repository cannot be read.
        """
        self._repository = repository
        loads: set[asyncio.Task[None]] = set()
        try:
            for name in await self._loader.run(str(repository), repository.names):
                loads.add(load := asyncio.ensure_future(self._load_if_present(name)))
                await asyncio.wait((load,), timeout=self._loader.slow_s)
            await asyncio.gather(*loads)
        finally:
            for load in loads:
                load.cancel()
            self.starting = False

    async def _load_if_present(self, name: str) -> None:
        # Faults are stored by ``load``; the model may have been removed since it was listed.
        with contextlib.suppress(LoadError, NotFoundError):
            await self.load(name)

    async def load(self, name: str) -> None:
        """Load or reload a model of the repository; its old versions serve meanwhile.

        Raises:
            NotFoundError: The repository has no such model.
            LoadError: A version cannot be loaded; the old versions still serve.
        """
        async with self._lock(name):
            try:
                versions = await self._loader.run(name, partial(self._versions_on_disk, name))
                # Not before: a name that the repository does not have is not being loaded.
                self._loading.add(name)
                fresh = {version: await self._load_version(name, version) for version in versions}
            except LoadError as error:
                extra = {"model": shortened(name), "reason": str(error)}
                _log.error("model refused", extra=extra)
                if await self._may_have_fault(name):
                    # A copy: the traceback of the original holds its frames and their variables.
                    self.faults[name] = LoadError(error.path, error.reason)
                raise
            except NotFoundError:
                # Its folder is gone, and with it what was wrong.
                self.faults.pop(name, None)
                raise
            finally:
                self._loading.discard(name)
            self._serve(name, fresh)
            for served in fresh.values():
                self._unload_least_used(served)
        _log.info("model loaded", extra={"model": name, "versions": versions})

    def unload(self, name: str) -> None:
        """Stop serving a model; queued queries are still answered.

        Raises:
            NotFoundError: The model is not served.
        """
        if name not in self._served:
            raise self._missing(name, "")
        del self._served[name], self._newest[name]
        self.faults.pop(name, None)
        self._reasons[name] = "unloaded"
        _log.info("model unloaded", extra={"model": name})

    def add(self, name: str, *denoisers: Denoiser) -> None:
        """Serve denoisers that are not from the repository, one for each of the first devices."""
        placed = dict(zip((device.name for device in self._devices), denoisers, strict=False))
        loaded = LoadedModel(name, 1, placed, self._scheduling)
        self._serve(
            name, {1: ModelVersion(name, 1, loaded.denoiser.info, loaded, loaded.statistics)}
        )

    async def index(self) -> list[State]:
        """Return the state of all models, of the repository or added."""
        names = set(self._served) | self._loading
        if self._repository is not None:
            # Not in the loader's thread, which a load may occupy for minutes.
            names |= set(await asyncio.to_thread(self._repository.names))
        return [state for name in sorted(names) for state in self._states(name)]

    def memory(self) -> dict[str, int]:
        """Return the bytes of each loaded model; a shared bank counts for its first model."""
        sizes: dict[str, int] = {}
        for first, *_ in by_memory(self).values():
            sizes[first.model] = sizes.get(first.model, 0) + first.info.memory_bytes
        return sizes

    def refused(self) -> dict[str, bool]:
        """Return model → whether its latest load failed, of all served or failed models."""
        # Called by another thread: each is copied in one step.
        served, faults = list(self._served), list(self.faults)
        return dict.fromkeys(served, False) | dict.fromkeys(faults, True)

    def close(self) -> None:
        """End the loading thread; waits a few seconds for the current load."""
        self._loader.close()

    def _serve(self, name: str, versions: dict[int, ModelVersion]) -> None:
        self._served[name] = versions
        self._newest[name] = versions[max(versions)]
        self.faults.pop(name, None)
        self._reasons.pop(name, None)

    async def _may_have_fault(self, name: str) -> bool:
        """Return whether a name is a model's: callers may load any name of a root that is gone."""
        if name in self._served or name in self.faults or name in self._reasons:
            return True
        assert self._repository is not None
        try:
            return await asyncio.to_thread(self._repository.__contains__, name)
        except LoadError:
            return False

    def _states(self, name: str) -> Iterator[State]:
        if name in self._served:
            for served in self._served[name].values():
                reason = "" if served.loaded else "unloaded to save memory until it is used"
                yield State(name, served.version, "READY", reason)
        elif name in self._loading:
            yield State(name, 1, "LOADING")
        else:
            fault = self.faults.get(name)
            reason = str(fault) if fault else self._reasons.get(name, "not loaded")
            yield State(name, 1, "UNAVAILABLE", reason)

    def _versions_on_disk(self, name: str) -> list[int]:
        repository = self._repository
        versions = repository.versions(name) if repository and name in repository else []
        if not versions:
            raise NotFoundError(f"model: the repository has no {name[:100]!r}")
        return versions

    async def _load_version(self, name: str, version: int) -> ModelVersion:
        assert self._repository is not None
        denoisers: dict[str, Denoiser] = {}
        costs: list[CostModel] = []
        for device in self._devices:
            load = partial(self._repository.load, name, version, device.name)
            denoiser = denoisers[device.name] = await self._loader.run(name, load)
            try:
                costs.append((await device.run(partial(warm, denoiser), _LOAD_S)).value)
            except Exception as error:
                # Any exception, because others must serve even if one fails unexpectedly.
                _log.exception("model failed its warm-up", extra={"model": name})
                if isinstance(error, DeviceLostError):
                    self._lost(str(error))
                raise LoadError(name, f"failed its warm-up: {error}") from error
        loaded = LoadedModel(name, version, denoisers, self._scheduling, costs[0])
        fingerprint = partial(self._repository.fingerprint, name, version)
        content = await self._loader.run(name, fingerprint)
        return ModelVersion(name, version, loaded.denoiser.info, loaded, loaded.statistics, content)

    def _unload_least_used(self, keep: ModelVersion) -> None:
        """Unload the least recently used versions but ``keep`` until the rest fits the budget."""
        budget = self._scheduling.memory_bytes
        if budget is None or self._repository is None:
            return
        holders = by_memory(self)
        held = sum(first.info.memory_bytes for first, *_ in holders.values())
        if held <= budget:
            return
        by_use = sorted(
            (served for served in self if served.loaded), key=lambda served: served.used
        )
        for served in by_use:
            if held <= budget:
                return
            if served is not keep:
                served.loaded = None
                sharing = holders[memory_of(served)]
                held -= sharing[0].info.memory_bytes
                sharing.remove(served)
                held += sharing[0].info.memory_bytes if sharing else 0
                extra = {"model": served.model, "version": served.version, "budget": budget}
                _log.info("model unloaded to save memory", extra=extra)

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())


def _number(version: str) -> int:
    """Return the number of a version; raises ValueError unless it is decimal."""
    if not (version.isascii() and version.isdecimal()):
        raise ValueError(version)
    return int(version)
