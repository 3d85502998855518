"""A served model as a module of torch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, TypedDict, Unpack

from torch import Tensor, nn

from els_client._async_client import AsyncClient
from els_client._types import Conditions, Integers, Levels
from els_client.torch._functions import Check, Denoises, ServedCall, denoise


class DenoiserOptions(TypedDict, total=False):
    """Options of every query of a module; see ``Client.denoise``."""

    window: Integers | None
    conditioning: Conditions | None
    unconditional: Conditions | None
    guidance: float | None
    priority: int | None
    timeout_s: float | None
    version: str | None


class RemoteDenoiser(nn.Module):
    """The posterior mean of a served model: (x, σ) → E[x0 | x], differentiable by x.

    ``autograd.grad``, also several times at one point, and ``torch.func.vjp``, ``grad`` and
    ``jacrev`` ask the server for products Jᵀg; ``torch.func.jvp``, ``jacfwd`` and forward-mode AD
    for J u; ``torch.func.vmap`` asks once for all. Products need ``info.has_gradients``; second
    derivatives and those by the level raise ``RuntimeError``. It has no parameters.

    Args:
        client: ``Client`` or ``LocalClient``.
        model: Name of the model.
        label: Of all images or one for each; None for none.
        **options: Of every query, as in ``Client.denoise``.

    Attributes:
        info: Description of the model.

    Raises:
        NotFoundError: No model has that name.

    Example:
        >>> denoiser = RemoteDenoiser(client, "fashion-els")
        >>> x = torch.randn(4, 1, 28, 28, requires_grad=True)
        >>> denoiser(x, 0.5).square().sum().backward()
    """

    def __init__(
        self,
        client: Denoises,
        model: str,
        label: Integers | None = None,
        **options: Unpack[DenoiserOptions],
    ) -> None:
        super().__init__()
        if isinstance(client, AsyncClient):
            raise TypeError("client: expected Client or LocalClient, got AsyncClient")
        self.client = client
        self.model = model
        self.label = label
        self.options: Mapping[str, Any] = options
        self.info = client.model(model, version=options.get("version"))
        self._check: Check | None = None

    def forward(
        self,
        x: Tensor,
        sigma: Levels | Tensor | None = None,
        label: Integers | Tensor | None = None,
        *,
        alpha_bar: Levels | Tensor | None = None,
        **options: Unpack[DenoiserOptions],
    ) -> Tensor:
        """Return D(x) = E[x0 | x], [B, C, H, W] of the dtype and device of x.

        Args:
            x: Noisy images [B, C, H, W], of pixels in [-1, 1] before noise was added; floating,
                computed in float32.
            sigma: Level of x = x0 + σ·ε, one or one for each image, [B] or [B, 1, …].
            label: In place of the module's.
            alpha_bar: In place of sigma, ᾱ of x = √ᾱ·x0 + √(1-ᾱ)·ε.
            **options: In place of the module's.

        Raises:
            InvalidArgumentError: A field is invalid; ``violations`` names it.
            UnavailableError: No server is reachable, even after retries; nothing is lost, the same
                call may be repeated.
            ElsError: Any other failure.
        """
        name, level = self._level(sigma, alpha_bar)
        return denoise(checked(x), level, self._call(name, label, options))

    def variance(
        self,
        x: Tensor,
        sigma: Levels | Tensor | None = None,
        label: Integers | Tensor | None = None,
        *,
        alpha_bar: Levels | Tensor | None = None,
        **options: Unpack[DenoiserOptions],
    ) -> Tensor:
        """Return the posterior variance of each pixel, like x and without a gradient.

        Arguments and errors are those of a call, and an ``InvalidArgumentError`` unless
        ``info.has_sources``.
        """
        name, level = self._level(sigma, alpha_bar)
        return self._call(name, label, options).variance(checked(x).detach(), level)

    def extra_repr(self) -> str:
        """Return the model's name, kind and shape, for ``repr``."""
        return f"{self.model!r}, kind={self.info.kind!r}, shape={self.info.shape}"

    def _level(self, sigma: Any, alpha_bar: Any) -> tuple[str, Any]:
        if (sigma is None) == (alpha_bar is None):
            got = "none" if sigma is None else "both"
            raise TypeError(f"level: expected sigma or alpha_bar, got {got}")
        return ("alpha_bar", alpha_bar) if sigma is None else ("sigma", sigma)

    def _call(self, level: str, label: Any, options: Mapping[str, Any]) -> ServedCall:
        given = {"label": self.label if label is None else label}
        query = {"model": self.model, **self.options, **given, **options}
        most = self.info.limits.max_message_bytes
        return ServedCall(self.client, query, level, most, self._check)


def checked(x: object) -> Tensor:
    """Return a tensor.

    Raises:
        TypeError: It is none.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    return x


def served(
    client: Denoises | RemoteDenoiser, model: str | None, label: Integers | None
) -> RemoteDenoiser:
    """Return the denoiser of an adapter's arguments, which may be one.

    Raises:
        TypeError: A model is neither given nor in ``client``, or both.
    """
    if not isinstance(client, RemoteDenoiser):
        if model is None:
            raise TypeError("model: expected the name of a model, got None")
        return RemoteDenoiser(client, model, label)
    if model is not None or label is not None:
        raise TypeError("model, label: expected none beside a denoiser, which has them")
    return client


def library(module: str, needed_by: str) -> Any:
    """Return a module of an optional library.

    Raises:
        ModuleNotFoundError: It is not installed; the text names the extra.
    """
    name = module.partition(".")[0]
    try:
        import_module(name)
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        text = f"{needed_by} needs {name}: pip install 'els-denoise[{name}]'"
        raise ModuleNotFoundError(text, name=name) from error
