"""Folders and files that no tool would write: refused by name, and the rest is served."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzz.decoders import document
from tests.support.examples import examples
from tests.support.models_folder import DOCUMENTS, write_models

from els_service.errors import LoadError
from els_service.repository import ModelRepository
from els_service.server.transport.status import status_of

WIENER = DOCUMENTS["wiener"]

ODD: dict[str, Callable[[Path], object]] = {
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to a name too long": lambda path: path.symlink_to("a" * 300),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_models(tmp_path / "models", {"good": WIENER, "odd": WIENER})


@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
@pytest.mark.parametrize("file", ["model.yaml", "bank.safetensors"])
def test_what_is_no_file_is_refused_and_the_others_load(
    root: Path, file: str, make: Callable[[Path], object]
) -> None:
    (root / "odd" / "model.yaml").write_text("kind: wiener\nbank: bank.safetensors\n")
    (root / "odd" / file).unlink(missing_ok=True)
    make(root / "odd" / file)
    repository = ModelRepository(root)
    assert repository.names() == ["good", "odd"]
    with pytest.raises(LoadError, match="expected a file"):
        repository.load("odd")
    assert repository.load("good").info.kind == "wiener"


@pytest.mark.parametrize("name", [b"\xff\xfe", b"a\nb", b"\x1b[31m", "\u202e".encode()])
def test_a_folder_whose_name_cannot_be_told_is_no_model(root: Path, name: bytes) -> None:
    folder = Path(os.fsdecode(os.fsencode(root) + b"/" + name))
    folder.mkdir()
    (folder / "model.yaml").write_text(WIENER)
    assert ModelRepository(root).names() == ["good", "odd"]


NASTY: st.SearchStrategy[object] = st.sampled_from(
    [
        *("a\nb", "\x00", "\x1b[31m", "\udcff", "\ud800", "\u202e", "a" * 5000, "", ".", "../.."),
        *(1e300, -1e300, float("nan"), float("inf"), 10**400, 2**63, -1, 0, None, True, b"\xff"),
        *([], {}, [[]], [1e39], [0.0] * 5, {"sigma": [1e-320, 1e308], "k": [1, 5]}),
    ]
)


@examples(150)
@given(
    text=st.sampled_from([*DOCUMENTS.values(), "kind: network\narchitecture: resnet\n"]),
    changes=st.lists(st.tuples(st.booleans(), st.integers(0, 9), NASTY), max_size=3),
)
def test_a_document_of_nasty_values_is_refused_in_printable_words(
    text: str, changes: list[tuple[bool, int, object]]
) -> None:
    content = yaml.safe_load(text)
    for is_key, place, value in changes:
        if is_key and isinstance(value, str | int | float | bytes | None):
            content[value] = 1
        else:
            content[list(content)[place % len(content)]] = value
    document(yaml.safe_dump(content).encode(errors="surrogatepass"))


@pytest.mark.parametrize("letter", ["a", "é", "😀", "\n", "\ud800"])
def test_a_long_fault_fits_the_headers_of_a_status(letter: str) -> None:
    status = status_of(LoadError(letter * 5000, letter * 5000))
    assert len(quote(status.message)) + len(status.SerializeToString()) * 4 / 3 < 8000
