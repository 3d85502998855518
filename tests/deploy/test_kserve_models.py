"""Fields of KServe's resources, read from the source of its SDK without running it."""

import io
import tarfile

import pytest
from deploy.kserve_models import read_models, schema_of

SERVICE = '''
import not_installed
class V1beta1InferenceService(object):
    """A model."""
    openapi_types = {"kind": "str", "spec": "V1beta1Spec", "metadata": "V1ObjectMeta"}
    attribute_map = {"kind": "kind", "spec": "spec", "metadata": "metadata"}
    def __init__(self):
        raise AssertionError
'''
SPEC = """
class V1beta1Spec(object):
    openapi_types = {
        "min_replicas": "int", "init_containers": "list[V1Container]", "labels": "dict(str, str)"
    }
    attribute_map = {
        "min_replicas": "minReplicas", "init_containers": "initContainers", "labels": "labels"
    }
"""


def archive(**files: str) -> tarfile.TarFile:
    with tarfile.open(fileobj=(content := io.BytesIO()), mode="w") as written:
        for name, text in files.items():
            member = tarfile.TarInfo(f"kserve-0.21.0/kserve/models/{name}.py")
            member.size = len(text.encode())
            written.addfile(member, io.BytesIO(text.encode()))
    content.seek(0)
    return tarfile.open(fileobj=content)


def test_models_become_schemas_with_their_fields_and_no_others() -> None:
    with archive(v1beta1_inference_service=SERVICE, v1beta1_spec=SPEC, other="class X: 1/0") as tar:
        models = read_models(tar)
    spec = {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "minReplicas": {"type": "integer"},
            "initContainers": {"type": "array", "items": {}},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        },
    }
    assert schema_of(models, "V1beta1InferenceService") == {
        "type": "object",
        "additionalProperties": False,
        "properties": {"kind": {"type": "string"}, "spec": spec, "metadata": {}},
    }
    with pytest.raises(KeyError):
        schema_of(models, "V1beta1Other")
