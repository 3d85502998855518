"""The networks: as denoisers of the service, and as their users have them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.engines.peers import Images, Inputs, Labels, Subject
from benchmarks.networks import plain
from benchmarks.networks.cases import Folder
from els_service.denoisers.base import Denoiser
from els_service.denoisers.engines.options import EngineOptions
from els_service.denoisers.levels import NoiseLevel, cosine_time
from els_service.denoisers.networks import (
    Execution,
    Network,
    NetworkConfig,
    NetworkDenoiser,
    NetworkDocument,
    build_network,
    parse_network,
)
from els_service.denoisers.networks.folder import read_weights
from els_service.repository import bundled_models
from els_service.yaml_files import read_yaml

Ours = Callable[[str, str], Denoiser]
"""Engine and precision → the denoiser."""
Case = tuple[Subject, Ours]


def bundled(name: str) -> Case:
    """Return a network that ships with the package, with its trained weights."""
    folder = bundled_models() / name
    document = parse_network(read_yaml(folder / "model.yaml"), folder)
    network = build_network(document.config, "meta")
    tensors = read_weights(folder / "weights.safetensors", network.state_dict())
    network.load_state_dict(tensors, assign=True)
    return _case(network)


def paper(architecture: str, widths: Sequence[int]) -> Case:
    """Return a network of the paper, 28×28, with random weights."""
    torch.manual_seed(0)
    config = NetworkConfig(
        architecture=architecture, shape=(1, 28, 28), widths=tuple(widths), label_count=10
    )
    return _case(build_network(config))


def _case(network: Network) -> Case:
    config = network.config
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    of = network.eval().requires_grad_(False)
    if config.architecture == "resnet":
        eager = plain.resnet(weights, config.blocks)
    else:
        eager = plain.unet(weights, len(config.widths))

    def ours(engine: str, precision: str) -> Denoiser:
        own = build_network(config)
        own.load_state_dict(weights)
        execution = Execution(engine=engine, precision=precision)
        return NetworkDenoiser(own, NetworkDocument(config, execution))

    return Subject(eager, of, _cosine_inputs, ("x", "time", "labels"), config.shape), ours


def _cosine_inputs(x: Images, level: NoiseLevel, labels: Labels) -> Inputs:
    return x, cosine_time(level.sigma).astype(np.float32), labels


class _Unet(nn.Module):
    """A UNet of diffusers as a function of tensors."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """Return ε."""
        noise: Tensor = self.unet(x, timestep, return_dict=False)[0]
        return noise


def diffusers(widths: Sequence[int]) -> Case:
    """Return a ``UNet2DModel`` of colour images, 32×32, with random weights."""
    from diffusers import DDPMScheduler, UNet2DModel

    from els_service.denoisers.pretrained.unet import UnetOptions, load_unet

    torch.manual_seed(0)
    unet: Any = UNet2DModel(
        sample_size=32,
        block_out_channels=tuple(widths),
        down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * (len(widths) - 1)),
        up_block_types=(*["AttnUpBlock2D"] * (len(widths) - 1), "UpBlock2D"),
        norm_num_groups=8,
    )
    scheduler: Any = DDPMScheduler(clip_sample=False)
    log_sigma = (scheduler.alphas_cumprod**-1 - 1).sqrt().log().double().numpy()

    def ours(engine: str, precision: str) -> Denoiser:
        with tempfile.TemporaryDirectory() as folder:
            unet.save_pretrained(Path(folder, "unet"))
            scheduler.save_pretrained(Path(folder, "scheduler"))
            options = EngineOptions(engine=engine, precision=precision)
            return load_unet(Folder(Path(folder)), UnetOptions(engine=options), "cpu")

    def inputs(x: Images, level: NoiseLevel, labels: Labels) -> Inputs:
        timestep = np.interp(np.log(level.sigma), log_sigma, np.arange(len(log_sigma)))
        return x, timestep.astype(np.float32)

    module = _Unet(unet).eval().requires_grad_(False)
    return Subject(module, module, inputs, ("x", "timestep"), (3, 32, 32)), ours


CASES: dict[str, Callable[[Sequence[int]], Case]] = {
    "fashion-resnet": lambda widths: bundled("fashion-resnet"),
    "fashion-unet": lambda widths: bundled("fashion-unet"),
    "resnet": lambda widths: paper("resnet", widths[:1] or (256,)),
    "unet": lambda widths: paper("unet", widths or (64, 128, 256)),
    "diffusers": lambda widths: diffusers(widths or (64, 128, 128)),
}
"""Network → the case; widths other than the default make the last three smaller."""
