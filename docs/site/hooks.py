"""Hooks of mkdocs: generated pages, formulas as MathML, links to files outside docs/.

Nothing is fetched, by the build or by the pages: formulas are rendered at build time, and pictures
from outside docs/ are copied.
"""

from __future__ import annotations

import html
import logging
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import contract
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

log = logging.getLogger("mkdocs.plugins.els")

ROOT = Path(__file__).parents[2]
SOURCE = "https://github.com/els-denoise/els-denoise/blob/main/"
REFERENCE = {
    "client": ("Clients", ["els_client.Client", "els_client.AsyncClient", "els_client.Repository"]),
    "results": (
        "Queries and results",
        [f"els_client.{name}" for name in ("Query", "Evidence", "Tls", "Step", "Explanation")]
        + [f"els_client.{name}" for name in ("Originality", "Model", "Limits", "WindowTable")]
        + [f"els_client.{name}" for name in ("Bank", "Sizes", "Conditioning", "FolderScheduler")]
        + [f"els_client.{name}" for name in ("RepositoryModel", "Statistics")],
    ),
    "errors": ("Errors", ["els_client.errors"]),
    "torch": ("Modules for torch", ["els_client.torch"]),
    "kernels": ("Kernels", ["els_kernels"]),
}
"""Page of the reference → its title, and the objects whose docstrings it has."""
EXAMPLES = Path(__file__).parent / "examples"
PICTURES = {".png", ".webp", ".jpg", ".gif", ".svg"}
_NAMES = {
    "ddim": "DDIM",
    "grpc": "gRPC",
    "openvino": "OpenVINO",
    "http": "HTTP",
    "kserve": "KServe",
}
_FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)
_TARGET = re.compile(r'(\]\(|<img src=")([^)\s"#]+)')
_HREF = re.compile(r'(?:href|src)="([^"]*)"')


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the pages of docs/ that the navigation does not name, as its last section."""
    named = set(_named(config.nav or []))
    pages = sorted(path.name for path in Path(config.docs_dir).glob("*.md"))
    others = [page for page in pages if page not in named]
    if others and config.nav is not None:
        config.nav.append({"More": list(others)})
    return config


def _named(nav: Any) -> Iterator[str]:
    for entry in nav if isinstance(nav, list) else nav.values():
        if isinstance(entry, str):
            yield entry
        else:
            yield from _named(entry)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are generated, and pictures of pages that lie outside docs/."""
    for name, text in generated().items():
        files.append(File.generated(config, name, content=text))
    for page in list(files.documentation_pages()):
        for _, link in _TARGET.findall(page.content_string):
            path = _outside(page.src_uri, link)
            if path and Path(path).suffix in PICTURES and _copy(path) not in files.src_uris:
                source = str(ROOT / path)
                files.append(File.generated(config, _copy(path), abs_src_path=source))
    return files


def generated() -> dict[str, str]:
    """Return the pages that are generated, by path below docs/."""
    known = contract.declarations(ROOT / "proto" / "denoise" / "v1" / "denoise.proto")
    service = known["DenoiserService"]
    pages = {"rpc/messages.md": contract.messages_page(known)}
    text = (
        "The contract is [denoise.proto](../../proto/denoise/v1/denoise.proto); each method has a "
        "page with an example, which the tests run."
    )
    pages["rpc/index.md"] = contract.service_page(service, "RPC methods", True, text)
    for method in service.entries:
        page = contract.page_of(method.name)
        example = (EXAMPLES / page.replace("-", "_")).with_suffix(".py").read_text()
        pages[f"rpc/{page}"] = contract.method_page(method, known, example)
    others = contract.declarations(ROOT / "proto" / "inference" / "grpc_service.proto")
    pages["rpc/inference.md"] = contract.service_page(
        others["GRPCInferenceService"],
        "Open Inference Protocol",
        False,
        "Clients of Triton and KServe call these methods of "
        "[grpc_service.proto](../../proto/inference/grpc_service.proto). A model has the inputs "
        "`x`, one of the levels `sigma`, `alpha_bar` and `time`, `label` and `window`, and the "
        "outputs `denoised`, `score` and `log_evidence`.\n\n## Example\n\n```python\n"
        f"{(EXAMPLES / 'inference.py').read_text()}```\n\n## Methods",
    )
    for page, (title, objects) in REFERENCE.items():
        parts = [f"# {title}", *(f"::: {name}" for name in objects)]
        pages[f"api/{page}.md"] = "\n\n".join(parts) + "\n"
    pages["findings.md"] = findings()
    return pages


def findings() -> str:
    """Return the page of the findings, from the comments at the heads of their scripts."""
    parts = [
        "# Findings",
        "Behaviour of software around this project that a good engineer would not guess. Each is "
        "a script that shows it with released packages, without this project, and fails when the "
        "behaviour changes.",
    ]
    for script in sorted((ROOT / "findings").glob("*.sh")):
        lines = script.read_text().splitlines()[1:]
        end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
        text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:end])
        text, _, seen = text.partition("\nOutput seen:")
        words = script.stem.split("-")
        title = " ".join(_NAMES.get(word, word) for word in words)
        parts.append(f"## {title}\n\n[`{script.name}`](../findings/{script.name})")
        # A paragraph of its own for each word at the beginning of a line that names a part.
        prose = re.sub(r"^(\w[\w ]{2,20}): ", r"\n**\1.** ", text, flags=re.MULTILINE)
        parts.append(html.escape(prose, quote=False))
        if seen:
            parts.append("**Output seen.**\n\n" + re.sub("^", "    ", seen.strip("\n"), flags=re.M))
    return "\n\n".join(parts) + "\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace links that leave docs/ by addresses of the repository, or of copied pictures."""

    def replaced(match: re.Match[str]) -> str:
        before, link = match.groups()
        path = _outside(page.file.src_uri, link)
        if path is None:
            return match[0]
        if Path(path).suffix in PICTURES:
            here = posixpath.dirname(page.file.src_uri) or "."
            return before + posixpath.relpath(_copy(path), here)
        if not (ROOT / path).exists():
            log.warning("%s: link to %s, which does not exist", page.file.src_uri, link)
        return before + SOURCE + path

    return _TARGET.sub(replaced, markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Render formulas, and warn of addresses that are malformed."""
    for link in _HREF.findall(content):
        parts = urlsplit(html.unescape(link))
        if parts.scheme in ("http", "https") and (not parts.hostname or " " in link):
            log.warning("%s: malformed address %s", page.file.src_uri, link)
    return _FORMULA.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    text = html.unescape(match[2]).strip()
    display = "block" if text.startswith("\\[") else "inline"
    return str(convert(text[2:-2], display=display))


def _outside(page: str, link: str) -> str | None:
    """Return the path from the root of the repository of a link that leaves docs/, else None."""
    if "://" in link or link.startswith(("mailto:", "/")):
        return None
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if path.startswith("docs/") else path


def _copy(path: str) -> str:
    return "pictures/" + path.replace("/", "-")
