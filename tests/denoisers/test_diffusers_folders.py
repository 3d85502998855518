"""Files of diffusers' folders: shards, variants, averaged copies, fields off and fields refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tests.support.denoisers import random_images
from tests.support.pretrained import SHAPE, edit, scheduler, unet, write_folder

from els_service.denoisers.base import Denoiser, make_query
from els_service.denoisers.levels import from_sigma
from els_service.errors import LoadError
from els_service.repository import ModelRepository


def _served(root: Path, **parts: Any) -> Denoiser:
    write_folder(root / "model", "kind: diffusers\n", **parts)
    return ModelRepository(root).load("model")


def _weights(folder: Path, part: str = "unet") -> Path:
    return folder / part / "diffusion_pytorch_model.safetensors"


def _query() -> Any:
    return make_query(random_images((1, *SHAPE)), from_sigma([1.0]))


@pytest.fixture
def want(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The answer of the folder as it is usually written."""
    root = tmp_path_factory.mktemp("plain")
    return _served(root, unet=unet(), scheduler=scheduler()).denoise(_query()).pixels


@pytest.mark.parametrize("variant", ["", "ema"])
def test_sharded_weights_are_read(tmp_path: Path, want: Any, variant: str) -> None:
    folder = write_folder(tmp_path / "model", "kind: diffusers\n", scheduler=scheduler())
    unet().save_pretrained(
        folder / "unet", max_shard_size="20KB", **({"variant": variant} if variant else {})
    )
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 1
    got = ModelRepository(tmp_path).load("model").denoise(_query()).pixels
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({}, "weight_map: expected tensors → file names"),
        ({"weight_map": {}}, "weight_map: expected 1 to 1000 files, got 0"),
        ({"weight_map": {"a": "../x.safetensors"}}, "weight_map: expected names of safetensors"),
        ({"weight_map": {"a": "x.bin"}}, "weight_map: expected names of safetensors files"),
        ({"weight_map": {"a": "none.safetensors"}}, "expected a file, found none"),
        ([], "weight_map: expected tensors"),
    ],
)
def test_an_index_that_names_no_shards_of_the_folder_is_refused(
    tmp_path: Path, content: object, reason: str
) -> None:
    folder = write_folder(
        tmp_path / "model", "kind: diffusers\n", unet=unet(), scheduler=scheduler()
    )
    path = _weights(folder)
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(content))
    path.unlink()
    with pytest.raises(LoadError, match=reason):
        ModelRepository(tmp_path).load("model")


def test_shards_with_the_same_tensor_twice_are_refused(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path / "model", "kind: diffusers\n", unet=unet(), scheduler=scheduler()
    )
    path = _weights(folder)
    tensors = load_file(path)
    for name in ("a", "b"):
        save_file(tensors, path.with_name(f"{name}.safetensors"))
    index = {"weight_map": {"one": "a.safetensors", "two": "b.safetensors"}}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index))
    path.unlink()
    with pytest.raises(LoadError, match=r"b\.safetensors: .*: expected once, but a\.safetensors"):
        ModelRepository(tmp_path).load("model")


def test_the_only_variant_is_taken_and_of_several_one_must_be_named(
    tmp_path: Path, want: Any
) -> None:
    folder = write_folder(tmp_path / "model", "kind: diffusers\n", scheduler=scheduler())
    unet().save_pretrained(folder / "unet", variant="fp32")
    repository = ModelRepository(tmp_path)
    np.testing.assert_array_equal(repository.load("model").denoise(_query()).pixels, want)
    unet().save_pretrained(folder / "unet", variant="ema")
    with pytest.raises(LoadError, match=r"unet: variant: expected one of ema, fp32 in model\.yaml"):
        repository.load("model")
    (folder / "model.yaml").write_text("kind: diffusers\nvariant: fp16\n")
    with pytest.raises(LoadError, match="variant: expected one of ema, fp32"):
        repository.load("model")
    (folder / "model.yaml").write_text("kind: diffusers\nvariant: ema\n")
    np.testing.assert_array_equal(repository.load("model").denoise(_query()).pixels, want)


@pytest.mark.slow
def test_an_averaged_copy_is_served_from_its_own_folder(tmp_path: Path, want: Any) -> None:
    from diffusers.training_utils import EMAModel

    network = unet()
    other = unet(norm_eps=0.3)
    averaged = EMAModel(
        network.parameters(), model_cls=diffusers.UNet2DModel, model_config=network.config
    )
    document = "kind: diffusers\nnetwork: unet_ema\n"
    folder = write_folder(
        tmp_path / "model", document, unet=other, unet_ema=averaged, scheduler=scheduler()
    )
    assert "optimization_step" in json.loads((folder / "unet_ema" / "config.json").read_text())
    got = ModelRepository(tmp_path).load("model").denoise(_query()).pixels
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("part", ["unet", "scheduler"])
@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_unknown_field_that_is_off_changes_nothing(
    tmp_path: Path, want: Any, part: str, value: object
) -> None:
    folder = write_folder(
        tmp_path / "model", "kind: diffusers\n", unet=unet(), scheduler=scheduler()
    )
    name = "config.json" if part == "unet" else "scheduler_config.json"
    edit(folder / part / name, option_of_a_later_version=value)
    got = ModelRepository(tmp_path).load("model").denoise(_query()).pixels
    np.testing.assert_array_equal(got, want)


@pytest.mark.slow
def test_a_network_without_a_sample_size_takes_the_shape_of_the_document(
    tmp_path: Path, want: Any
) -> None:
    document = f"kind: diffusers\nshape: {list(SHAPE)}\n"
    folder = write_folder(tmp_path / "model", document, unet=unet(), scheduler=scheduler())
    path = folder / "unet" / "config.json"
    edit(path, sample_size=None)
    repository = ModelRepository(tmp_path)
    denoiser = repository.load("model")
    assert denoiser.info.shape == SHAPE
    np.testing.assert_array_equal(denoiser.denoise(_query()).pixels, want)
    (folder / "model.yaml").write_text("kind: diffusers\nshape: [3, 8, 8]\n")
    with pytest.raises(LoadError, match=r"in_channels: expected 3, as the shape in model\.yaml"):
        repository.load("model")
    (folder / "model.yaml").write_text("kind: diffusers\n")
    with pytest.raises(LoadError, match=r"sample_size: expected .* or a shape in model\.yaml"):
        repository.load("model")


@pytest.mark.parametrize(
    ("schedule", "fields", "reason"),
    [
        (scheduler(), {"rescale_betas_zero_snr": True}, "v_prediction would do"),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(),
            {"use_dynamic_shifting": True},
            "use_dynamic_shifting: expected False, got True",
        ),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(),
            {"invert_sigmas": True},
            "invert_sigmas: expected False, got True",
        ),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(),
            {"shift": 0},
            "shift: expected 0.001 to 1000, got 0",
        ),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(),
            {"num_train_timesteps": 1},
            "num_train_timesteps: expected 2 to 100000",
        ),
        (
            diffusers.UniPCMultistepScheduler(),
            {"use_flow_sigmas": True},
            "prediction_type: expected flow_prediction beside use_flow_sigmas",
        ),
        (
            diffusers.EDMEulerScheduler(),
            {"prediction_type": "v_prediction"},
            "prediction_type: expected epsilon for EDM",
        ),
        (
            diffusers.EDMEulerScheduler(),
            {"sigma_max": 1e-3},
            "sigma_max: expected more than sigma_min",
        ),
        (diffusers.EDMEulerScheduler(), {"sigma_data": None}, "sigma_data: expected"),
        (scheduler(), {"predict_epsilon": False}, "predict_epsilon: expected one of True"),
    ],
)
def test_a_schedule_that_cannot_be_served_is_refused_by_field(
    tmp_path: Path, schedule: Any, fields: dict[str, Any], reason: str
) -> None:
    folder = write_folder(tmp_path / "model", "kind: diffusers\n", unet=unet(), scheduler=schedule)
    path = folder / "scheduler" / "scheduler_config.json"
    edit(path, **fields)
    with pytest.raises(LoadError) as error:
        ModelRepository(tmp_path).load("model")
    assert error.value.path == str(path)
    assert reason in error.value.reason


def test_a_learned_variance_that_no_scheduler_speaks_of_is_refused(tmp_path: Path) -> None:
    network = unet(out_channels=2 * SHAPE[0])
    with pytest.raises(LoadError, match=r"out_channels: expected 2, .* variance_type is learned"):
        _served(tmp_path, unet=network, scheduler=scheduler())
