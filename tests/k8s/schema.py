"""Checks an object against its OpenAPI schema, and rejects unknown fields.

An API server drops unknown fields, so that a misspelled `backOffLimit` would have no effect.
KubeRay's schemas are in the folder that FLEXUNET_KUBERAY_SCHEMAS names, else in ../shared/schemas.
"""

import functools
import os
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.k8s.manifests import ROOT, Manifest


def errors_of(manifest: Manifest) -> list[str]:
    """Returns the problems of an object, in lines `path: problem`."""
    if manifest["apiVersion"].startswith("ray.io/"):
        found = _ray_validator(manifest["kind"], manifest["apiVersion"]).iter_errors(manifest)
        return [f"{error.json_path}: {error.message}" for error in found]
    try:
        version = kubernetes_validate.latest_version()
        kubernetes_validate.validate(manifest, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    return []


@functools.cache
def _ray_validator(kind: str, api_version: str) -> jsonschema.Draft7Validator:
    folder = Path(os.environ.get("FLEXUNET_KUBERAY_SCHEMAS") or ROOT.parent / "shared" / "schemas")
    path = folder / f"ray.io_{kind.lower()}s.yaml"
    if not path.is_file():
        pytest.skip(f"no {path}; set FLEXUNET_KUBERAY_SCHEMAS to the folder of KubeRay's CRDs")
    with path.open() as file:
        crd = yaml.load(file, yaml.CSafeLoader)
    (version,) = (v for v in crd["spec"]["versions"] if f"ray.io/{v['name']}" == api_version)
    return jsonschema.Draft7Validator(_strict(version["schema"]["openAPIV3Schema"]))


def _strict(schema: Any) -> Any:
    """Returns `schema` with additional properties forbidden in all its objects."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items()}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields", False)
    if isinstance(schema.get("properties"), dict) and not is_open:
        strict.setdefault("additionalProperties", False)
    return strict
