"""Models of a folder in this process, with the interface of a client."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from els_client import _codec as codec
from els_client import _moments as moments
from els_client._model_codec import decode_model
from els_client._models import Model
from els_client._types import Evidence, Images, Integers, Pixels, Query, QueryOptions
from els_client.errors import NotFoundError, Violation, error_of
from els_client.torch._denoiser import DenoiserOptions, RemoteDenoiser
from els_client.torch._functions import Direction
from els_proto.denoise.v1 import denoise_pb2 as pb

if TYPE_CHECKING:
    from els_service.denoisers.base import Query as ServerQuery

_SERVER = "LocalDenoiser needs the packages of the server: pip install 'els-denoise[server]'"


class LocalClient:
    """In-process twin of ``Client`` for the model of one folder: computes without a server.

    It checks requests as a server does and raises the same errors. Thread-safe: one call at a time.
    Needs the extra ``server``.

    Args:
        folder: Folder of the model, such as those of ``els-server check --models``; files that it
            names lie in the same parent folder.
        device: Of torch, which holds bank or weights.

    Raises:
        ModuleNotFoundError: The packages of the server are not installed.
        ElsError: A file is missing or malformed.
    """

    def __init__(self, folder: str | Path, *, device: str = "cpu") -> None:
        try:
            from els_service.config import Settings
            from els_service.engine.loaded_model import Statistics
            from els_service.engine.model_versions import ModelVersion
            from els_service.repository import ModelRepository
            from els_service.server.requests.evidence import EvidenceSeal
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(_SERVER, name=error.name) from error
        path = Path(folder).absolute()
        repository = ModelRepository(path.parent)
        with _errors_of_the_client():
            version = (repository.versions(path.name) or [1])[-1]
            self._denoiser: Any = repository.load(path.name, version, device)
        self._limits = Settings().limits
        info = self._denoiser.info
        self._served = ModelVersion(path.name, version, info, None, Statistics())
        self._seal = EvidenceSeal()
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """Name of the model: that of its folder."""
        return self._served.model

    def model(self, name: str, *, version: str | None = None) -> Model:
        """Return the description of the model.

        Raises:
            NotFoundError: Another name or version.
        """
        from els_service.server.requests.model_descriptions import encode_model

        self._check(name, version)
        return decode_model(encode_model(self._served, self._limits))

    def denoise(self, x: Pixels, **options: Unpack[QueryOptions]) -> Images:
        """Return D(x), as ``Client.denoise`` does."""
        query = self._query(codec.encode_query(pb.DenoiseRequest, Query(x, **options)))
        with _errors_of_the_client(), self._lock:
            found: Images = self._denoiser.denoise(query).pixels
        return found

    def denoise_with_variance(
        self, x: Pixels, **options: Unpack[QueryOptions]
    ) -> tuple[Images, Images]:
        """Return D(x) and the variance, as ``Client.denoise_with_variance`` does."""
        query = self._query(codec.encode_query(pb.DenoiseRequest, Query(x, **options)))
        if not self._denoiser.info.has_sources:
            codec.refuse("return_variance", "unset, or a model with sources", f"it for {self.name}")
        with _errors_of_the_client(), self._lock:
            return self._denoiser.denoise(query).pixels, self._denoiser.variance(query)

    def vjp(
        self,
        x: Pixels,
        cotangent: Pixels,
        *,
        evidence: Evidence | None = None,
        **options: Unpack[QueryOptions],
    ) -> tuple[Images, Images]:
        """Return D(x) and Jᵀg, as ``Client.vjp`` does."""
        request = moments.encode_product(
            pb.VjpRequest, Query(x, **options), "cotangent", cotangent, evidence
        )
        return self._product(request, request.cotangent, "vjp", evidence)

    def jvp(
        self,
        x: Pixels,
        tangent: Pixels,
        *,
        evidence: Evidence | None = None,
        **options: Unpack[QueryOptions],
    ) -> tuple[Images, Images]:
        """Return D(x) and J u, as ``Client.jvp`` does."""
        request = moments.encode_product(
            pb.JvpRequest, Query(x, **options), "tangent", tangent, evidence
        )
        return self._product(request, request.tangent, "jvp", evidence)

    def _query(self, request: pb.DenoiseRequest) -> ServerQuery:
        from els_service.denoisers.base import make_query
        from els_service.server.requests import tensors
        from els_service.server.requests.conditioning import decode_conditions, decode_guidance

        self._check(request.model, request.version)
        x, info, limits = request.x, self._served.info, self._limits
        with _errors_of_the_client():
            shape = tensors.decode_shape(x, len(x.data), "x", limits)
            query = make_query(
                tensors.pixels_of(x.data, x.dtype, "x", shape),
                tensors.decode_level(request.level, info.levels, limits),
                tensors.bounded("labels", request.labels, limits),
                tensors.decode_windows(tensors.bounded("windows", request.windows, limits)),
                decode_conditions(request, info, shape[0]),
            )
            query.guidance = decode_guidance(request, shape[0])
            self._denoiser.check(query)
        return query

    def _product(
        self,
        request: pb.VjpRequest | pb.JvpRequest,
        direction: pb.Tensor,
        kind: Direction,
        evidence: Evidence | None,
    ) -> tuple[Images, Images]:
        from els_service.server.requests.gradients import read_product

        self._check(request.model, request.version)
        info = self._served.info
        if not info.has_gradients:
            text = f"{self.name} has no gradients: a model of kind {info.kind} cannot be"
            raise error_of("FAILED_PRECONDITION", f"{text} differentiated")
        field = "cotangent" if kind == "vjp" else "tangent"
        with _errors_of_the_client(), self._lock:
            query, along = read_product(request, direction, field, info, self._limits)
            self._denoiser.check(query)
            if evidence is None or not info.reuses_evidence:
                multiply = self._denoiser.vjp if kind == "vjp" else self._denoiser.jvp
                found = multiply(query, along)
            else:
                numbers = self._evidence(query, evidence)
                found = self._denoiser.product_from(query, along, numbers, kind)
        return found.mean, found.product

    def _evidence(self, query: ServerQuery, evidence: Evidence) -> Any:
        """Return the first pass of a query, which is kept in ``evidence`` for the next product."""
        if evidence.data:
            known = self._seal.verified(self._served, query, evidence.data)
            if known is not None:
                return known
        found = self._denoiser.evidence(query)
        evidence.data = self._seal.signed(self._served, query, found)
        return found

    def _check(self, name: str, version: str | None) -> None:
        if name != self.name:
            raise NotFoundError(f"model: expected {self.name}, the only one here, got {name!r:.80}")
        if version and version != str(self._served.version):
            raise NotFoundError(f"version: expected {self._served.version}, got {version!r:.80}")


class LocalDenoiser(RemoteDenoiser):
    """``RemoteDenoiser`` of a model folder, computed in this process without a server.

    Adapters take it in place of client and model. Needs the extra ``server``.

    Args:
        folder: As of ``LocalClient``.
        label: Of all images or one for each; None for none.
        device: Of torch, which holds bank or weights.
        **options: Of every query.

    Example:
        >>> from els_service.repository import bundled_models
        >>> denoiser = DeepinvDenoiser(LocalDenoiser(bundled_models() / "fashion-ideal"))
    """

    def __init__(
        self,
        folder: str | Path,
        label: Integers | None = None,
        *,
        device: str = "cpu",
        **options: Unpack[DenoiserOptions],
    ) -> None:
        client = LocalClient(folder, device=device)
        super().__init__(client, client.name, label, **options)


@contextmanager
def _errors_of_the_client() -> Iterator[None]:
    """Raise what the server's packages raise as the client does for an answer."""
    from els_service.errors import ElsError

    try:
        yield
    except ElsError as error:
        found = [error.violation] if hasattr(error, "violation") else []
        violations = [Violation(one.field, str(one).partition(": ")[2]) for one in found]
        raise error_of(error.code, str(error), violations, error.retry_after_s) from error
