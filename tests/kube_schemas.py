"""KubeRay's own schemas: what a Kubernetes API server with KubeRay's CRDs would refuse, refused here."""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path
from typing import Any, cast

import jsonschema
import pytest
import yaml

SCHEMAS = Path(__file__).parents[2] / "shared" / "schemas"
Schema = dict[str, Any]


def check_manifest(manifest: Schema) -> None:
    """Fail on anything that the CRD of the manifest's kind does not know or does not allow."""
    crd_schema(manifest["kind"]).validate(manifest)


@cache
def crd_schema(kind: str) -> jsonschema.Draft202012Validator:
    file = SCHEMAS / f"kuberay-{kind.lower()}s.crd.yaml.gz"
    if not file.is_file():
        pytest.skip(f"{file} is not there: KubeRay's CRDs come with its Helm chart")
    crd = yaml.load(gzip.decompress(file.read_bytes()), Loader=yaml.CSafeLoader)  # ten times faster than in Python
    (version,) = [one for one in crd["spec"]["versions"] if one["name"] == "v1"]
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"] |= {"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": kind}}
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def closed(schema: Schema) -> Schema:
    """The same schema, refusing fields that it does not name, as `kubectl apply` does."""
    result = dict(schema)
    for key in ("items", "additionalProperties"):
        if isinstance(result.get(key), dict):
            result[key] = closed(result[key])
    if "properties" in result:
        properties = cast(dict[str, Schema], result["properties"])
        result["properties"] = {name: closed(one) for name, one in properties.items()}
        if not result.get("x-kubernetes-preserve-unknown-fields"):
            result["additionalProperties"] = False
    return result
