"""Renders overlays as `kubectl apply -k` does, and reads their objects.

Uses the kubectl on the PATH, or the file that FLEXUNET_KUBECTL names.
"""

import functools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
_MIN_KUSTOMIZE = 5  # in kubectl from 1.27; older ones know neither components nor lists in patches

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """A pod template.

    Attributes:
        owner: `kind/name` of its object, and the group in a RayJob.
        template: its metadata and spec.
    """

    owner: str
    template: Manifest

    @property
    def labels(self) -> dict[str, str]:
        labels: dict[str, str] = self.template["metadata"]["labels"]
        return labels

    @property
    def spec(self) -> Manifest:
        spec: Manifest = self.template["spec"]
        return spec

    @property
    def containers(self) -> list[Manifest]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


@functools.cache
def kubectl() -> str:
    """Returns the kubectl to use; skips the test if it is missing or too old."""
    program = os.environ.get("FLEXUNET_KUBECTL") or shutil.which("kubectl")
    if program is None:
        pytest.skip("no kubectl on the PATH; install 1.27 or newer, or set FLEXUNET_KUBECTL")
    answer = subprocess.check_output([program, "version", "--client", "--output=json"], text=True)
    version = json.loads(answer).get("kustomizeVersion", "v2 (not reported)")
    if int(version.removeprefix("v").split(".")[0].split()[0]) < _MIN_KUSTOMIZE:
        pytest.skip(f"{program} has kustomize {version}; kubectl 1.27 or newer has v5")
    return program


@functools.cache
def _text(folder: str) -> str:
    return subprocess.check_output([kubectl(), "kustomize", K8S / folder], text=True)


def render(folder: str) -> list[Manifest]:
    """Returns the objects of `base` or an overlay (`overlays/NAME`), each time anew."""
    return list(yaml.load_all(_text(folder), yaml.CSafeLoader))


def of_kind(objects: Sequence[Manifest], *kinds: str) -> list[Manifest]:
    return [each for each in objects if each["kind"] in kinds]


def find(objects: Sequence[Manifest], kind: str, name: str) -> Manifest:
    """Returns the object `name`, whose full name may end with a hash."""
    (found,) = (
        each for each in of_kind(objects, kind) if each["metadata"]["name"].startswith(name)
    )
    return found


def pods(objects: Sequence[Manifest]) -> Iterator[Pod]:
    """Yields every pod template."""
    for each in of_kind(objects, "Job", "Deployment"):
        yield Pod(f"{each['kind']}/{each['metadata']['name']}", each["spec"]["template"])
    for each in of_kind(objects, "RayJob"):
        cluster = each["spec"]["rayClusterSpec"]
        owner = f"RayJob/{each['metadata']['name']}"
        yield Pod(f"{owner} head", cluster["headGroupSpec"]["template"])
        for group in cluster["workerGroupSpecs"]:
            yield Pod(f"{owner} {group['groupName']}", group["template"])


def environment(objects: Sequence[Manifest], container: Manifest) -> dict[str, str]:
    """Returns the variables of a container, including those of its ConfigMaps."""
    values: dict[str, str] = {}
    for source in container.get("envFrom", []):
        values |= find(objects, "ConfigMap", source["configMapRef"]["name"])["data"]
    return values | {each["name"]: each["value"] for each in container.get("env", [])}
