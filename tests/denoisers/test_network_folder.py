"""Folders of networks: what is written is served, and what is refused is named."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tests.support.denoisers import random_images
from tests.support.networks import SHAPE, WIDTHS, config, denoiser, write_folder

from els_service.denoisers.base import BankInfo, Denoiser, make_query
from els_service.denoisers.levels import from_sigma
from els_service.denoisers.networks import (
    Execution,
    NetworkDocument,
    build_network,
    parse_network,
    save_network_folder,
)
from els_service.errors import InvalidArgumentError, LoadError
from els_service.repository import ModelRepository, load_network_folder


def answer(model: Denoiser) -> np.ndarray[Any, np.dtype[np.float32]]:
    return model.denoise(make_query(random_images((2, *SHAPE)), from_sigma([0.7]), 1)).pixels


@pytest.mark.parametrize("architecture", WIDTHS)
def test_a_folder_answers_as_the_network_did(tmp_path: Path, architecture: str) -> None:
    of = config(architecture, padding="circular", prediction="v")
    folder = write_folder(tmp_path / "model", of)
    want = answer(denoiser(of))
    np.testing.assert_array_equal(answer(load_network_folder(folder)), want)
    np.testing.assert_array_equal(answer(ModelRepository(tmp_path).load("model")), want)


def test_a_document_is_read_as_it_was_written(tmp_path: Path) -> None:
    document = NetworkDocument(
        config("unet", label_names=("a", "b", "é"), prediction="edm", sigma_data=0.4),
        Execution(precision="bfloat16", buckets=(4,), deterministic=True),
        BankInfo("00ff", 60_000, "Fashion-MNIST", "MIT"),
    )
    save_network_folder(tmp_path, document, build_network(document.config).state_dict())
    path = tmp_path / "model.yaml"
    assert parse_network(yaml.safe_load(path.read_bytes()), path) == document
    assert load_network_folder(tmp_path).info.bank == document.data


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_may_be_stored_in_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    of = config()
    torch.manual_seed(0)
    tensors = build_network(of).state_dict()
    save_network_folder(tmp_path, NetworkDocument(of, Execution()), tensors, dtype)
    got, want = answer(load_network_folder(tmp_path)), answer(denoiser(of))
    assert 0 < np.abs(got - want).max() < 0.05


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("architecture", "transformer", "architecture: expected one of resnet, unet"),
        ("architecture", ["resnet"], "architecture: expected one of"),
        ("shape", [1, 28], "shape: expected"),
        ("shape", [1, 28.0, 28], "shape: expected"),
        ("shape", [0, 28, 28], "shape: expected"),
        ("widths", 64, "widths: expected"),
        ("widths", [], "widths: expected"),
        ("widths", [7], "widths: expected even numbers"),
        ("widths", [8, 16], "widths: expected one for a resnet"),
        ("blocks", True, "blocks: expected 1 to 64"),
        ("padding", "valid", "padding: expected one of zeros, circular"),
        ("label_count", -1, "label_count: expected"),
        ("label_names", ["a"], "label_names: expected none or 3 names"),
        ("label_count", 0, "null_label: expected false for an unconditional"),
        ("prediction", "noise", "prediction: expected one of eps, x0, v, edm"),
        ("sigma_data", 0, "sigma_data: expected"),
        ("schedule", "linear", "schedule: "),
        ("precision", "float8", "precision: expected one of"),
        ("precision", "tf32", "precision: expected float32, bfloat16 or float16 on a CPU"),
        ("compile", "cuda-graphs", "compile: expected none or default on a CPU"),
        ("compile", "max", "compile: expected one of"),
        ("buckets", [4, 4], "buckets: expected increasing"),
        ("buckets", [0], "buckets: expected"),
        ("deterministic", "yes", "deterministic: expected true or false"),
        ("width", 64, "width: expected one of"),
        ("data", {"images": 1}, "data: expected a mapping"),
        (
            "data",
            {"fingerprint": "", "images": "1", "source": "", "licence": ""},
            "data.images: expected int",
        ),
        (
            "data",
            {"fingerprint": "", "images": 1, "source": "\x1b[", "licence": ""},
            "data.source: expected printable",
        ),
    ],
)
def test_a_bad_field_is_refused_by_name(
    tmp_path: Path, field: str, value: object, expected: str
) -> None:
    folder = write_folder(tmp_path / "model", config())
    path = folder / "model.yaml"
    content = yaml.safe_load(path.read_bytes())
    path.write_text(yaml.safe_dump(content | {field: value}))
    loads: tuple[Callable[[], Denoiser], ...] = (
        lambda: load_network_folder(folder),
        lambda: ModelRepository(tmp_path).load("model"),
    )
    for load in loads:
        with pytest.raises(LoadError) as error:
            load()
        assert error.value.path == str(path)
        assert expected in error.value.reason


@pytest.mark.parametrize("field", ["architecture", "shape", "widths"])
def test_a_field_without_a_default_must_be_there(tmp_path: Path, field: str) -> None:
    path = write_folder(tmp_path, config()) / "model.yaml"
    content = yaml.safe_load(path.read_bytes())
    del content[field]
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(LoadError, match=f"{field}: expected a value, found none"):
        load_network_folder(tmp_path)


@pytest.mark.parametrize("shape", [(1, 7, 8), (1, 8, 7), (1, 6, 6)])
def test_a_size_that_a_unet_cannot_halve_is_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(
        InvalidArgumentError, match="shape: expected height and width divisible by 4"
    ):
        config("unet", shape=shape)


def test_a_deterministic_network_has_one_bucket() -> None:
    with pytest.raises(InvalidArgumentError, match="buckets: expected one bucket"):
        Execution(buckets=(1, 4), deterministic=True)


def _without(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["body.convs.3.weight"]


def _extra(tensors: dict[str, torch.Tensor]) -> None:
    tensors["body.middle"] = torch.zeros(1)


def _reshaped(tensors: dict[str, torch.Tensor]) -> None:
    tensors["body.up.weight"] = torch.zeros(16, 2, 3, 3)


def _not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors["label.weight"][2, 3] = float("nan")


def _integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["body.down.bias"] = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_without, "body.convs.3.weight: expected a tensor, found none"),
        (_extra, "body.middle: expected no such tensor"),
        (_reshaped, "body.up.weight: expected shape [8, 2, 3, 3], got [16, 2, 3, 3]"),
        (_not_a_number, "label.weight: expected finite numbers"),
        (_integers, "body.down.bias: expected float64, float32, float16 or bfloat16, got"),
    ],
)
def test_weights_of_another_network_are_refused_by_tensor(
    tmp_path: Path, change: Any, expected: str
) -> None:
    path = write_folder(tmp_path, config()) / "weights.safetensors"
    # Cloned: the file is mapped, and about to be written over.
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(LoadError, match=r"weights\.safetensors") as error:
        load_network_folder(tmp_path)
    assert expected in str(error.value)


@pytest.mark.slow
def test_weights_load_whatever_the_low_byte_of_their_header_length_is(tmp_path: Path) -> None:
    of = config("resnet", widths=(2,), blocks=1)
    path = write_folder(tmp_path, of) / "weights.safetensors"
    tensors, want = load_file(path), answer(denoiser(of))
    seen = set()  # 0x80 is also the first byte of a pickle
    for size in range(8, 264, 8):
        save_file(tensors, path, metadata={"padding": "x" * size})
        np.testing.assert_array_equal(answer(load_network_folder(tmp_path)), want)
        seen.add(path.read_bytes()[0])
    assert seen == set(range(0, 256, 8))


def test_a_pickle_is_refused_unread_and_so_is_a_torn_or_absent_file(tmp_path: Path) -> None:
    path = write_folder(tmp_path, config()) / "weights.safetensors"
    whole = path.read_bytes()
    for content in (b"", whole[:-1], whole[:100]):
        path.write_bytes(content)
        with pytest.raises(LoadError, match=r"weights\.safetensors: expected a safetensors file"):
            load_network_folder(tmp_path)
    tensors = {"a": torch.zeros(1)}
    torch.save(tensors, tmp_path / "now.pt")
    torch.save(tensors, tmp_path / "once.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"a": 1}))
    for name in ("now.pt", "once.pt", "plain.pkl"):
        path.write_bytes((tmp_path / name).read_bytes())
        with pytest.raises(LoadError, match=r"weights\.safetensors: .* a pickle can execute code"):
            load_network_folder(tmp_path)
    path.unlink()
    reason = r"weights\.safetensors: expected a file, found none; now\.pt is not read, as a pickle"
    with pytest.raises(LoadError, match=reason):
        load_network_folder(tmp_path)
    with pytest.raises(LoadError, match=reason):
        ModelRepository(tmp_path.parent).load(tmp_path.name)


@pytest.mark.parametrize(
    "content", [b"", b"- 1", b"kind: analytic\n", b"\xff", b"a: [", b"a: {1: 2"]
)
def test_a_document_that_is_no_network_is_refused(tmp_path: Path, content: bytes) -> None:
    (write_folder(tmp_path, config()) / "model.yaml").write_bytes(content)
    with pytest.raises(LoadError, match=r"model\.yaml"):
        load_network_folder(tmp_path)


@pytest.mark.slow
def test_a_network_is_loaded_without_pydantic(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", config())
    program = """
import sys
sys.modules["pydantic"] = None
from pathlib import Path
from els_service.repository import ModelRepository
print(ModelRepository(Path(sys.argv[1])).load("model").info.kind)
"""
    shown = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == "network\n"
