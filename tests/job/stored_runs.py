"""Writes finished runs without training: the real evaluation of synthetic masks, and its files."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np

from data_prep.imaging.geometry import Geometry
from data_prep.masks.color_map import ClassColor
from data_prep.shards.manifest import Manifest, parse_manifest
from flexunet.settings import write_yaml
from flexunet.storage import open_store
from flexunet.tables import csv_table
from job.config import TrainConfig
from job.data.cases import Case
from job.evaluation.artifacts import write_evaluation
from job.evaluation.case_measures import CaseInput, CaseMeasures, CaseResult
from job.evaluation.evaluator import Evaluation
from job.evaluation.example_cases import example_cases
from job.evaluation.gathering import Measured
from job.metrics.calibration import Calibration
from job.metrics.confusion import Confusion, summarize
from job.metrics.per_case import SIZES, TRUTHS, summarize_cases
from job.metrics.thresholds import ThresholdSweep
from job.reporting import plots
from job.reporting.csv_tables import CURVE_LABELS, CURVE_TITLES, History

RELIC = Path(__file__).resolve().parents[1] / "relics" / "v0.1.0" / "runs" / "folds-fold-0"
NAMES = (
    *("void", "sky", "building", "pole", "road", "pavement", "tree", "sign symbol", "fence"),
    *("car", "pedestrian", "bicyclist"),
)
COLORS = (
    *((0, 0, 0), (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222)),
    *((128, 128, 0), (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192)),
)


def store_run(
    url: str,
    *,
    num_classes: int = 12,
    num_cases: int = 12,
    side: int = 32,
    noise: float = 0.35,
    has_figures: bool = True,
    **options: Any,
) -> None:
    """Writes a run that was evaluated on street scenes; the same cases for each `noise`.

    Args:
        side: height of the images; they are half as wide again.
        noise: of the predictions.
        has_figures: store curves and images of cases.
        options: of the config: `epochs=3`.
    """
    store, name = open_store(url), url.rstrip("/").rpartition("/")[2]
    config = TrainConfig(
        data="data", output="runs", name=name, **({"epochs": 4, "preset": "reference"} | options)
    )
    manifest = manifest_of(num_classes, side)
    store.put("dataset.json", manifest.to_json())
    store.put("config.yaml", write_yaml(config).encode())
    outcome = {"status": "finished", "exit_code": 0, "attempt": 1, "epochs": 4}
    outcome |= {"stopped_early": False, "best": {"epoch": 3, "val_loss": 0.5, "step": 4}}
    store.put("outcome.json", json.dumps(outcome).encode())
    _write_epochs(store, noise, has_figures=has_figures)
    evaluation, evaluator = evaluate_scenes(
        manifest, num_cases, side, noise, has_figures=has_figures
    )
    write_evaluation(store.subpath("evaluation"), evaluation, evaluator)


def manifest_of(num_classes: int, side: int) -> Manifest:
    """Returns the manifest of a dataset of street scenes."""
    manifest = parse_manifest((RELIC / "dataset.json").read_bytes(), "dataset.json")
    classes = tuple(ClassColor(index, NAMES[index], COLORS[index]) for index in range(num_classes))
    size = {"image_height": side, "image_width": side * 3 // 2}
    return manifest.model_copy(update={"classes": classes, "reduced": {}, "ignore_id": 255, **size})


def _write_epochs(store: Any, noise: float, *, has_figures: bool) -> None:
    rows = [
        {
            "epoch": epoch,
            "learning_rate": 0.001,
            "loss": 2 / (epoch + 1) + noise,
            "val_loss": 2.5 / (epoch + 1) + noise,
            "val_foreground_dice": None if epoch == 0 else 1 - noise - 0.5 / epoch,
            "val_foreground_iou": None if epoch == 0 else 0.8 - noise - 0.5 / epoch,
        }
        for epoch in range(4)
    ]
    for name, text in History(rows, metrics=()).tables().items():
        store.put(f"metrics/{name}", text.encode())
    rates = [(epoch, 5.0 + noise) for epoch in range(4)]
    store.put("metrics/throughput.csv", csv_table(("epoch", "train_images_per_s"), rates).encode())
    lines = {"foreground": ("val_foreground_dice",), "train_losses": ("loss", "val_loss")}
    for stem, names in lines.items() if has_figures else ():
        series = {name: [row[name] or float("nan") for row in rows] for name in names}
        png = plots.curve_png(CURVE_TITLES[stem], [1, 2, 3, 4], series, "value", CURVE_LABELS)
        store.put(f"metrics/{stem}.png", png)


def evaluate_scenes(
    manifest: Manifest, num_cases: int, side: int, noise: float, *, has_figures: bool
) -> tuple[Evaluation, Any]:
    """Returns the evaluation of predictions of street scenes, and a stand-in evaluator."""
    names = [each.name for each in manifest.classes]
    measures = CaseMeasures(len(names), ignore_id=255)
    cases, results, images, truths = [], [], [], []
    for index in range(num_cases):
        image, truth, probabilities = draw_scene(index, len(names), side, noise)
        shape = truth.shape
        geometry = Geometry("stretch", *shape, 0, 0, *shape)
        cases.append(
            Case(f"case-{index:02d}", f"{index:04d}.png", f"drive-{index % 6}", geometry, None, ())
        )
        results.append(measures.measure(CaseInput(index, geometry, None, truth, probabilities)))
        images.append(image)
        truths.append(truth)
    measured = _together(results, names)
    groups = [each.group for each in cases]
    summary = {"split": "test", **summarize(measured.counts), "loss": 0.5}
    for each, name in zip(summary["classes"], names, strict=True):
        each["name"] = name
    summary |= {"case": "picture", "overlap": None, "fold": None, "truth": dict(TRUTHS)}
    summary["sizes"] = {
        size: summarize_cases(measured.case_metrics[size], groups, names[1:]) for size in SIZES
    }
    summary["calibration"] = measured.calibration.summary()
    summary["init_from"] = []
    evaluation = Evaluation(
        split=None,  # type: ignore[arg-type]
        cases=tuple(cases),
        means={"loss": 0.5},
        counts=measured.counts,
        summary=summary,
        measured=measured,
    )
    figures = {}
    for name, index, score in example_cases(measured.counts) if has_figures else ():
        ids = results[index].mask.unpack()
        title = plots.panel_title(cases[index].filename, score, "mean Dice")
        case = images[index], truths[index]
        figures[f"examples/{name}"] = plots.panel_png(*case, ids, manifest.classes, title)
        figures[f"overlays/{name}"] = plots.overlay_png(
            case[0], ids, manifest.classes, truths[index]
        )
    evaluator = SimpleNamespace(
        config=TrainConfig(data="data"), metrics={}, dataset=SimpleNamespace(manifest=manifest)
    )
    return replace(evaluation, examples=figures), evaluator


def _together(results: list[CaseResult], names: list[str]) -> Measured:
    sweep, calibration = ThresholdSweep(names[1:]), Calibration(names[1:], (1.0,))
    confusion = Confusion(names)
    for each in results:
        sweep.add(each.tallies.sweep)
        calibration.add(each.tallies.calibration)
        confusion.add(each.tallies.confusion)
    return Measured(
        case_metrics={size: [each.metrics[size] for each in results] for size in SIZES},
        counts=np.stack([each.counts for each in results]),
        plain_counts=None,
        sweep=sweep,
        calibration=calibration,
        confusion=confusion,
        masks={},
    )


def draw_scene(
    seed: int, num_classes: int, side: int, noise: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns image (H, W, 3) uint8, truth (H, W) uint8 and probabilities (H, W, K) float32."""
    random, shape = np.random.default_rng(seed), (side, side * 3 // 2)

    def smooth(sigma: float) -> np.ndarray:
        fields = random.standard_normal((num_classes, *shape)).astype(np.float32)
        blurred = np.stack([cv2.GaussianBlur(each, (0, 0), sigma) for each in fields])
        return blurred / blurred.std(axis=(1, 2), keepdims=True)

    # Some classes are rare, as in street scenes.
    order = np.linspace(1.0, 0.7, num_classes)[:, None, None]
    scores, disturbed = smooth(side / 12) * order, smooth(side / 20)
    truth = np.argmax(scores, axis=0).astype(np.uint8)
    logits = 6 * (scores + noise * disturbed)
    exponents = np.exp(logits - logits.max(axis=0))
    probabilities = (exponents / exponents.sum(axis=0)).transpose(1, 2, 0).astype(np.float32)
    colors = np.array(COLORS[:num_classes], np.float32)[truth]
    image = np.clip(colors + random.normal(0, 25, colors.shape), 0, 255).astype(np.uint8)
    truth[:2] = 255  # ignored
    return image, truth, probabilities
