"""Extensions of the Open Inference Protocol: repository, configuration, statistics, log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from els_proto.inference import grpc_service_pb2 as pb
from els_proto.inference.grpc_service_pb2_grpc import GRPCInferenceServiceServicer
from els_service import logs
from els_service.config import Limits
from els_service.denoisers.base import DenoiserInfo
from els_service.engine.engine import Engine
from els_service.engine.loaded_model import DurationSum, Statistics
from els_service.engine.model_versions import ModelVersion
from els_service.engine.request_context import DEFAULT_PRIORITY, PRIORITIES
from els_service.errors import InvalidArgumentError, shortened
from els_service.server.requests.signatures import INPUTS, inputs_of, outputs_of
from els_service.server.transport.grpc_types import Context

EXTENSIONS = ("model_repository", "model_configuration", "statistics", "logging")

_CONFIG_TYPES = {"FP32": pb.TYPE_FP32, "INT64": pb.TYPE_INT64}
_LOG_LEVEL = "log_level"
_LOG_SETTINGS = {
    _LOG_LEVEL: "string_param",
    "log_verbose_level": "uint32_param",
    "log_info": "bool_param",
    "log_warning": "bool_param",
    "log_error": "bool_param",
}
"""Name → kind of value: ``log_level``, and the switches that Triton's clients set."""

OnChange = Callable[[], None]
"""Called after the set of served models changes."""


class Administration(GRPCInferenceServiceServicer):
    """Extensions of the protocol; ``InferenceService`` adds the base methods.

    Args:
        engine: has the models.
        limits: of requests.
        on_change: called after the set of served models changes.
    """

    def __init__(self, engine: Engine, limits: Limits, on_change: OnChange) -> None:
        self._engine, self._limits, self._on_change = engine, limits, on_change

    async def ModelConfig(
        self, request: pb.ModelConfigRequest, context: Context
    ) -> pb.ModelConfigResponse:
        """Return the configuration of a model."""
        served = self._engine.models.find(request.name, request.version)
        return pb.ModelConfigResponse(config=_config(served, self._limits))

    async def ModelStatistics(
        self, request: pb.ModelStatisticsRequest, context: Context
    ) -> pb.ModelStatisticsResponse:
        """Return the statistics of one model, or of all, since they were loaded."""
        models = self._engine.models
        requested = [models.find(request.name, request.version)] if request.name else list(models)
        return pb.ModelStatisticsResponse(
            model_stats=[_statistics(served, served.statistics.settle()) for served in requested]
        )

    async def RepositoryIndex(
        self, request: pb.RepositoryIndexRequest, context: Context
    ) -> pb.RepositoryIndexResponse:
        """Return the state of each model, or of the served ones only."""
        _check_repository(request.repository_name)
        index = pb.RepositoryIndexResponse.ModelIndex
        return pb.RepositoryIndexResponse(
            models=[
                index(
                    name=state.model,
                    version=str(state.version),
                    state=state.state,
                    reason=state.reason,
                )
                for state in await self._engine.models.index()
                if state.state == "READY" or not request.ready
            ]
        )

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Context
    ) -> pb.RepositoryModelLoadResponse:
        """Load or reload a model."""
        _check_repository(request.repository_name)
        for name in request.parameters:
            raise InvalidArgumentError("parameters", "none", name)
        try:
            await self._engine.models.load(request.model_name)
        finally:
            # A model whose first load failed has a health status, too.
            self._on_change()
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        """Unload a model."""
        _check_repository(request.repository_name)
        for name in request.parameters:
            if name != "unload_dependents":
                raise InvalidArgumentError("parameters", "unload_dependents or none", name)
        self._engine.models.unload(request.model_name)
        self._on_change()
        return pb.RepositoryModelUnloadResponse()

    async def LogSettings(
        self, request: pb.LogSettingsRequest, context: Context
    ) -> pb.LogSettingsResponse:
        """Set the log level if given; return it as ``log_level`` and as Triton's switches."""
        given = {
            name: _setting(name, value.WhichOneof("parameter_choice"), value)
            for name, value in request.settings.items()
        }
        changed = _level({**_switches(logs.level()), **given})
        if given and changed != logs.level():
            logs.set_level(changed)
        response = pb.LogSettingsResponse()
        for name, value in {_LOG_LEVEL: logs.level(), **_switches(logs.level())}.items():
            setattr(response.settings[name], _LOG_SETTINGS[name], value)
        return response


def _setting(name: str, kind: str | None, value: pb.LogSettingsRequest.SettingValue) -> Any:
    """Return the validated value of a setting.

    Raises:
        InvalidArgumentError: The name, kind or value is wrong.
    """
    if name not in _LOG_SETTINGS:
        known = ", ".join(_LOG_SETTINGS)
        raise InvalidArgumentError("settings", f"one of {known}", repr(name)[:100])
    field = f"settings.{name}"
    if kind != _LOG_SETTINGS[name]:
        raise InvalidArgumentError(field, _LOG_SETTINGS[name], kind or "nothing")
    got = getattr(value, kind)
    if name == _LOG_LEVEL and got not in logs.LEVELS:
        raise InvalidArgumentError(field, f"one of {', '.join(logs.LEVELS)}", got)
    if name == "log_error" and not got:
        raise InvalidArgumentError(field, "true: errors are always logged", "false")
    return got


def _switches(level: str) -> dict[str, int]:
    """Return Triton's switches for a level."""
    at = logs.LEVELS.index(level)
    return {
        "log_verbose_level": int(at == 0),
        "log_info": at <= 1,
        "log_warning": at <= 2,
        "log_error": True,
    }


def _level(settings: dict[str, Any]) -> str:
    """Return the level of settings; ``log_level`` takes precedence over Triton's switches."""
    named: str | None = settings.get(_LOG_LEVEL)
    if named is not None:
        return named
    on = (settings["log_verbose_level"] > 0, settings["log_info"], settings["log_warning"], True)
    return logs.LEVELS[on.index(True)]


def platform_of(info: DenoiserInfo) -> str:
    """Return the platform of a model: the protocol's term for its kind."""
    return f"els-denoise_{info.kind}"


def _check_repository(name: str) -> None:
    if name:
        raise InvalidArgumentError("repository_name", "none: the server has one repository", name)


def _config(served: ModelVersion, limits: Limits) -> pb.ModelConfig:
    info = served.info
    described = {
        "machine": info.machine,
        "padding": info.padding,
        "schedule": info.schedule,
        "implementation": info.implementation,
        "engine": info.engine,
        "engine_reason": shortened(info.engine_reason),
        "precision": info.precision,
        "batch_invariant": str(info.batch_invariant).lower(),
        "max_images": str(limits.max_images),
        "max_steps": str(limits.max_steps),
        "max_pixels": str(limits.max_pixels),
        "max_message_bytes": str(limits.max_message_bytes),
    }
    return pb.ModelConfig(
        name=served.model,
        platform=platform_of(info),
        backend="els-denoise",
        # 0 means that shapes include the batch axis: without it a level would be a scalar, which
        # the protocol cannot express.
        max_batch_size=0,
        input=[
            pb.ModelInput(
                name=name,
                data_type=_CONFIG_TYPES[INPUTS[name].name],
                dims=shape,
                optional=name != "x",
            )
            for name, shape in inputs_of(info).items()
        ],
        output=[
            pb.ModelOutput(name=name, data_type=pb.TYPE_FP32, dims=shape)
            for name, shape in outputs_of(info).items()
        ],
        dynamic_batching=pb.ModelDynamicBatching(
            preserve_ordering=False,
            priority_levels=PRIORITIES,
            default_priority_level=DEFAULT_PRIORITY,
        ),
        parameters={
            name: pb.ModelParameter(string_value=value)
            for name, value in described.items()
            if value
        },
    )


def _statistics(served: ModelVersion, statistics: Statistics) -> pb.ModelStatistics:
    batches = statistics.batches
    # Input and output are not measured; clients expect the same count for them.
    unmeasured = pb.StatisticDuration(count=statistics.computed.count)
    return pb.ModelStatistics(
        name=served.model,
        version=str(served.version),
        last_inference=round(statistics.last * 1e3),
        inference_count=sum(images * batch.count for images, batch in batches.items()),
        execution_count=sum(batch.count for batch in batches.values()),
        inference_stats=pb.InferStatistics(
            success=_duration(statistics.succeeded),
            fail=_duration(statistics.failed),
            queue=_duration(statistics.queued),
            compute_input=unmeasured,
            compute_infer=_duration(statistics.computed),
            compute_output=unmeasured,
        ),
        batch_stats=[
            pb.InferBatchStatistics(
                batch_size=images,
                compute_input=pb.StatisticDuration(count=batch.count),
                compute_infer=_duration(batch),
                compute_output=pb.StatisticDuration(count=batch.count),
            )
            for images, batch in sorted(batches.items())
        ],
    )


def _duration(total: DurationSum) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=total.count, ns=round(total.seconds * 1e9))
