"""Client of els-denoise: numpy in, float32 numpy out.

>>> from els_client import Client
>>> with Client("127.0.0.1:50051") as client:
...     clean = client.denoise(noisy, model="fashion-els", sigma=0.5)
"""

from els_client._async_client import AsyncClient
from els_client._client import Client
from els_client._explanation import Explanation
from els_client._models import (
    Bank,
    Conditioning,
    FolderScheduler,
    Limits,
    Model,
    RepositoryModel,
    Sizes,
    Statistics,
    WindowTable,
)
from els_client._originality import Originality
from els_client._repository import AsyncRepository, Repository
from els_client._step import Step
from els_client._types import Evidence, Query, Tls
from els_client.errors import (
    DeadlineExceededError,
    ElsError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
    Violation,
)

__all__ = [
    "AsyncClient",
    "AsyncRepository",
    "Bank",
    "Client",
    "Conditioning",
    "DeadlineExceededError",
    "ElsError",
    "Evidence",
    "Explanation",
    "FolderScheduler",
    "InvalidArgumentError",
    "Limits",
    "Model",
    "NotFoundError",
    "Originality",
    "PermissionDeniedError",
    "Query",
    "Repository",
    "RepositoryModel",
    "ResourceExhaustedError",
    "Sizes",
    "Statistics",
    "Step",
    "Tls",
    "UnauthenticatedError",
    "UnavailableError",
    "Violation",
    "WindowTable",
]
