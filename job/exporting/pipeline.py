"""Exports a run, an ensemble or a cross-validation as one model, and checks what it wrote."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flexunet.errors import ContentError, StorageError
from flexunet.progress import waiting
from flexunet.storage import NotFound
from job.exporting.formats.registry import PATHS, check_installed, check_size, functions_of
from job.exporting.metadata import Check, metadata_of
from job.exporting.model_card import render_card
from job.exporting.options import ExportConfig, Format
from job.exporting.output import CARD_NAME, METADATA_NAME, check_output, staged
from job.exporting.parity import (
    PROBABILITY_LIMIT,
    Expected,
    Parity,
    compare,
)
from job.exporting.samples import Samples, check_batches, choose_samples
from job.exporting.source import (
    PRECISION,
    ExportSource,
    load_networks,
    networks_at_size,
    open_source_runs,
)
from job.inference.prediction import load_predictor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportResult:
    """The result of `export`.

    Attributes:
        url: folder or gs:// URL of the export.
        files: files and folders of the formats, by format, relative to `url`.
        metadata: the content of `metadata.json`.
    """

    url: str
    files: dict[str, str]
    metadata: dict[str, Any]


def export(run_url: str, output_url: str, config: ExportConfig) -> ExportResult:
    """Writes a run, or several as one model, for programs that do not have this package.

    All options are checked before TensorFlow is imported. If anything fails, nothing is written.

    Args:
        run_url: a run, or a cross-validation, whose folds then predict together.
        output_url: new folder or gs:// URL.

    Raises:
        UsageError: there is no run, runs that do not match, packages of a format are missing, the
            model is too large for ONNX, or `output_url` has other files.
        ContentError: a checkpoint is damaged, or an exported file computes something else.
        StorageError: storage is unavailable or full.
    """
    formats = tuple(dict.fromkeys(config.format))
    check_installed(formats)
    source = open_source_runs(run_url, config)
    store = check_output(output_url, overwrite=config.overwrite)
    if source.postprocessing.line is not None:
        logger.info("%s", source.postprocessing.line)
    samples = choose_samples(source.runs[0], config.data)
    _log_samples(samples)
    from job.distributed.runtime import import_tensorflow

    with waiting("loading TensorFlow", shown=config.progress):
        tf = import_tensorflow()
    batches = check_batches(samples, source.side_multiple)
    with staged(store, overwrite=config.overwrite) as folder:
        with waiting("loading the weights", shown=config.progress):
            networks = _loaded(source)
        check_size(formats, sum(each.count_params() for each in networks))
        with waiting("computing what infer computes", shown=config.progress), tf.device("CPU:0"):
            # On a CPU: GPUs may compute convolutions with fewer bits.
            expected = _expected(source, networks, batches)
        shapes = tuple(each.shape for each in batches)
        check = Check(samples, shapes, {}, _trained_difference(source, expected))
        parities = _write_all(formats, networks, source, folder, expected, shown=config.progress)
        metadata = metadata_of(source, replace(check, parities=parities), folder)
        _write_text(folder, CARD_NAME, render_card(source, config, metadata))
        text = json.dumps(metadata, indent=1, ensure_ascii=False, allow_nan=False)
        _write_text(folder, METADATA_NAME, f"{text}\n")
    return ExportResult(store.url, {name: PATHS[name] for name in formats}, metadata)


def _log_samples(samples: Samples) -> None:
    if samples.split is None:
        logger.warning("the check uses generated images: %s", samples.reason)
    else:
        logger.info("checked on samples of the %s split: %s", samples.split, ", ".join(samples.ids))


def _loaded(source: ExportSource) -> list[Any]:
    try:
        return load_networks(source)
    except NotFound as error:
        raise StorageError(
            f"{error}: deleted because training continued; run the same command again"
        ) from error


def _expected(
    source: ExportSource, networks: Sequence[Any], batches: Sequence[np.ndarray]
) -> list[Expected]:
    """Returns what `infer` computes for each batch; the networks of `infer` have a fixed size."""
    from job.models.ensemble import make_probability_step, network_of

    steps: dict[tuple[int, ...], Any] = {}
    expected = []
    for pixels in batches:
        size = pixels.shape[1:3]
        if size not in steps:
            fitting = networks
            if size != networks[0].input_shape[1:3]:
                fitting = networks_at_size(source, networks, size)
            steps[size] = make_probability_step(network_of(fitting))
        expected.append(Expected(pixels, steps[size](pixels).numpy()))
    return expected


def _trained_difference(source: ExportSource, expected: Sequence[Expected]) -> float | None:
    """Returns how far float32 is from the precision in which `infer` computes these runs."""
    if all(run.config.precision == PRECISION for run in source.runs):
        return None
    step = load_predictor(source.members, "none", needs_gpu=False).step
    size = source.manifest.image_height, source.manifest.image_width
    differences = [
        np.abs(step(each.pixels).numpy() - each.probabilities).max()
        for each in expected
        if each.pixels.shape[1:3] == size
    ]
    return float(max(differences))


def _write_all(
    formats: Sequence[Format],
    networks: Sequence[Any],
    source: ExportSource,
    folder: str,
    expected: Sequence[Expected],
    *,
    shown: bool,
) -> dict[Format, Parity]:
    """Writes and checks all formats; returns how far each agrees with `infer`.

    Raises:
        ContentError: a format does not agree.
    """
    from job.exporting.portable import serving_model

    manifest = source.manifest
    model = serving_model(
        networks,
        channels=manifest.channels,
        bit_depth=manifest.bit_depth,
        thresholds=source.thresholds,
    )
    parities: dict[Format, Parity] = {}
    for name in formats:
        with waiting(f"writing {PATHS[name]}", shown=shown):
            parities[name] = _write_one(name, model, folder, expected, source.thresholds)
    return parities


def _write_one(
    name: Format,
    model: Any,
    folder: str,
    expected: Sequence[Expected],
    thresholds: Sequence[float],
) -> Parity:
    import tensorflow as tf

    functions, path = functions_of(name), os.path.join(folder, PATHS[name])
    try:
        functions.write(model, path)
    except (OSError, tf.errors.OpError) as error:  # a full disk
        # TensorFlow puts the name of its operation first, and the reason last.
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0].rpartition("; ")[2]
        raise StorageError(
            f"cannot write {PATHS[name]} of the export: {reason}; free some space or choose "
            "another folder"
        ) from error
    with tf.device("CPU:0"):
        parity = compare(functions.open(path), expected, thresholds)
    if not parity.has_passed:
        raise ContentError(
            f"--format {name}: the exported model does not compute what infer computes: "
            f"probabilities differ by up to {parity.max_probability_difference:.2g} (limit "
            f"{PROBABILITY_LIMIT:g}), {parity.num_other_ids} of {parity.num_pixels} pixels have "
            "another class; nothing was written; export another format"
        )
    logger.info(
        "%s: largest difference of a probability %.1e, no other class in %d pixels",
        PATHS[name],
        parity.max_probability_difference,
        parity.num_pixels - parity.num_ties,
    )
    return parity


def _write_text(folder: str, name: str, text: str) -> None:
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        file.write(text)
