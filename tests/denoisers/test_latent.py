"""Latent diffusion: conditions, guidance and decoding against the parts and loops of diffusers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LDMPipeline
from safetensors.torch import load_file, save_file
from tests.support.denoisers import random_images, run
from tests.support.pretrained import (
    LATENT,
    WIDTH,
    autoencoder,
    conditional_unet,
    edit,
    scheduler,
    unet,
    write_folder,
)
from torch import Tensor

from els_service.denoisers.base import Condition, concatenate, make_query
from els_service.denoisers.levels import from_alpha_bar, from_sigma
from els_service.denoisers.noise import seeded_noise
from els_service.denoisers.pretrained.latent import LatentDenoiser
from els_service.denoisers.samplers import SAMPLERS, DenoiseCall, Options, sample
from els_service.errors import InvalidArgumentError, LoadError
from els_service.repository import ModelRepository

COUNT, N, ROWS = 2, 5, 7
DOCUMENT = "kind: latent\nfolder: pipeline\n"
NOISE = seeded_noise(4, COUNT, LATENT)


def parts() -> dict[str, Any]:
    return {"unet": conditional_unet(), "vae": autoencoder(), "scheduler": scheduler()}


def write(root: Path, document: str = DOCUMENT, **replaced: Any) -> Path:
    write_folder(root / "model" / "pipeline", "", **parts() | replaced)
    return write_folder(root / "model", document)


def load(root: Path) -> LatentDenoiser:
    denoiser = ModelRepository(root).load("model")
    assert isinstance(denoiser, LatentDenoiser)
    return denoiser


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> LatentDenoiser:
    root = tmp_path_factory.mktemp("models")
    write(root)
    return load(root)


def states(seed: int, rows: int = ROWS, count: int = COUNT) -> Tensor:
    return random_images((count, rows, WIDTH), seed) * 4


def conditions(seed: int = 0, guidance: float = 1.0, rows: int = ROWS) -> list[Condition]:
    pairs = zip(states(seed, rows).numpy(), states(seed + 1, rows).numpy(), strict=True)
    if guidance == 1:
        return [Condition(given) for given, _ in pairs]
    return [Condition(given, without, guidance) for given, without in pairs]


def assert_close(got: Tensor, want: Tensor) -> None:
    # float32 on either side: 1e-5 of the norm.
    difference = torch.linalg.vector_norm(got.double() - want.double())
    assert difference <= 1e-5 * torch.linalg.vector_norm(want.double())


@pytest.mark.slow
def test_a_model_says_what_its_latents_are_and_what_they_decode_to(
    denoiser: LatentDenoiser,
) -> None:
    info = denoiser.info
    assert (info.kind, info.machine) == ("latent", "UNet2DConditionModel")
    assert (info.shape, info.decoded_shape) == (LATENT, (3, 16, 16))
    assert (info.condition_rows, info.condition_width) == (77, WIDTH)
    assert info.memory_bytes > 0


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_guided_ddim_takes_the_steps_of_their_loop(
    denoiser: LatentDenoiser, guidance: float
) -> None:
    given = conditions(guidance=guidance)
    options = Options(steps=N, schedule=denoiser.info.levels)

    def answer(ask: DenoiseCall) -> Tensor:
        query = make_query(ask.x.float(), ask.level, conditions=given)
        return denoiser.denoise(query).mean.double()

    _, steps = run(SAMPLERS["ddim"](NOISE, options), answer)
    network, schedule = conditional_unet(), scheduler()
    schedule.set_timesteps(N)
    x = NOISE(0).float()
    prompts = torch.cat([states(1), states(0)])  # unconditional first, as in their pipelines
    for timestep, step in zip(schedule.timesteps, steps, strict=True):
        inputs = schedule.scale_model_input(torch.cat([x, x]), timestep)
        without, conditional = network(inputs, timestep, prompts).sample.chunk(2)
        guided = without + guidance * (conditional - without)
        x = schedule.step(guided, timestep, x).prev_sample
        assert_close(step.x, x)


# Of their pipelines those with text are importable only beside it.
@pytest.mark.skipif(
    find_spec("transformers") is None, reason="needs transformers: pip install transformers"
)
# Its optional parts warn of each other.
@pytest.mark.filterwarnings("ignore")
def test_guided_ddim_takes_the_steps_of_stable_diffusion(denoiser: LatentDenoiser) -> None:
    from diffusers import StableDiffusionPipeline

    reached = []

    def note(_: Any, __: int, ___: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        reached.append(tensors["latents"])
        return tensors

    pipeline = StableDiffusionPipeline(
        **parts() | {"scheduler": scheduler(steps_offset=1)},
        **dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor")),
        requires_safety_checker=False,
    )
    images = pipeline(
        prompt_embeds=states(0),
        negative_prompt_embeds=states(1),
        guidance_scale=7.5,
        num_inference_steps=N,
        latents=NOISE(0).float(),
        height=16,
        width=16,
        output_type="np",
        callback_on_step_end=note,
    ).images
    options = Options(steps=N, schedule=denoiser.info.levels)
    given = conditions(guidance=7.5)

    def answer(ask: DenoiseCall) -> Tensor:
        query = make_query(ask.x.float(), ask.level, conditions=given)
        return denoiser.denoise(query).mean.double()

    _, steps = run(SAMPLERS["ddim"](NOISE, options), answer)
    for step, state in zip(steps, reached, strict=True):
        assert_close(step.x, state)
    ours = torch.from_numpy(denoiser.decode(steps[-1].x.float().numpy()))
    assert_close((ours / 2 + 0.5).permute(0, 2, 3, 1), torch.from_numpy(np.array(images)))


def test_sampled_latents_decode_to_the_images_of_their_vae(denoiser: LatentDenoiser) -> None:
    options = Options(steps=N, schedule=denoiser.info.levels)
    *_, last = sample(denoiser, count=COUNT, options=options, conditions=conditions()[:1])
    latents = last.x.float()
    vae = autoencoder()
    want = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)
    assert_close(torch.from_numpy(denoiser.decode(latents.numpy())), want)
    assert denoiser.decode((1e3 * latents).numpy()).max() <= 1


def test_an_unconditional_folder_ends_where_their_pipeline_does(tmp_path: Path) -> None:
    network = unet(sample_size=8, in_channels=4, out_channels=4)
    vae = autoencoder(scaling_factor=0.7)
    write(tmp_path, unet=network, vae=vae)
    denoiser = load(tmp_path)
    assert not denoiser.info.condition_width
    pipeline = LDMPipeline(vqvae=vae, unet=network, scheduler=scheduler())
    pipeline.set_progress_bar_config(disable=True)
    want = pipeline(
        batch_size=COUNT,
        generator=torch.Generator().manual_seed(6),
        num_inference_steps=N,
        output_type="np",
    ).images
    start = torch.randn((COUNT, *LATENT), generator=torch.Generator().manual_seed(6)).double()
    options = Options(steps=N, schedule=denoiser.info.levels)

    def answer(ask: DenoiseCall) -> Tensor:
        return denoiser.denoise(make_query(ask.x.float(), ask.level)).mean.double()

    _, steps = run(SAMPLERS["ddim"](lambda _: start, options), answer)
    images = denoiser.decode(steps[-1].x.float().numpy())
    assert_close(
        torch.from_numpy(images / 2 + 0.5).permute(0, 2, 3, 1), torch.from_numpy(np.array(want))
    )


def test_images_of_a_batch_keep_their_own_conditions_lengths_and_guidance(
    denoiser: LatentDenoiser,
) -> None:
    x = random_images((8, *LATENT))
    level = from_sigma(np.geomspace(0.1, 20, 8))
    mixed = [
        *conditions(0),
        *conditions(2, guidance=3.0),
        *conditions(4, guidance=-1.0, rows=77),
        *conditions(6, rows=1),
    ]
    query = make_query(x, level, conditions=mixed)
    denoiser.check(query)
    alone = [denoiser.denoise(query[i : i + 1]).mean for i in range(8)]
    together = denoiser.denoise(concatenate([query[:3], query[3:4], query[4:]])).mean
    for i in range(8):
        assert_close(together[i : i + 1], alone[i])
    # Each answer depends on what its own image was given.
    for i, other in enumerate(conditions(8) * 4):
        changed = make_query(x[i : i + 1], level[i : i + 1], conditions=[other])
        assert not torch.allclose(denoiser.denoise(changed).mean, alone[i], rtol=1e-3, atol=1e-5)
    assert denoiser.predict_seconds(query[2:3]) > denoiser.predict_seconds(query[:1])


def test_guidance_of_nothing_is_the_unconditional_answer(denoiser: LatentDenoiser) -> None:
    given, without = states(0).numpy(), states(1).numpy()
    x, level = random_images((COUNT, *LATENT)), from_alpha_bar([0.5])
    nothing = [Condition(a, b, 0.0) for a, b in zip(given, without, strict=True)]
    plain = [Condition(b) for b in without]
    got, want = (
        denoiser.denoise(make_query(x, level, conditions=each)).mean for each in (nothing, plain)
    )
    assert_close(got, want)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([], r"conditioning: expected \[1 to 77, 6\] for each image, got none"),
        ([Condition(np.zeros((2, 5), np.float32))], "conditioning: expected"),
        ([Condition(np.zeros((78, 6), np.float32))], "conditioning: expected"),
        (
            [Condition(np.zeros((2, 6), np.float32), np.zeros((1, 6), np.float32), 2.0)],
            r"unconditional: expected shape \[2, 6\], as conditioning, got \[1, 6\]",
        ),
    ],
)
def test_a_query_with_a_wrong_condition_is_refused(
    denoiser: LatentDenoiser, given: list[Condition], reason: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=reason):
        denoiser.check(make_query(random_images((1, *LATENT)), from_sigma([1.0]), (), (), given))


def test_as_many_conditions_as_images_or_one_or_none() -> None:
    with pytest.raises(InvalidArgumentError, match="conditioning: expected none, 1 or 3"):
        make_query(random_images((3, *LATENT)), from_sigma([1.0]), conditions=conditions())


@pytest.mark.parametrize(
    ("part", "fields", "reason"),
    [
        ("unet", {"addition_embed_type": "text_time"}, "addition_embed_type: expected one of None"),
        ("unet", {"time_cond_proj_dim": 8}, "time_cond_proj_dim: expected one of None"),
        ("unet", {"cross_attention_dim": [6, 6]}, "cross_attention_dim: expected one number"),
        ("unet", {"in_channels": 9}, "out_channels: expected 9, as in_channels"),
        ("vae", {"_class_name": "VQModel"}, "_class_name: expected one of AutoencoderKL"),
        ("vae", {"latent_channels": 3}, "latent_channels: expected 4, as the unet's in_channels"),
        ("vae", {"scaling_factor": None}, "scaling_factor: expected a positive number"),
        ("vae", {"shift_factor": "a"}, "shift_factor: expected a number"),
        ("vae", {"latents_mean": [0.0] * 4}, "latents_mean: expected one of None"),
    ],
)
def test_a_part_that_does_not_fit_is_refused_by_field(
    tmp_path: Path, part: str, fields: dict[str, object], reason: str
) -> None:
    path = write(tmp_path) / "pipeline" / part / "config.json"
    edit(path, **fields)
    with pytest.raises(LoadError) as error:
        load(tmp_path)
    assert error.value.path == str(path)
    assert reason in error.value.reason


@pytest.mark.slow
def test_a_vae_that_is_no_number_or_no_safetensors_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path) / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["decoder.conv_out.bias"][0] = torch.inf
    save_file(tensors, path)
    with pytest.raises(LoadError, match=r"decoder\.conv_out\.bias: expected finite numbers"):
        load(tmp_path)
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(LoadError, match=r"vae/diffusion_pytorch_model\.bin: expected safetensors"):
        load(tmp_path)
