"""Folders of diffusers of every supported kind answer as diffusers' own modules do.

Each row of the table in docs/models.md is a case here, and no case is without a row: a folder with
random weights is written by diffusers, served, and compared at several levels.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from tests.support.compared import (
    TIMESTEPS,
    Compared,
    by_ddim,
    clean_images,
    error_of,
    level_of,
    made,
    served,
)
from tests.support.denoisers import answers_of, random_images, run
from tests.support.pretrained import (
    LATENT,
    LEVELS,
    SHAPE,
    autoencoder,
    conditional_unet,
    edit,
    scheduler,
    unet,
    write_folder,
)
from tests.support.rows import latin

from els_service.denoisers.base import make_query
from els_service.denoisers.levels import MAX_SIGMA, NoiseLevel, from_sigma
from els_service.denoisers.noise import seeded_noise
from els_service.denoisers.pretrained.latent import LatentDenoiser
from els_service.denoisers.samplers import SAMPLERS, Options
from els_service.errors import LoadError
from els_service.repository import ModelRepository

# Some of their schedulers convert tensors as numpy 1 did; ours never make these.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_ROW = re.compile(r"^\| (.+?) \| .+? \| (\S+) \|$", re.MULTILINE)
_TABLE = PAGE.read_text().partition("## What loads")[2].partition("\n## ")[0]
ERRORS = {name: float(error) for name, error in _ROW.findall(_TABLE) if error[0].isdigit()}
"""Case → largest relative error in the table."""

Case = Callable[[Path], Compared]
CASES: dict[str, Case] = {}
"""Row of the table → comparison."""


def case(name: str) -> Callable[[Case], Case]:
    def enter(function: Case) -> Case:
        CASES[name] = function
        return function

    return enter


SAME_LEVELS = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)


def same_levels(name: str) -> Case:
    """Return the comparison of a scheduler that has the levels of DDIM, so the same D."""
    return lambda root: by_ddim(root, unet(), made(name))


CASES |= {f"`{name}`": same_levels(name) for name in SAME_LEVELS}


@case("`LMSDiscreteScheduler`")
def _lms(root: Path) -> Compared:
    # Theirs cannot be made without scipy; its fields are those of Euler's.
    schedule = made("EulerDiscreteScheduler")
    folder = write_folder(root / "model", "kind: diffusers\n", unet=unet(), scheduler=schedule)
    edit(folder / "scheduler" / "scheduler_config.json", _class_name="LMSDiscreteScheduler")
    denoiser = ModelRepository(root).load("model")
    x = random_images((4, *SHAPE))
    ours = denoiser.denoise(make_query(x, level_of(schedule, TIMESTEPS))).mean
    return Compared(ours, clean_images(scheduler(), unet()(x, TIMESTEPS).sample, x))


@pytest.mark.parametrize("name", SAME_LEVELS)
def test_a_scheduler_has_the_levels_of_ddpm(name: str) -> None:
    want = diffusers.DDPMScheduler(**LEVELS).alphas_cumprod
    np.testing.assert_array_equal(made(name).alphas_cumprod.numpy(), want.numpy())


@case("`rescale_betas_zero_snr`, DDIM")
def _zero_snr(root: Path) -> Compared:
    fields = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    return by_ddim(root, unet(), scheduler(**fields), scheduler(**fields))


@case("`rescale_betas_zero_snr`, Euler")
def _zero_snr_of_euler(root: Path) -> Compared:
    fields = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    network, schedule = (
        unet(),
        made("EulerDiscreteScheduler", **fields, timestep_spacing="trailing"),
    )
    denoiser = served(root, unet=network, scheduler=schedule)
    schedule.set_timesteps(10)
    # The first level, 4096, is that of the last timestep.
    sigma, timestep = schedule.sigmas[0], schedule.timesteps[0]
    x = random_images((1, *SHAPE)) + sigma * torch.randn((1, *SHAPE))
    output = network(schedule.scale_model_input(x, timestep), timestep).sample
    theirs = schedule.step(output, timestep, x).pred_original_sample
    return Compared(denoiser.denoise(make_query(x, from_sigma([float(sigma)]))).mean, theirs)


@case("learned variance")
def _learned_variance(root: Path) -> Compared:
    schedule = scheduler(diffusers.DDPMScheduler, variance_type="learned_range")
    network = unet(out_channels=2 * SHAPE[0])
    return by_ddim(root, network, schedule)


@case("float64 weights")
def _float64(root: Path) -> Compared:
    network = unet()
    write_folder(root / "model", "kind: diffusers\n", unet=network.double(), scheduler=scheduler())
    denoiser = ModelRepository(root).load("model")
    x = random_images((4, *SHAPE))
    ours = denoiser.denoise(make_query(x, level_of(scheduler(), TIMESTEPS))).mean
    outputs = network.float()(x, TIMESTEPS).sample
    return Compared(ours, clean_images(scheduler(), outputs, x))


def flow(root: Path, schedule: Any) -> Compared:
    """Compare one step of a flow's scheduler with ours between the same levels."""
    network = unet()
    denoiser = served(root, unet=network, scheduler=schedule)
    schedule.set_timesteps(8)
    sigmas, timesteps = schedule.sigmas[:8], schedule.timesteps
    x = random_images((8, *SHAPE))
    outputs = network(x, timesteps).sample
    ours = denoiser.denoise(make_query(x, flow_level(sigmas.double().numpy()))).mean
    # x = (1-t)·x0 + t·ε, and the output is ε - x0.
    return Compared(ours, x - sigmas.view(-1, 1, 1, 1) * outputs)


def flow_level(t: Any) -> NoiseLevel:
    """Return the level of x = (1-t)·x0 + t·ε; that of pure noise ends at the highest legal one."""
    sigma = t / np.maximum(1 - t, t / MAX_SIGMA)
    return NoiseLevel(1 / (1 + sigma), sigma / (1 + sigma))


@case("`FlowMatchEulerDiscreteScheduler`")
def _flow_euler(root: Path) -> Compared:
    return flow(root, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))


@case("`FlowMatchHeunDiscreteScheduler`")
def _flow_heun(root: Path) -> Compared:
    network, schedule = unet(), diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    denoiser = served(root, unet=network, scheduler=schedule)
    schedule.set_timesteps(4)
    x = random_images((1, *SHAPE))
    sigma, timestep = schedule.sigmas[0], schedule.timesteps[0]
    output = network(x, timestep).sample
    ours = denoiser.denoise(make_query(x, flow_level(np.array([float(sigma)])))).mean
    return Compared(ours, x - sigma * output)


@case("`use_flow_sigmas`, UniPC")
def _flow_unipc(root: Path) -> Compared:
    fields = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 2.0}
    network, schedule = unet(), diffusers.UniPCMultistepScheduler(**fields)
    denoiser = served(root, unet=network, scheduler=schedule)
    schedule.set_timesteps(8)
    x = random_images((1, *SHAPE))
    # Its own timesteps are these numbers without their fractions.
    outputs = network(x, 1000 * schedule.sigmas[:1]).sample
    schedule._init_step_index(schedule.timesteps[0])
    theirs = schedule.convert_model_output(outputs, sample=x)
    sigmas = schedule.sigmas[:1].double().numpy()
    return Compared(denoiser.denoise(make_query(x, flow_level(sigmas))).mean, theirs)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_ddim_on_a_flow_takes_the_steps_of_their_euler(tmp_path: Path, shift: float) -> None:
    network, count = unet(), 10
    schedule = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    denoiser = served(tmp_path, unet=network, scheduler=schedule)
    noise = seeded_noise(3, 2, SHAPE)
    options = Options(steps=count, schedule=denoiser.info.levels)
    _, steps = run(SAMPLERS["ddim"](noise, options), answers_of(denoiser))
    # The grid of their pipelines: 1 … 1/N, then shifted.
    schedule.set_timesteps(sigmas=np.linspace(1, 1 / count, count).tolist())
    x = noise(0).float()
    for timestep in schedule.timesteps:
        x = schedule.step(network(x, timestep).sample, timestep, x).prev_sample
    assert error_of(Compared(steps[-1].x, x)) <= 1e-5


ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


@pytest.mark.slow
def test_ddim_from_pure_noise_takes_the_steps_of_theirs(tmp_path: Path) -> None:
    network, schedule, count = unet(), scheduler(**ZERO_SNR), 10
    denoiser = served(tmp_path, unet=network, scheduler=schedule)
    noise = seeded_noise(3, 2, SHAPE)
    options = Options(steps=count, schedule=denoiser.info.levels)
    _, steps = run(SAMPLERS["ddim"](noise, options), answers_of(denoiser))
    schedule.set_timesteps(count)
    x = noise(0).float()
    for timestep, step in zip(schedule.timesteps, steps, strict=True):
        x = schedule.step(network(x, timestep).sample, timestep, x).prev_sample
        assert error_of(Compared(step.x, x)) <= 1e-5


@latin(3, "sampler", "kind")
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", ["zero terminal SNR", "flow", "EDM"])
def test_every_sampler_ends_with_finite_images(tmp_path: Path, kind: str, sampler: str) -> None:
    schedules = {
        "zero terminal SNR": scheduler(**ZERO_SNR),
        "flow": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "EDM": diffusers.EDMEulerScheduler(),
    }
    denoiser = served(tmp_path, unet=unet(), scheduler=schedules[kind])
    options = Options(steps=5, schedule=denoiser.info.levels)
    _, steps = run(SAMPLERS[sampler](seeded_noise(3, 2, SHAPE), options), answers_of(denoiser))
    assert steps[-1].x.isfinite().all()
    assert float(steps[-1].x.abs().max()) < 1e3


def _edm(root: Path, name: str) -> Compared:
    network, schedule = unet(), getattr(diffusers, name)(sigma_data=0.7)
    denoiser = served(root, unet=network, scheduler=schedule)
    sigma = torch.tensor([0.01, 0.5, 3.0, 70.0])
    x = random_images((4, *SHAPE)) * (1 + sigma.view(-1, 1, 1, 1))
    column = sigma.view(-1, 1, 1, 1)
    scaled = schedule.precondition_inputs(x, column)
    outputs = network(scaled, schedule.precondition_noise(sigma)).sample
    theirs = schedule.precondition_outputs(x, outputs, column)
    return Compared(
        denoiser.denoise(make_query(x, from_sigma(sigma.double().numpy()))).mean, theirs
    )


CASES["`EDMEulerScheduler`"] = lambda root: _edm(root, "EDMEulerScheduler")
CASES["`EDMDPMSolverMultistepScheduler`"] = lambda root: _edm(
    root, "EDMDPMSolverMultistepScheduler"
)


def tiny_dit(**fields: Any) -> Any:
    torch.manual_seed(3)
    defaults: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 4,
        "in_channels": LATENT[0],
        "out_channels": 2 * LATENT[0],
        "num_layers": 2,
        "sample_size": LATENT[1],
        "num_embeds_ada_norm": 5,
    }
    network = diffusers.DiTTransformer2DModel(**defaults | fields).eval().requires_grad_(False)
    # Their initial values would make labels and times of no effect.
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


@case("`DiTTransformer2DModel`")
def _dit(root: Path) -> Compared:
    network = tiny_dit()
    denoiser = served(root, transformer=network, scheduler=scheduler())
    assert denoiser.info.label_count == 5
    x, labels = random_images((4, *LATENT)), [0, 4, -1, 2]
    rows = torch.tensor([0, 4, 5, 2])
    outputs = network(x, TIMESTEPS, rows).sample[:, : LATENT[0]]
    query = make_query(x, level_of(scheduler(), TIMESTEPS), labels)
    denoiser.check(query)
    return Compared(denoiser.denoise(query).mean, clean_images(scheduler(), outputs, x))


def test_a_dit_of_an_earlier_version_answers_the_same(tmp_path: Path) -> None:
    query = make_query(random_images((1, *LATENT)), from_sigma([1.0]), 3)
    repository = ModelRepository(tmp_path)
    parts = {"transformer": tiny_dit(), "scheduler": scheduler()}
    folder = write_folder(tmp_path / "model", "kind: diffusers\n", **parts)
    want = repository.load("model").denoise(query).pixels
    path = folder / "transformer" / "config.json"
    edit(path, _class_name="Transformer2DModel", num_vector_embeds=None, only_cross_attention=False)
    np.testing.assert_array_equal(repository.load("model").denoise(query).pixels, want)
    edit(path, norm_type="layer_norm")
    with pytest.raises(LoadError, match="_class_name: expected one of UNet2DModel, DiTTrans"):
        repository.load("model")


def decoded(root: Path, vae: Any) -> Compared:
    document = "kind: latent\n"
    denoiser = served(root, document, unet=conditional_unet(), vae=vae, scheduler=scheduler())
    assert isinstance(denoiser, LatentDenoiser)
    latents = random_images((2, *LATENT))
    theirs = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)
    return Compared(torch.from_numpy(denoiser.decode(latents.numpy())), theirs)


@case("`AutoencoderKL`")
def _kl(root: Path) -> Compared:
    return decoded(root, autoencoder())


@case("`AutoencoderTiny`")
def _tiny(root: Path) -> Compared:
    torch.manual_seed(4)
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    return decoded(root, vae.eval().requires_grad_(False))


@pytest.mark.parametrize("name", CASES)
def test_what_loads_equals_diffusers_to_the_error_in_the_table(tmp_path: Path, name: str) -> None:
    compared = CASES[name](tmp_path)
    assert compared.ours.shape == compared.theirs.shape
    assert error_of(compared) <= ERRORS[name]


def test_the_table_has_a_row_for_each_comparison() -> None:
    assert sorted(ERRORS) == sorted(CASES)
