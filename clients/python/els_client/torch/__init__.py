"""Served denoisers in torch, and where researchers call them; needs the extra ``torch``.

    RemoteDenoiser    (x, σ) → E[x0 | x], an nn.Module that torch differentiates
    LocalDenoiser     the same of a model folder, computed in this process without a server
    DeepinvDenoiser   denoiser of deepinv: pixels and σ in units of [0, 1]
    KDenoiser         model of k-diffusion
    SmallDenoiser     model of smalldiffusion, which returns ε
    AzulaDenoiser     denoiser of azula: a schedule, and posteriors
    DiffusersUNet     UNet2DModel of diffusers, in its pipelines and loops

>>> from els_client import Client
>>> from els_client.torch import RemoteDenoiser
>>> with Client("127.0.0.1:50051") as client:
...     denoiser = RemoteDenoiser(client, "fashion-els")
...     denoised, product = torch.func.vjp(lambda x: denoiser(x, 0.5), noisy)
"""

try:
    from els_client.torch._azula import AzulaDenoiser
    from els_client.torch._deepinv import DeepinvDenoiser
    from els_client.torch._denoiser import RemoteDenoiser
    from els_client.torch._diffusers import DiffusersUNet
    from els_client.torch._k_diffusion import KDenoiser
    from els_client.torch._local import LocalClient, LocalDenoiser
    from els_client.torch._small import SmallDenoiser
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    text = "els_client.torch needs torch: pip install 'els-denoise[torch]'"
    raise ModuleNotFoundError(text, name="torch") from error

__all__ = [
    "AzulaDenoiser",
    "DeepinvDenoiser",
    "DiffusersUNet",
    "KDenoiser",
    "LocalClient",
    "LocalDenoiser",
    "RemoteDenoiser",
    "SmallDenoiser",
]
