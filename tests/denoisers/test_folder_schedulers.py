"""Trajectories with the folder's timesteps draw the pictures of diffusers' own schedulers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from tests.support.denoisers import Answer, run
from tests.support.pretrained import LEVELS, SHAPE, STEPS, edit, unet, write_folder
from torch import Tensor

from els_service.denoisers.base import Denoiser, concatenate, make_query
from els_service.denoisers.folder_scheduler import scheduler_of
from els_service.denoisers.levels import from_sigma
from els_service.denoisers.noise import seeded_noise
from els_service.denoisers.samplers import (
    SAMPLERS,
    DenoiseCall,
    Resume,
    Step,
    check_options,
    options_for,
)
from els_service.errors import InvalidArgumentError
from els_service.repository import ModelRepository

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

COUNT = 2
NOISE = seeded_noise(3, COUNT, SHAPE)
KINDS = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
}
SPACINGS = ("leading", "trailing", "linspace")


def network() -> Any:
    """Return the least of networks: what is compared is how it is called."""
    return unet(
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        block_out_channels=(8,),
        add_attention=False,
    )


def served(root: Path, schedule: Any) -> Denoiser:
    write_folder(root / "model", "kind: diffusers\n", unet=network(), scheduler=schedule)
    return ModelRepository(root).load("model")


def answer_of(denoiser: Denoiser) -> Answer:
    def answer(ask: DenoiseCall) -> Tensor:
        query = make_query(ask.x.float(), ask.level)
        if ask.unclipped:
            query.unclipped = np.ones(len(query), np.bool_)
        return denoiser.denoise(query).mean.double()

    return answer


def ours(denoiser: Denoiser, sampler: str, n: int, **options: Any) -> list[Step]:
    chosen = options_for(denoiser.info, steps=n, scheduler=denoiser.info.scheduler, **options)
    check_options(sampler, chosen)
    return run(SAMPLERS[sampler](NOISE, chosen), answer_of(denoiser))[1]


def theirs(schedule: Any, n: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Return what a pipeline does with a scheduler: scale the noise, then step by step."""
    asked = network()
    schedule.set_timesteps(n)
    x: Tensor = NOISE(0).float() * schedule.init_noise_sigma
    for i, timestep in enumerate(schedule.timesteps, 1):
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor",
            lambda *_, draw=i, **__: NOISE(draw).float(),
        )
        output = asked(schedule.scale_model_input(x, timestep), timestep).sample
        x = schedule.step(output, timestep, x).prev_sample
    return x


def error(got: Tensor, want: Tensor) -> float:
    """Return the difference relative to the norm of the images."""
    norm = torch.linalg.vector_norm
    return float(norm(got.double() - want.double()) / norm(want.double()))


SAME: dict[str, tuple[str, int, dict[str, Any]]] = {
    "ddim": ("ddim", 10, {}),
    "ddim leading from 1": ("ddim", 10, {"steps_offset": 1, "set_alpha_to_one": False}),
    "ddim trailing": ("ddim", 10, {"timestep_spacing": "trailing"}),
    "ddim of v": ("ddim", 10, {"prediction_type": "v_prediction"}),
    "ddim of x0": ("ddim", 10, {"prediction_type": "sample"}),
    "ddim clipped": ("ddim", 10, {"clip_sample": True, "clip_sample_range": 0.5}),
    "ddim in all steps": ("ddim", STEPS, {}),
    "ddpm": ("ddpm", 10, {}),
    "ddpm leading from 1": ("ddpm", 10, {"steps_offset": 1}),
    "ddpm trailing": ("ddpm", 10, {"timestep_spacing": "trailing"}),
    "ddpm trailing uneven": ("ddpm", 70, {"timestep_spacing": "trailing"}),
    "ddpm linspace": ("ddpm", 10, {"timestep_spacing": "linspace"}),
    "ddpm clipped": ("ddpm", 10, {"clip_sample": True, "clip_sample_range": 0.5}),
    "ddpm small log": ("ddpm", 10, {"variance_type": "fixed_small_log"}),
    "ddpm large": ("ddpm", 10, {"variance_type": "fixed_large"}),
    "euler leading": ("euler", 10, {"timestep_spacing": "leading", "steps_offset": 1}),
    "euler trailing": ("euler", 10, {"timestep_spacing": "trailing"}),
    "euler linspace": ("euler", 8, {"timestep_spacing": "linspace"}),
    "euler leading Karras": (
        *("euler", 10),
        {"timestep_spacing": "leading", "steps_offset": 1, "use_karras_sigmas": True},
    ),
    "dpmpp_2m": ("dpmpp_2m", 10, {}),
    "dpmpp_2m of 20": ("dpmpp_2m", 20, {}),
    "dpmpp_2m leading": ("dpmpp_2m", 10, {"timestep_spacing": "leading", "steps_offset": 1}),
    "dpmpp_2m trailing": ("dpmpp_2m", 10, {"timestep_spacing": "trailing"}),
    "dpmpp_2m of v": ("dpmpp_2m", 10, {"prediction_type": "v_prediction"}),
}
"""Name → sampler, steps and fields for which our pictures are theirs up to float32."""


def scheduler(sampler: str, fields: dict[str, Any]) -> Any:
    clip = {"clip_sample": False} if sampler in ("ddim", "ddpm") else {}
    return KINDS[sampler](**LEVELS | clip | fields)


@pytest.mark.parametrize("name", SAME)
def test_the_folder_s_timesteps_draw_the_pictures_of_the_folder_s_scheduler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    sampler, n, fields = SAME[name]
    schedule = scheduler(sampler, fields)
    steps = ours(served(tmp_path, schedule), sampler, n)
    assert [step.index for step in steps] == list(range(1, n + 1))
    # float32 on either side, of a state in float64 here.
    assert error(steps[-1].x, theirs(schedule, n, monkeypatch)) < 5e-5


OTHER: dict[str, tuple[str, int, dict[str, Any], float, str]] = {
    "ddim trailing uneven": (
        *("ddim", 70, {"timestep_spacing": "trailing"}, 1.56),
        "its next step assumes another level",
    ),
    "ddim linspace": (
        *("ddim", 10, {"timestep_spacing": "linspace"}, 0.295),
        "its next step assumes another level",
    ),
    "ddpm large trailing": (
        *("ddpm", 10, {"variance_type": "fixed_large", "timestep_spacing": "trailing"}, 0.0084),
        "adds noise after the last step",
    ),
    "euler trailing Karras": (
        *("euler", 10, {"timestep_spacing": "trailing", "use_karras_sigmas": True}, 0.0079),
        "ends above the lowest trained level",
    ),
    "dpmpp_2m Karras": (
        *("dpmpp_2m", 10, {"use_karras_sigmas": True}, 0.00029),
        "rounds the timestep of a level",
    ),
}
"""Name → sampler, steps, fields, by how much our pictures differ from theirs, and why."""
PAGE = Path(__file__).parents[2] / "docs" / "sampling.md"


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.slow
def test_where_a_scheduler_contradicts_itself_its_pictures_are_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    sampler, n, fields, differs, _ = OTHER[name]
    schedule = scheduler(sampler, fields)
    steps = ours(served(tmp_path, schedule), sampler, n)
    found = error(steps[-1].x, theirs(schedule, n, monkeypatch))
    assert found == pytest.approx(differs, rel=0.2)


def rows() -> Iterator[str]:
    """Yield the lines of the table of docs/sampling.md."""
    for sampler, n, fields in SAME.values():
        yield f"| {_asked(sampler, n, fields)} | none: below 5·10⁻⁵ | |"
    for sampler, n, fields, differs, why in OTHER.values():
        yield f"| {_asked(sampler, n, fields)} | {differs:g} | {why} |"


def _asked(sampler: str, n: int, fields: dict[str, Any]) -> str:
    listed = ", ".join(f"`{name}={value}`" for name, value in fields.items())
    return f"`{sampler}` | {KINDS[sampler].__name__} | {n} of {STEPS} | {listed or 'defaults'}"


def test_the_page_on_sampling_has_the_table_that_these_tests_prove() -> None:
    table = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert [line for line in table if f" of {STEPS} |" in line] == list(rows())


def test_ddim_of_501_trailing_steps_keeps_the_variance_where_theirs_is_41_percent_too_strong() -> (
    None
):
    variance = 0.25
    schedule = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    schedule.set_timesteps(501)
    levels = schedule.alphas_cumprod.double()
    begin = (levels[-1] * variance + 1 - levels[-1]).sqrt()
    x = begin
    for timestep in schedule.timesteps:
        a2 = levels[timestep]
        # The ε of x under N(0, variance), exactly.
        eps = (1 - a2).sqrt() * x / (a2 * variance + 1 - a2)
        x = schedule.step(eps, timestep, x).prev_sample
    assert float(x) / math.sqrt(variance) == pytest.approx(1.41, abs=0.01)
    sigma = np.sqrt(1 / levels.numpy() - 1)
    ours = scheduler_of("DDIMScheduler", dict(schedule.config), sigma, None)
    state = float(begin)
    for (a, s), (a_next, s_next) in itertools.pairwise(ours.preserving(501)):
        total = a * a * variance + s * s
        state *= (a_next * a * variance + s_next * s) / total
    assert state / math.sqrt(variance) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("n", [10, 20])
def test_a_karras_ramp_of_euler_under_trailing_ends_at_the_lowest_trained_level(n: int) -> None:
    schedule = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        use_karras_sigmas=True,
    )
    schedule.set_timesteps(n)
    alpha_bar = schedule.alphas_cumprod.double().numpy()
    sigma = np.sqrt(1 / alpha_bar - 1)
    ours = scheduler_of("EulerDiscreteScheduler", dict(schedule.config), sigma, None)
    levels = ours.exploding("euler", n)
    assert levels[0] == pytest.approx(float(schedule.sigmas[0]), rel=1e-5)
    assert levels[-2:] == [pytest.approx(sigma[0]), 0.0]
    assert float(schedule.sigmas[-2]) > 5 * sigma[0]


@pytest.mark.parametrize("sampler", KINDS)
def test_a_trajectory_of_the_folder_s_timesteps_goes_on_from_any_step_with_the_same_bits(
    tmp_path: Path, sampler: str
) -> None:
    fields = {"clip_sample": True} if sampler in ("ddim", "ddpm") else {}
    denoiser = served(tmp_path, scheduler(sampler, fields))
    whole = ours(denoiser, sampler, 4)
    options = options_for(denoiser.info, steps=4, scheduler=denoiser.info.scheduler)
    for taken in range(1, 4):
        resume = Resume(taken, whole[taken - 1].state)
        _, rest = run(SAMPLERS[sampler](NOISE, options, resume), answer_of(denoiser))
        assert [step.index for step in rest] == list(range(taken + 1, 5))
        assert all(
            torch.equal(one.x, other.x) for one, other in zip(rest, whole[taken:], strict=True)
        )


def test_a_folder_of_another_scheduler_lends_its_fields_to_every_sampler(tmp_path: Path) -> None:
    schedule = PNDMScheduler(**LEVELS, steps_offset=1, set_alpha_to_one=False)
    info = served(tmp_path, schedule).info
    assert info.scheduler is not None
    assert (info.scheduler.name, info.scheduler.spacing) == ("PNDMScheduler", "leading")
    assert (info.scheduler.steps_offset, info.scheduler.set_alpha_to_one) == (1, False)
    assert info.scheduler.samplers == ("ddim", "ddpm", "euler", "dpmpp_2m")
    want = DDIMScheduler.from_config(schedule.config, clip_sample=False)
    want.set_timesteps(10)
    got = options_for(info, steps=10, scheduler=info.scheduler)
    asks, _ = run(SAMPLERS["ddim"](NOISE, got), lambda ask: torch.zeros_like(ask.x))
    np.testing.assert_allclose(
        [ask.level.alpha_bar.item() for ask in asks],
        want.alphas_cumprod[want.timesteps].numpy(),
        rtol=1e-5,
    )


UNKNOWN: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "beta sigmas": ("euler", EulerDiscreteScheduler, {"use_exponential_sigmas": True}, "use_expo"),
    "third order": ("dpmpp_2m", DPMSolverMultistepScheduler, {"solver_order": 3}, "solver_order 3"),
    "sigma_min": (
        *("dpmpp_2m", DPMSolverMultistepScheduler, {"final_sigmas_type": "sigma_min"}),
        "final_sigmas_type 'sigma_min'",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_steps_that_are_not_known_are_refused_by_field(tmp_path: Path, name: str) -> None:
    sampler, kind, fields, reason = UNKNOWN[name]
    denoiser = served(tmp_path, kind(**LEVELS | fields))
    with pytest.raises(InvalidArgumentError, match=f"timesteps: .*{reason}"):
        ours(denoiser, sampler, 4)
    # By itself a sampler does not ask the folder.
    run(SAMPLERS[sampler](NOISE, options_for(denoiser.info, steps=2)), answer_of(denoiser))


@pytest.mark.parametrize(
    ("sampler", "n", "options", "message"),
    [
        ("heun", 4, {}, "sampler: expected one of ddim, ddpm, euler, dpmpp_2m with the folder"),
        ("ddim_released", 4, {}, "sampler: expected one of"),
        ("ddim", STEPS + 1, {}, "steps: expected distinct timesteps from 0 to 99"),
        ("ddpm", 4, {"eta": 0.5}, "eta: expected 1 or unset with the folder's timesteps"),
        ("ddim", 1, {"times": (0.5,)}, "timesteps: expected unset with times or start"),
    ],
)
def test_options_that_the_folder_s_timesteps_do_not_go_with_are_refused(
    tmp_path: Path, sampler: str, n: int, options: dict[str, Any], message: str
) -> None:
    denoiser = served(tmp_path, scheduler("ddim", {}))
    with pytest.raises(InvalidArgumentError, match=message):
        ours(denoiser, sampler, n, **options)


def test_an_offset_beyond_the_last_timestep_is_refused(tmp_path: Path) -> None:
    denoiser = served(tmp_path, scheduler("ddim", {}))
    edit(
        tmp_path / "model" / "scheduler" / "scheduler_config.json",
        steps_offset=1,
        timestep_spacing="leading",
    )
    denoiser = ModelRepository(tmp_path).load("model")
    with pytest.raises(InvalidArgumentError, match="steps: expected distinct timesteps"):
        ours(denoiser, "ddim", STEPS)


def test_images_of_one_batch_are_clipped_or_not_as_each_asks(tmp_path: Path) -> None:
    clip = {"clip_sample": True, "clip_sample_range": 0.1}
    denoiser = served(tmp_path, scheduler("ddim", clip))
    x = NOISE(0).float()
    query = make_query(x, from_sigma([1.0]))
    clipped = denoiser.denoise(query).mean
    query.unclipped = np.ones(COUNT, np.bool_)
    whole = denoiser.denoise(query).mean
    assert float(clipped.abs().max()) == pytest.approx(0.1)
    assert float(whole.abs().max()) > 0.1
    both = concatenate([make_query(x, from_sigma([1.0])), query])
    mixed = denoiser.denoise(both).mean
    torch.testing.assert_close(mixed, torch.cat([clipped, whole]), rtol=1e-4, atol=1e-5)
