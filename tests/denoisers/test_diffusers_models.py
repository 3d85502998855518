"""Networks of diffusers: our conversions and samplers against their schedulers and pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from safetensors.torch import load_file, save_file
from tests.support.denoisers import answers_of, random_images, run
from tests.support.pretrained import SHAPE, STEPS, edit, scheduler, unet, write_folder
from torch import Tensor

from els_service.denoisers.base import Denoiser, make_query
from els_service.denoisers.levels import from_alpha_bar, from_sigma
from els_service.denoisers.noise import seeded_noise
from els_service.denoisers.samplers import SAMPLERS, Options, Step
from els_service.errors import InvalidArgumentError
from els_service.repository import ModelRepository

# Some of their schedulers convert tensors as numpy 1 did; ours never make these.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

COUNT, N = 2, 10
PREDICTIONS = ("epsilon", "sample", "v_prediction")
DOCUMENT = "kind: diffusers\n"
NOISE = seeded_noise(3, COUNT, SHAPE)


def served(
    root: Path, network: Any, schedule: Any, document: str = DOCUMENT, name: str = "model"
) -> Denoiser:
    write_folder(root / name, document, unet=network, scheduler=schedule)
    return ModelRepository(root).load(name)


def steps_of(denoiser: Denoiser, sampler: str, labels: int = -1, **options: Any) -> list[Step]:
    chosen = Options(steps=N, schedule=denoiser.info.levels, **options)
    _, steps = run(SAMPLERS[sampler](NOISE, chosen), answers_of(denoiser, labels))
    return steps


def assert_close(got: Tensor, want: Tensor) -> None:
    # float32 on either side, of a state in float64 here: 1e-5 of the image's norm.
    difference = torch.linalg.vector_norm(got.double() - want.double())
    assert difference <= 1e-5 * torch.linalg.vector_norm(want.double())


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_d_is_what_their_scheduler_makes_of_the_same_output(
    tmp_path: Path, prediction: str
) -> None:
    network, schedule = unet(), scheduler(prediction_type=prediction)
    denoiser = served(tmp_path, network, schedule)
    schedule.set_timesteps(STEPS)
    timesteps = torch.tensor([0, 7, 50, STEPS - 1])
    x = random_images((4, *SHAPE))
    level = from_alpha_bar(schedule.alphas_cumprod[timesteps].double().numpy())
    got = denoiser.denoise(make_query(x, level)).mean
    outputs = network(x, timesteps).sample
    for i, timestep in enumerate(timesteps):
        step = schedule.step(outputs[i : i + 1], int(timestep), x[i : i + 1])
        assert_close(got[i : i + 1], step.pred_original_sample)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_takes_the_steps_of_theirs(tmp_path: Path, prediction: str) -> None:
    network, schedule = unet(), scheduler(prediction_type=prediction)
    steps = steps_of(served(tmp_path, network, schedule), "ddim")
    schedule.set_timesteps(N)
    x = NOISE(0).float()
    for timestep, step in zip(schedule.timesteps, steps, strict=True):
        taken = schedule.step(network(x, timestep).sample, timestep, x)
        x = taken.prev_sample
        assert_close(step.x, x)
        assert_close(step.denoised, taken.pred_original_sample)


def test_ddim_ends_where_their_pipeline_does(tmp_path: Path) -> None:
    network, schedule = unet(), scheduler(prediction_type="v_prediction")
    denoiser = served(tmp_path, network, schedule)
    pipeline = DDIMPipeline(network, schedule)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=COUNT,
        generator=torch.Generator().manual_seed(5),
        num_inference_steps=N,
        output_type="np",
    ).images
    start = torch.randn((COUNT, *SHAPE), generator=torch.Generator().manual_seed(5)).double()
    options = Options(steps=N, schedule=denoiser.info.levels)
    _, steps = run(SAMPLERS["ddim"](lambda _: start, options), answers_of(denoiser))
    ours = (steps[-1].x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert_close(ours, torch.from_numpy(images))


@pytest.mark.parametrize("clip", [False, True])
def test_ddpm_takes_the_steps_of_theirs_with_the_same_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: bool
) -> None:
    network = unet()
    schedule = scheduler(DDPMScheduler, clip_sample=clip, clip_sample_range=0.8)
    steps = steps_of(served(tmp_path, network, schedule), "ddpm")
    schedule.set_timesteps(N)
    x = NOISE(0).float()
    for i, (timestep, step) in enumerate(zip(schedule.timesteps, steps, strict=True), 1):
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor",
            lambda *_, draw=i, **__: NOISE(draw).float(),
        )
        taken = schedule.step(network(x, timestep).sample, timestep, x)
        x = taken.prev_sample
        assert_close(step.x, x)
        assert_close(step.denoised, taken.pred_original_sample)


def test_ddim_with_clipping_is_theirs_with_the_noise_of_the_clipped_image(tmp_path: Path) -> None:
    network, schedule = unet(), scheduler(clip_sample=True, clip_sample_range=0.5)
    steps = steps_of(served(tmp_path, network, schedule), "ddim")
    schedule.set_timesteps(N)
    x = NOISE(0).float()
    for timestep, step in zip(schedule.timesteps, steps, strict=True):
        output = network(x, timestep).sample
        x = schedule.step(output, timestep, x, use_clipped_model_output=True).prev_sample
        assert_close(step.x, x)
    assert float(steps[-1].x.abs().max()) <= 0.5


@pytest.mark.slow
def test_heun_takes_the_steps_of_theirs_on_our_levels(tmp_path: Path) -> None:
    network = unet()
    schedule = scheduler(HeunDiscreteScheduler, prediction_type="v_prediction")
    denoiser = served(tmp_path, network, schedule)
    asks, steps = run(
        SAMPLERS["heun"](NOISE, Options(steps=N, schedule=denoiser.info.levels)),
        answers_of(denoiser),
    )
    schedule.set_timesteps(N)
    sigmas = np.array([float(ask.level.sigma[0]) for ask in asks])
    trained = np.sqrt((1 - schedule.alphas_cumprod.numpy()) / schedule.alphas_cumprod.numpy())
    # Theirs would choose other levels: each is given once, those between twice.
    schedule.sigmas = torch.tensor([*sigmas, 0.0], dtype=torch.float32)
    schedule.timesteps = torch.from_numpy(schedule._sigma_to_t(sigmas, np.log(trained)))
    schedule.set_begin_index(0)
    x = NOISE(0).float() * np.sqrt(1 + sigmas[0] ** 2)
    reached = []
    for timestep in schedule.timesteps:
        output = network(schedule.scale_model_input(x, timestep), timestep.float()).sample
        x = schedule.step(output, timestep, x).prev_sample.float()
        if schedule.state_in_first_order:
            reached.append(x)
    reached.append(x)
    for step, state in zip(steps, reached, strict=True):
        assert_close(step.state, state)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [PNDMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, DPMSolverMultistepScheduler],
)
def test_every_scheduler_says_the_same_levels(tmp_path: Path, kind: Any) -> None:
    network = unet()
    for name, schedule in (("theirs", scheduler(kind)), ("ours", scheduler())):
        served(tmp_path, network, schedule, name=name)
    # A field of others, as Stable Diffusion's has; theirs takes no notice of it either.
    if kind is PNDMScheduler:
        edit(tmp_path / "theirs" / "scheduler" / "scheduler_config.json", clip_sample=True)
    query = make_query(random_images((2, *SHAPE)), from_sigma([0.3, 3.0]))
    repository = ModelRepository(tmp_path)
    theirs, ours = (repository.load(name).denoise(query).pixels for name in ("theirs", "ours"))
    np.testing.assert_array_equal(theirs, ours)


def test_between_timesteps_the_network_is_told_a_fraction_and_beyond_them_the_end(
    tmp_path: Path,
) -> None:
    network, schedule = unet(), scheduler()
    denoiser = served(tmp_path, network, schedule)
    log_sigma = np.log(1 / schedule.alphas_cumprod.double().numpy() - 1) / 2
    sigma = np.exp([(log_sigma[40] + log_sigma[41]) / 2, log_sigma[0] - 2])
    x = random_images((2, *SHAPE))
    got = denoiser.denoise(make_query(x, from_sigma(sigma))).mean
    a = torch.from_numpy(1 / np.sqrt(1 + sigma**2)).float().view(-1, 1, 1, 1)
    noise = network(x * a, torch.tensor([40.5, 0.0])).sample
    assert_close(got, x - torch.from_numpy(sigma).float().view(-1, 1, 1, 1) * noise)
    # Far above the trained levels D hardly depends on x, and is no larger for it.
    high = from_sigma([1e5, 1e6])
    answers = denoiser.denoise(make_query(x * torch.tensor([1e5, 1e6]).view(-1, 1, 1, 1), high))
    at_top = denoiser.denoise(make_query(x * 24, from_sigma([24.0]))).mean
    assert float(answers.mean.abs().max()) < 2 * float(at_top.abs().max())


def test_a_network_that_learned_its_timesteps_is_told_the_nearest(tmp_path: Path) -> None:
    network = unet(time_embedding_type="learned", num_train_timesteps=STEPS)
    schedule = scheduler()
    denoiser = served(tmp_path, network, schedule)
    sigma = 1.01 * np.sqrt(1 / schedule.alphas_cumprod.double().numpy() - 1)[[40]]
    x = random_images((1, *SHAPE))
    noise = network(x / float(np.sqrt(1 + sigma[0] ** 2)), torch.tensor([40])).sample
    got = denoiser.denoise(make_query(x, from_sigma(sigma))).mean
    assert_close(got, x - float(sigma[0]) * noise)


@pytest.mark.parametrize("null", [False, True])
def test_each_image_has_its_own_label(tmp_path: Path, null: bool) -> None:
    network, schedule = unet(num_class_embeds=4), scheduler()
    document = DOCUMENT + f"null_label: {str(null).lower()}\n"
    denoiser = served(tmp_path, network, schedule, document)
    assert denoiser.info.label_count == 4 - null
    labels = [2, -1, 0] if null else [2, 3, 0]
    x = random_images((3, *SHAPE))
    query = make_query(x, from_alpha_bar(schedule.alphas_cumprod[[30]].double().numpy()), labels)
    denoiser.check(query)
    noise = network(x, 30, class_labels=torch.tensor([2, 3, 0])).sample
    want = schedule.step(noise, 30, x) if schedule.set_timesteps(STEPS) is None else None
    assert want is not None
    assert_close(denoiser.denoise(query).mean, want.pred_original_sample)
    if not null:
        with pytest.raises(InvalidArgumentError, match="requires a label"):
            denoiser.check(make_query(x, from_sigma([1.0])))


def test_a_result_is_the_same_alone_and_in_company_to_rounding(tmp_path: Path) -> None:
    denoiser = served(tmp_path, unet(), scheduler())
    sigmas = np.geomspace(0.05, 20, 19)
    query = make_query(random_images((19, *SHAPE)), from_sigma(sigmas))
    together = denoiser.denoise(query).mean
    for i in (0, 15, 16, 18):
        assert_close(together[i : i + 1], denoiser.denoise(query[i : i + 1]).mean)
    assert not denoiser.info.batch_invariant
    assert denoiser.predict_seconds(query) > denoiser.predict_seconds(query[:1]) > 0


def test_tensors_named_as_before_diffusers_0_15_are_understood(tmp_path: Path) -> None:
    network = unet()
    want = served(tmp_path, network, scheduler(), name="new")
    folder = write_folder(tmp_path / "old", DOCUMENT, unet=network, scheduler=scheduler())
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {}
    for name, tensor in load_file(path).items():
        old = name.replace("to_q", "query").replace("to_k", "key").replace("to_v", "value")
        tensors[old.replace("to_out.0", "proj_attn")] = tensor.clone()
    save_file(tensors, path)
    query = make_query(random_images((1, *SHAPE)), from_sigma([1.0]))
    got = ModelRepository(tmp_path).load("old")
    np.testing.assert_array_equal(got.denoise(query).pixels, want.denoise(query).pixels)
