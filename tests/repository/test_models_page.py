"""docs/models.md: every example of a ``model.yaml`` loads, and every key is documented."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from pydantic import BaseModel
from tests.support import pretrained
from tests.support.preloaded import forked_shards

from els_service.denoisers.banks import make_bank, save_bank
from els_service.denoisers.mixed_banks import make_mixed_bank
from els_service.denoisers.networks import (
    Execution,
    NetworkConfig,
    build_network,
    parse_network,
    save_network_folder,
)
from els_service.repository import ModelRepository
from els_service.repository.pretrained_specs import DiffusersSpec, LatentSpec, OnnxSpec
from els_service.repository.specs import (
    AnalyticSpec,
    GaussianSpec,
    PcaSpec,
    PictureSpec,
    SmoothedSpec,
    WienerSpec,
)

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_SECTION = re.compile(r"^## kind: (\w+)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_EXAMPLE = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECTIONS = dict(_SECTION.findall(PAGE.read_text()))
EXAMPLES = [(kind, text) for kind, page in SECTIONS.items() for text in _EXAMPLE.findall(page)]


def keys_of(spec: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the keys of a kind but ``kind``, nested ones with a dot."""
    for name, field in spec.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        inner = [
            part
            for part in (field.annotation, *getattr(field.annotation, "__args__", ()))
            if (spec is OnnxSpec or name == "execution")
            and isinstance(part, type)
            and issubclass(part, BaseModel)
        ]
        yield from keys_of(inner[0], f"{key}.") if inner else [key] if key != "kind" else []


SECTION = {"engine", "threads", "fallback"}
"""Options of a network that the page shows in its section ``execution``."""
KEYS = {
    "analytic": set(keys_of(AnalyticSpec)),
    "gaussian": set(keys_of(GaussianSpec)),
    "pca": set(keys_of(PcaSpec)),
    "smoothed": set(keys_of(SmoothedSpec)),
    "picture": set(keys_of(PictureSpec)),
    "wiener": set(keys_of(WienerSpec)),
    "network": {
        f"execution.{field.name}" if field.name in SECTION else field.name
        for part in (NetworkConfig, Execution)
        for field in fields(part)
    }
    | {"data"},
    "diffusers": set(keys_of(DiffusersSpec)),
    "latent": set(keys_of(LatentSpec)),
    "onnx": set(keys_of(OnnxSpec)),
}


def given(document: dict[str, Any], kind: str) -> set[str]:
    """Return the keys of an example, as ``keys_of`` writes them."""
    nested = {"execution"} | ({"level", "label"} if kind == "onnx" else set())
    return {
        f"{name}.{inner}" if inner else name
        for name, value in document.items()
        for inner in (value if name in nested else [""])
    } - {"kind"}


def onnx_graph(document: dict[str, Any]) -> bytes:
    """Return a graph with the inputs of an example: output = image · 0 + sum of constants."""

    def value(name: str, *shape: int | str, kind: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, list(shape))

    image = ("B", "C", "H", "W") if "shape" in document else ("B", 3, 8, 8)
    constants, output = document.get("constants", {}), document["output"]
    inputs = [value(document["input"], *image), value(document["level"]["input"], "B")]
    if "label" in document:
        inputs.append(value(document["label"]["input"], "B", kind=TensorProto.INT64))
    inputs += [value(name, "B", 1, 1, 1) for name in constants]
    nodes = [helper.make_node("Mul", [document["input"], "zero"], ["black"])]
    nodes.append(helper.make_node("Sum", ["black", *constants], [output]))
    zero = numpy_helper.from_array(np.float32(0), "zero")
    graph = helper.make_graph(nodes, "net", inputs, [value(output, *image)], [zero])
    opsets = [helper.make_opsetid("", 18)]
    data: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return data


def write_files(folder: Path, document: dict[str, Any]) -> None:
    """Write the files that an example names."""
    match document["kind"]:
        case "network":
            parsed = parse_network(document, "example")
            with torch.random.fork_rng():
                save_network_folder(folder, parsed, build_network(parsed.config).state_dict())
        case "diffusers" | "latent":
            parts = {"unet": pretrained.unet(num_class_embeds=3)}
            if document["kind"] == "latent":
                parts = {"unet": pretrained.conditional_unet(), "vae": pretrained.autoencoder()}
            for name, part in parts.items():
                part.save_pretrained(folder / name, variant=document["variant"])
            pretrained.scheduler().save_pretrained(folder / "scheduler")
        case "picture":
            for name in document["pictures"]:
                pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / name)
        case "onnx":
            (folder / document["file"]).write_bytes(onnx_graph(document))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A models root with the banks of the examples."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 1, 28, 28)).astype(np.uint8)
    (tmp_path / "_banks").mkdir()
    save_bank(make_bank(pixels, np.arange(6) % 3), tmp_path / "_banks" / "clothes.safetensors")
    several = [pixels[0], pixels[1, :, :20], pixels[2, :, :, :24]]
    save_bank(make_mixed_bank(several), tmp_path / "_banks" / "photographs.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "text"), EXAMPLES, ids=[f"{kind}-{i}" for i, (kind, _) in enumerate(EXAMPLES)]
)
def test_an_example_of_the_models_page_loads(root: Path, kind: str, text: str) -> None:
    folder = root / "example"
    folder.mkdir()
    document = yaml.safe_load(text)
    write_files(folder, document)
    (folder / "model.yaml").write_text(text)
    with forked_shards():
        denoiser = ModelRepository(root).load("example")
    assert denoiser.info.kind == document["kind"] == kind


@pytest.mark.parametrize("kind", KEYS)
def test_the_models_page_shows_and_explains_every_key_of_a_kind(kind: str) -> None:
    shown = [given(yaml.safe_load(text), kind) for text in _EXAMPLE.findall(SECTIONS[kind])]
    assert set().union(*shown) == KEYS[kind]
    rows = [line.split("|")[1] for line in SECTIONS[kind].splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([\w.]+)`", row)}
    assert named == KEYS[kind]
