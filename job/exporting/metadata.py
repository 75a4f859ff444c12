"""Describes an export in `metadata.json`: what goes in and comes out, and what callers must do."""

import hashlib
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata as installed
from typing import Any

from data_prep.shards.manifest import Manifest
from job.exporting.options import Format
from job.exporting.output import files_of
from job.exporting.parity import (
    CLASS_IDS,
    INPUT,
    PROBABILITIES,
    PROBABILITY_LIMIT,
    TIE_MARGIN,
    Parity,
)
from job.exporting.samples import Samples
from job.exporting.source import PRECISION, ExportSource, name_of
from job.postprocessing.masks import DEFAULT_THRESHOLD

VERSION = 1  # of the file
_PACKAGES = ("flexunet", "tensorflow", "keras", "onnx", "onnxruntime", "tf2onnx")


@dataclass(frozen=True)
class Check:
    """The result of the check of an export.

    Attributes:
        batches: shapes (B, H, W, C) of the batches.
        parities: by format.
        trained_difference: largest difference of a probability to the precision of the training;
            None if that is float32, too.
    """

    samples: Samples
    batches: tuple[tuple[int, ...], ...]
    parities: Mapping[Format, Parity] = field(default_factory=dict)
    trained_difference: float | None = None


def metadata_of(source: ExportSource, check: Check, folder: str) -> dict[str, Any]:
    """Returns the content of `metadata.json`, JSON values, for the files in `folder`."""
    manifest = source.manifest
    return {
        "version": VERSION,
        "name": source.name,
        "input": _input_of(source),
        "outputs": _outputs_of(source),
        "classes": [
            {"id": each.id, "name": each.name, "color": list(each.color)}
            for each in manifest.classes
        ],
        "preprocessing": _preprocessing_of(source),
        "postprocessing": _postprocessing_of(source),
        "runs": [
            {
                "name": name_of(run.store),
                "checkpoint": checkpoint.prefix,
                "epoch": checkpoint.epoch,
                "commit_sha256": checkpoint.sha256,
                "dataset_sha256": run.dataset_digest,
                "network": run.config.model.name,
                "trained_precision": run.config.precision,
            }
            for run, checkpoint in zip(source.runs, source.checkpoints, strict=True)
        ],
        "precision": PRECISION,
        "check": _check_of(check),
        "files": {name: _digest_of(os.path.join(folder, name)) for name in files_of(folder)},
        "versions": _versions(),
    }


def _input_of(source: ExportSource) -> dict[str, Any]:
    manifest = source.manifest
    return {
        "name": INPUT,
        "dtype": f"uint{manifest.bit_depth}",
        "shape": ["batch", "height", "width", manifest.channels],
        "channels": _channel_names(manifest),
        "value_max": manifest.value_max,
        "sides_divisible_by": source.side_multiple,
        "network_height": manifest.image_height,
        "network_width": manifest.image_width,
    }


def _channel_names(manifest: Manifest) -> list[str]:
    names = {1: ["grey"], 3: ["red", "green", "blue"]}
    plain = [f"channel {number}" for number in range(1, manifest.channels + 1)]
    return names.get(manifest.channels, plain)


def _outputs_of(source: ExportSource) -> dict[str, Any]:
    is_single = source.num_outputs == 1
    return {
        PROBABILITIES: {
            "dtype": "float32",
            "shape": ["batch", "height", "width", source.num_outputs],
            "meaning": "probability of class 1" if is_single else "probability of each class",
        },
        CLASS_IDS: {
            "dtype": "uint8",
            "shape": ["batch", "height", "width"],
            "meaning": "class of each pixel, decided with the thresholds below",
        },
    }


def _preprocessing_of(source: ExportSource) -> dict[str, Any]:
    """Returns what `infer` does before the network and the export does not contain."""
    manifest = source.manifest
    return {
        "geometry": manifest.geometry,
        "crop": manifest.crop,
        "flip": manifest.flip,
        "window_overlap": source.overlap,
    }


def _postprocessing_of(source: ExportSource) -> dict[str, Any]:
    """Returns how `infer` turns probabilities into masks; only thresholds are in the export."""
    values, record = source.postprocessing.values, source.postprocessing.record
    names = [each.name for each in source.manifest.classes if each.id != 0]
    thresholds = values.thresholds or [DEFAULT_THRESHOLD] * len(names)
    min_region = values.min_pixels or [0] * len(names)
    return {
        "thresholds": dict(zip(names, thresholds, strict=True)),
        "thresholds_in_class_ids": True,
        "min_region": dict(zip(names, min_region, strict=True)),
        "temperature": values.temperature,
        "fitted_on": None if record is None else record["fitted_on"],
    }


def _check_of(check: Check) -> dict[str, Any]:
    samples = check.samples
    return {
        "against": f"the checkpoint, computed by infer in {PRECISION}",
        "samples": {
            "split": samples.split,
            "indices": list(samples.indices),
            "pixels_sha256": [
                hashlib.sha256(each.tobytes()).hexdigest() for each in samples.images
            ],
            "generated": samples.split is None,
        },
        "batches": [list(shape) for shape in check.batches],
        "probability_limit": PROBABILITY_LIMIT,
        "tie_margin": TIE_MARGIN,
        "formats": {name: asdict(parity) for name, parity in check.parities.items()},
        "max_difference_to_trained_precision": check.trained_difference,
    }


def _digest_of(path: str) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": os.path.getsize(path), "sha256": digest}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = installed.version(name)
        except installed.PackageNotFoundError:
            continue
    return found
