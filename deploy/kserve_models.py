"""Schemas of KServe's resources, read from the models of its Python SDK.

The models are generated from KServe's own types, and list the fields of each with their types.
Their source is parsed and not executed. Types of Kubernetes within them are not checked here: the
schemas of the custom resources do that.
"""

from __future__ import annotations

import ast
import re
import tarfile
from typing import Any

_PLAIN = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
_LIST, _MAP = re.compile(r"list\[(.+)\]"), re.compile(r"dict\(str, (.+)\)")
_PATH = re.compile(r"/kserve/models/v1(alpha1|beta1)_\w+\.py")

Models = dict[str, tuple[dict[str, str], dict[str, str]]]
"""Model → types of its attributes, and their names in JSON."""


def read_models(archive: tarfile.TarFile) -> Models:
    """Return the models of a source archive of the SDK."""
    models: Models = {}
    for member in archive.getmembers():
        if _PATH.search(member.name) and (file := archive.extractfile(member)) is not None:
            for one in ast.parse(file.read()).body:
                if isinstance(one, ast.ClassDef):
                    models[one.name] = _tables(one)
    return models


def schema_of(models: Models, model: str) -> dict[str, Any]:
    """Return the schema of a model, in which no other fields are allowed.

    Raises:
        KeyError: There is no such model.
    """
    types, names = models[model]
    properties = {names[attribute]: _schema(models, kind) for attribute, kind in types.items()}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _schema(models: Models, kind: str) -> dict[str, Any]:
    if kind in _PLAIN:
        return {"type": _PLAIN[kind]}
    if found := _LIST.fullmatch(kind):
        return {"type": "array", "items": _schema(models, found[1])}
    if found := _MAP.fullmatch(kind):
        return {"type": "object", "additionalProperties": _schema(models, found[1])}
    return schema_of(models, kind) if kind in models else {}


def _tables(model: ast.ClassDef) -> tuple[dict[str, str], dict[str, str]]:
    tables = {
        target.id: ast.literal_eval(one.value)
        for one in model.body
        if isinstance(one, ast.Assign)
        for target in one.targets
        if isinstance(target, ast.Name)
    }
    return tables["openapi_types"], tables["attribute_map"]
