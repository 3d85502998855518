"""Networks of diffusers that are refused by field, tensor or file, and what loading imports."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.pretrained import edit, scheduler, unet, write_folder
from tests.support.processes import printed
from tests.support.rows import all_rows
from torch import Tensor

from els_service.errors import LoadError
from els_service.repository import ModelRepository

DOCUMENT = "kind: diffusers\n"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that loads."""
    folder = tmp_path_factory.mktemp("template") / "model"
    return write_folder(folder, DOCUMENT, unet=unet(), scheduler=scheduler())


@pytest.fixture
def plain(tmp_path: Path, template: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(template, tmp_path / "model"))


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
    tmp_path: Path, plain: Path, field: str, value: object, reason: str
) -> None:
    path = plain / "scheduler" / "scheduler_config.json"
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
    tmp_path: Path, plain: Path, field: str, value: object, reason: str
) -> None:
    path = plain / "unet" / "config.json"
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
    tmp_path: Path, plain: Path, name: str, tensor: Tensor | None, reason: str
) -> None:
    _changed(plain, name, tensor)
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
        seen.add(low := path.read_bytes()[0])
        # Pickles begin with 0x80 or "(", zip archives with "P", compressed bytes with "x".
        if all_rows() or low in b"\x80(Px":
            assert repository.load("model").info.kind == "diffusers"
    assert seen == set(range(0, 256, 8))


def test_a_pickle_is_refused_unread_and_an_absent_or_torn_file_named(
    tmp_path: Path, plain: Path
) -> None:
    repository = ModelRepository(tmp_path)
    weights = plain / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(plain / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(LoadError, match=r"model\.bin: expected safetensors: a pickle can execute"):
        repository.load("model")
    weights.with_suffix(".bin").unlink()
    with pytest.raises(LoadError, match=r"model\.safetensors: expected a file, found none"):
        repository.load("model")
    (plain / "unet" / "config.json").write_text("{")
    with pytest.raises(LoadError, match=r"config\.json: expected a readable JSON file"):
        repository.load("model")
    (plain / "unet" / "config.json").write_text("[]")
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


@pytest.mark.usefixtures("plain")
def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
