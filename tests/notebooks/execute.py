"""Executes a notebook and writes it with its outputs: ``python execute.py NOTEBOOK OUT``."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

CELL_S = 240

if __name__ == "__main__":
    source, out = map(Path, sys.argv[1:])
    notebook = nbformat.read(source, as_version=4)
    folder = {"metadata": {"path": str(out.parent)}}
    NotebookClient(notebook, timeout=CELL_S, resources=folder).execute()
    nbformat.write(notebook, out)
