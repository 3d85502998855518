"""Networks of diffusers: our conversions and samplers against their schedulers and pipelines."""

from __future__ import annotations

import sys
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
from tests.support.processes import printed
from torch import Tensor

from els_service.denoisers.base import Denoiser, make_query
from els_service.denoisers.levels import from_alpha_bar, from_sigma
from els_service.denoisers.noise import seeded_noise
from els_service.denoisers.samplers import SAMPLERS, Options, Step
from els_service.errors import InvalidArgumentError, LoadError
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


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("thresholding", True, "thresholding: expected one of False, got True"),
        ("rescale_betas_zero_snr", True, "rescale_betas_zero_snr: expected one of False"),
        ("prediction_type", "flow_prediction", "prediction_type: expected one of epsilon"),
        ("variance_type", "learned_range", "variance_type: expected one of fixed_small"),
        ("use_flow_sigmas", True, "use_flow_sigmas: expected one of False"),
        ("timestep_type", "continuous", "timestep_type: expected one of discrete"),
        ("solve_backwards", 1, "solve_backwards: expected no such field"),
        ("_class_name", "IPNDMScheduler", "_class_name: expected one of DDIMParallelScheduler"),
        ("num_train_timesteps", 10**9, "num_train_timesteps: expected 2 to 100000"),
        ("beta_schedule", "quadratic", "beta_schedule"),
        ("beta_end", 2.0, "beta_end"),
        ("beta_start", "a", "beta_start"),
        ("clip_sample_range", -1.0, "clip_sample_range: expected a positive number"),
    ],
)
def test_a_scheduler_that_means_something_else_is_refused_by_field(
    tmp_path: Path, field: str, value: object, reason: str
) -> None:
    folder = write_folder(tmp_path / "model", DOCUMENT, unet=unet(), scheduler=scheduler())
    path = folder / "scheduler" / "scheduler_config.json"
    edit(path, **{"clip_sample": True, field: value})
    with pytest.raises(LoadError) as error:
        ModelRepository(tmp_path).load("model")
    assert error.value.path == str(path)
    assert reason in error.value.reason


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("_class_name", "UNet3DConditionModel", "_class_name: expected one of UNet2DModel"),
        ("_class_name", None, "_class_name: expected"),
        ("sample_size", None, "sample_size: expected a number of pixels"),
        ("sample_size", [8, 7], "sample_size: expected"),
        ("out_channels", 4, "out_channels: expected 2, as in_channels"),
        ("time_embedding_type", "fourier", "time_embedding_type: expected one of positional"),
        ("class_embed_type", "timestep", "class_embed_type: expected one of None"),
        ("norm_num_groups", 3, "expected a configuration of UNet2DModel"),
        ("down_block_types", ["Magic"], "expected a configuration of UNet2DModel"),
        ("auto_map", {"AutoModel": "code.Model"}, "auto_map: expected no such field"),
    ],
)
def test_a_unet_that_no_denoiser_can_be_is_refused_by_field(
    tmp_path: Path, field: str, value: object, reason: str
) -> None:
    folder = write_folder(tmp_path / "model", DOCUMENT, unet=unet(), scheduler=scheduler())
    path = folder / "unet" / "config.json"
    edit(path, **{field: value})
    with pytest.raises(LoadError) as error:
        ModelRepository(tmp_path).load("model")
    assert error.value.path == str(path)
    assert reason in error.value.reason


def _changed(folder: Path, name: str, tensor: Tensor | None) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    tensors.pop(name, None)
    save_file(tensors if tensor is None else tensors | {name: tensor}, path)


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("conv_in.weight", None, "conv_in.weight: expected a tensor, found none"),
        ("conv_in.extra", torch.zeros(1), "conv_in.extra: expected no such tensor"),
        ("conv_in.bias", torch.zeros(9), "conv_in.bias: expected shape [8], got [9]"),
        ("conv_in.bias", torch.full((8,), torch.nan), "conv_in.bias: expected finite numbers"),
    ],
)
def test_weights_of_another_network_are_refused_by_tensor(
    tmp_path: Path, name: str, tensor: Tensor | None, reason: str
) -> None:
    folder = write_folder(tmp_path / "model", DOCUMENT, unet=unet(), scheduler=scheduler())
    _changed(folder, name, tensor)
    with pytest.raises(LoadError, match=r"safetensors") as error:
        ModelRepository(tmp_path).load("model")
    assert reason in error.value.reason


def test_weights_load_whatever_the_low_byte_of_their_header_length_is(tmp_path: Path) -> None:
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    small = unet(**blocks, block_out_channels=(4,))
    folder = write_folder(tmp_path / "model", DOCUMENT, unet=small, scheduler=scheduler())
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors, seen = load_file(path), set()
    repository = ModelRepository(tmp_path)
    for size in range(8, 264, 8):
        save_file(tensors, path, metadata={"format": "pt", "padding": "x" * size})
        assert repository.load("model").info.kind == "diffusers"
        seen.add(path.read_bytes()[0])
    assert seen == set(range(0, 256, 8))


def test_a_pickle_is_refused_unread_and_an_absent_or_torn_file_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", DOCUMENT, unet=unet(), scheduler=scheduler())
    repository = ModelRepository(tmp_path)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(LoadError, match=r"model\.bin: expected safetensors: a pickle can execute"):
        repository.load("model")
    weights.with_suffix(".bin").unlink()
    with pytest.raises(LoadError, match=r"model\.safetensors: expected a file, found none"):
        repository.load("model")
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(LoadError, match=r"config\.json: expected a readable JSON file"):
        repository.load("model")
    (folder / "unet" / "config.json").write_text("[]")
    with pytest.raises(LoadError, match=r"config\.json: expected a JSON object, got list"):
        repository.load("model")


@pytest.mark.parametrize("folder", ["..", "../..", "/etc", "link"])
def test_a_folder_outside_the_models_root_is_refused(tmp_path: Path, folder: str) -> None:
    write_folder(tmp_path / "secret", "", unet=unet(), scheduler=scheduler())
    root = tmp_path / "models"
    model = write_folder(root / "model", f"kind: diffusers\nfolder: {folder}\n")
    (model / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(LoadError):
        ModelRepository(root).load("model")


@pytest.mark.slow
def test_nothing_of_theirs_is_imported_unless_a_model_needs_it(tmp_path: Path) -> None:
    code = (
        "import sys, els_service.server.server, els_service.denoisers.pretrained.latent\n"
        "print(sorted({'diffusers', 'onnx', 'onnxruntime', 'transformers'} & set(sys.modules)))"
    )
    assert printed(code, tmp_path) == "[]\n"


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "model", DOCUMENT, unet=unet(), scheduler=scheduler())
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(LoadError, match=r"kind: expected an installation with the extra"):
        ModelRepository(tmp_path).load("model")


_TOGETHER = """
import sys
import threading

from els_service.denoisers.pretrained import folder

start, found = threading.Barrier(8), []


def load(name):
    start.wait()
    found.append(folder._diffusers(name).__name__)


names = 4 * ["UNet2DModel", "UNet2DConditionModel"]
threads = [threading.Thread(target=load, args=(name,)) for name in names]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
sys.exit(sorted(found) != sorted(names))
"""


@pytest.mark.slow
def test_models_that_load_side_by_side_import_diffusers_once_at_a_time(tmp_path: Path) -> None:
    assert printed(_TOGETHER, tmp_path) == ""
