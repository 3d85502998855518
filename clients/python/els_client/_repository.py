"""Administration of a server: model repository, statistics and log level."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Literal, TypeAlias

from els_client._models import RepositoryModel, Statistics
from els_proto.inference import grpc_service_pb2 as pb

LogLevel: TypeAlias = Literal["debug", "info", "warning", "error"]
_LOG_LEVEL = "log_level"


class Repository:
    """Administration; loading, unloading and setting the log level require the role admin."""

    def __init__(self, call: Callable[[str, Any], Any]) -> None:
        self._call = call

    def index(self, *, ready: bool = False) -> list[RepositoryModel]:
        """Return every model of the repository, or only the served ones if ``ready``."""
        return _models(self._call("RepositoryIndex", pb.RepositoryIndexRequest(ready=ready)))

    def load(self, name: str) -> None:
        """Load or reload a model, without interruption for its callers.

        Raises:
            ElsError: Loading failed, with the reason; the version loaded before is still served.
        """
        self._call("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name=name))

    def unload(self, name: str) -> None:
        """Unload a model."""
        self._call("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name=name))

    def statistics(self, name: str = "", *, version: str = "") -> list[Statistics]:
        """Return the statistics of a model, or of all, since it was loaded."""
        request = pb.ModelStatisticsRequest(name=name, version=version)
        return _statistics(self._call("ModelStatistics", request))

    def log_level(self, level: LogLevel | None = None) -> str:
        """Set the server's log level if given, and return the current one."""
        return _level(self._call("LogSettings", _log_settings(level)))


class AsyncRepository:
    """``Repository`` for asyncio: the same methods, awaited."""

    def __init__(self, call: Callable[[str, Any], Awaitable[Any]]) -> None:
        self._call = call

    async def index(self, *, ready: bool = False) -> list[RepositoryModel]:
        """Like ``Repository.index``."""
        return _models(await self._call("RepositoryIndex", pb.RepositoryIndexRequest(ready=ready)))

    async def load(self, name: str) -> None:
        """Like ``Repository.load``."""
        await self._call("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name=name))

    async def unload(self, name: str) -> None:
        """Like ``Repository.unload``."""
        await self._call("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name=name))

    async def statistics(self, name: str = "", *, version: str = "") -> list[Statistics]:
        """Like ``Repository.statistics``."""
        request = pb.ModelStatisticsRequest(name=name, version=version)
        return _statistics(await self._call("ModelStatistics", request))

    async def log_level(self, level: LogLevel | None = None) -> str:
        """Like ``Repository.log_level``."""
        return _level(await self._call("LogSettings", _log_settings(level)))


def _log_settings(level: LogLevel | None) -> pb.LogSettingsRequest:
    request = pb.LogSettingsRequest()
    if level is not None:
        request.settings[_LOG_LEVEL].string_param = level
    return request


def _level(response: pb.LogSettingsResponse) -> str:
    return response.settings[_LOG_LEVEL].string_param


def _models(response: pb.RepositoryIndexResponse) -> list[RepositoryModel]:
    return [
        RepositoryModel(model.name, model.version, model.state, model.reason)
        for model in response.models
    ]


def _statistics(response: pb.ModelStatisticsResponse) -> list[Statistics]:
    return [
        Statistics(
            name=model.name,
            version=model.version,
            images=model.inference_count,
            batches=model.execution_count,
            answered=model.inference_stats.success.count,
            failed=model.inference_stats.fail.count,
            queued_s=model.inference_stats.queue.ns / 1e9,
            computed_s=model.inference_stats.compute_infer.ns / 1e9,
        )
        for model in response.model_stats
    ]
