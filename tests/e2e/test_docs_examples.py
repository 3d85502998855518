"""Examples in Python of the documentation run against a server, but for those that are marked.

A block that does not run alone has ``<!-- not run: REASON -->`` in the line above it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.models_folder import DOCUMENTS, write_models
from tests.support.processes import serving

# torch compiles decompositions by it when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

DOCS = Path(__file__).parents[2] / "docs"
_BLOCK = re.compile(r"(?:<!-- (not run: .+) -->\n)?^```python\n(.*?)^```$", re.M | re.DOTALL)
BLOCKS = [
    (f"{page.stem}-{number}", reason, code)
    for page in sorted(DOCS.glob("*.md"))
    for number, (reason, code) in enumerate(_BLOCK.findall(page.read_text()))
]
EXAMPLES = {name: code for name, reason, code in BLOCKS if not reason} | {
    path.name: path.read_text() for path in sorted((DOCS / "site" / "examples").glob("*.py"))
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the documentation's models, by small ones of three labels."""
    names = {"fashion-els": "zeros", "fashion-resnet": "wiener", "fashion-ideal": "ideal"}
    documents = {name: DOCUMENTS[document] for name, document in names.items()}
    root = write_models(tmp_path_factory.mktemp("docs") / "models", documents)
    with serving("--models", root, "--threads", 1) as server:
        yield server.target


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(
    name: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = EXAMPLES[name].replace("127.0.0.1:50051", target)
    exec(re.sub(r"label=[3-9]\b", "label=2", code), {"__name__": "__main__"})


def test_each_method_has_an_example() -> None:
    contract = (DOCS.parent / "proto" / "denoise" / "v1" / "denoise.proto").read_text()
    methods = re.findall(r"^  rpc (\w+)\(", contract, re.MULTILINE)
    names = {re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower() + ".py" for name in methods}
    assert len(names) == 10
    assert names <= EXAMPLES.keys()
