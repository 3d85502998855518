"""Cases: each network as a denoiser of the service, and as plain code."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.networks import plain
from els_service.denoisers.base import Denoiser, Query, make_query
from els_service.denoisers.levels import NoiseLevel, cosine_time, from_alpha_bar, from_sigma
from els_service.denoisers.networks import (
    Execution,
    NetworkConfig,
    NetworkDenoiser,
    NetworkDocument,
    build_network,
)

Images = npt.NDArray[np.float32]
Peer = Callable[[Images, NoiseLevel, npt.NDArray[np.int64]], Images]
"""x, levels and labels → D(x), all on the CPU, as for the service."""

TERRAIN = Path(__file__).parents[2] / ".terrain" / "terrain.onnx"
_LABELS = 10
_WIDTHS = {"resnet": (256,), "unet": (64, 128, 256), "unet-attention": (64, 128, 256)}
"""Of the paper."""


@dataclass(frozen=True)
class Pair:
    """The two implementations of one network."""

    ours: Denoiser
    peer: Peer
    sigma: bool = False
    """Whether levels are sent as σ rather than as ᾱ."""

    def query(self, batch: int) -> Query:
        """Return a query with different images, levels and labels."""
        numbers = np.random.default_rng(0)
        shape, labelled = self.ours.info.shape, self.ours.info.label_count
        x = numbers.standard_normal((batch, *shape), np.float32)
        if self.sigma:
            sigma = np.exp(numbers.uniform(-3, 3, batch))
            x *= np.sqrt(1 + sigma**2).astype(np.float32).reshape(-1, 1, 1, 1)
            level = from_sigma(sigma)
        else:
            level = from_alpha_bar(numbers.uniform(0.01, 0.99, batch))
        labels = numbers.integers(0, labelled, batch).tolist() if labelled else ()
        return make_query(x, level, labels)


def paper(architecture: str, execution: Execution, device: str, widths: Sequence[int] = ()) -> Pair:
    """Return a network of the paper, 28×28, random weights; ``widths`` makes it another size."""
    config = NetworkConfig(
        architecture=architecture,
        shape=(1, 28, 28),
        widths=tuple(widths) or _WIDTHS[architecture],
        label_count=_LABELS,
    )
    torch.manual_seed(0)
    network = build_network(config)
    weights = {name: value.to(device, copy=True) for name, value in network.state_dict().items()}
    ours = NetworkDenoiser(network, NetworkDocument(config, execution), device)
    if architecture == "resnet":
        return Pair(ours, _eager(plain.resnet(weights, config.blocks), device))
    attends = architecture == "unet-attention"
    return Pair(ours, _eager(plain.unet(weights, len(config.widths), attends=attends), device))


def _eager(network: plain.Network, device: str) -> Peer:
    def peer(x: Images, level: NoiseLevel, labels: npt.NDArray[np.int64]) -> Images:
        with torch.no_grad():
            noisy = torch.from_numpy(x).to(device)
            time = torch.from_numpy(cosine_time(level.sigma)).float().to(device)
            noise = network(noisy, time, torch.from_numpy(labels).to(device))
            return _clean(noisy, noise, level, device)

    return peer


def _clean(x: Tensor, noise: Tensor, level: NoiseLevel, device: str) -> Images:
    """Return (x - s·ε)/a."""
    a, s = (
        torch.tensor(column).float().view(-1, 1, 1, 1).to(device) for column in (level.a, level.s)
    )
    clean: Images = ((x - s * noise) / a).cpu().numpy()
    return clean


@dataclass(frozen=True)
class Folder:
    """Resolver of names in a folder."""

    folder: Path

    def __call__(self, name: str) -> Path:
        """Return the path of a file."""
        return self.folder / name

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder, sorted."""
        return sorted(path.name for path in (self.folder / folder).glob("*"))


def diffusers(device: str, widths: Sequence[int] = ()) -> Pair:
    """Return a ``UNet2DModel`` of colour images, with random weights, from a folder it wrote.

    Raises:
        ModuleNotFoundError: diffusers is not installed.
    """
    from diffusers import DDPMScheduler, UNet2DModel

    from els_service.denoisers.pretrained.unet import UnetOptions, load_unet

    widths = widths or (64, 128, 128)
    torch.manual_seed(0)
    unet: Any = UNet2DModel(
        sample_size=32,
        block_out_channels=tuple(widths),
        down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * (len(widths) - 1)),
        up_block_types=(*["AttnUpBlock2D"] * (len(widths) - 1), "UpBlock2D"),
        norm_num_groups=math.gcd(32, *widths),
    )
    scheduler: Any = DDPMScheduler(clip_sample=False)
    with tempfile.TemporaryDirectory() as folder:
        unet.save_pretrained(Path(folder, "unet"))
        scheduler.save_pretrained(Path(folder, "scheduler"))
        ours = load_unet(Folder(Path(folder)), UnetOptions(), device)
    unet = unet.eval().to(device)
    log_sigma = (scheduler.alphas_cumprod**-1 - 1).sqrt().log().double().numpy()

    def peer(x: Images, level: NoiseLevel, labels: npt.NDArray[np.int64]) -> Images:
        timestep = np.interp(np.log(level.sigma), log_sigma, np.arange(len(log_sigma)))
        with torch.no_grad():
            noisy = torch.from_numpy(x).to(device)
            timesteps = torch.from_numpy(timestep).float().to(device)
            return _clean(noisy, unet(noisy, timesteps).sample, level, device)

    return Pair(ours, peer)


def terrain() -> Pair:
    """Return the ONNX UNet of ``make terrain``, 128×128, and onnxruntime with default options.

    Raises:
        FileNotFoundError: It was not downloaded.
        ModuleNotFoundError: onnxruntime is not installed.
    """
    if not TERRAIN.exists():
        raise FileNotFoundError("needs make terrain")
    import onnxruntime

    from els_service.denoisers.pretrained.onnx_graph import OnnxDocument
    from els_service.denoisers.pretrained.onnx_model import load_onnx

    document = OnnxDocument(
        input="noisy", output="denoised", level="sigma", constants={"difficulty": 0.5}
    )
    ours = load_onnx(document, TERRAIN.name, lambda name: TERRAIN.with_name(name))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(TERRAIN, options, providers=["CPUExecutionProvider"])

    def peer(x: Images, level: NoiseLevel, labels: npt.NDArray[np.int64]) -> Images:
        sigma = level.s.astype(np.float32)
        difficulty = np.full(len(x), 0.5, np.float32)
        inputs = {"noisy": x, "sigma": sigma, "difficulty": difficulty}
        clean: Images = session.run(["denoised"], inputs)[0]
        return clean

    return Pair(ours, peer, sigma=True)
