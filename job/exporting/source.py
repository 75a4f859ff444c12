"""Opens the runs to export, with their checkpoints and how their probabilities become masks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from data_prep.shards.manifest import Manifest
from flexunet.storage import ObjectStore, open_store
from job.exporting.options import ExportConfig
from job.inference.options import ImageConfig
from job.inference.prediction import overlap_of, postprocessing_of
from job.models.compatibility import num_outputs
from job.postprocessing.stored import Resolved
from job.runs.checkpoints import Checkpoint
from job.runs.loading import (
    EnsembleMember,
    TrainedRun,
    ensemble_member,
    find_checkpoint,
    load_model,
    model_for,
    open_ensemble,
)

if TYPE_CHECKING:
    import keras

PRECISION = "float32"  # of every export


@dataclass(frozen=True)
class ExportSource:
    """The runs of an export.

    Attributes:
        store: folder of the run, or of the cross-validation.
        checkpoints: the exported checkpoint of each run.
        postprocessing: how `infer` turns probabilities into masks.
        overlap: of windows, pixels; None if `infer` predicts images whole.
    """

    store: ObjectStore
    runs: tuple[TrainedRun, ...]
    checkpoints: tuple[Checkpoint, ...]
    postprocessing: Resolved
    overlap: int | None

    @property
    def name(self) -> str:
        """The name of the run or the cross-validation."""
        return name_of(self.store)

    @property
    def manifest(self) -> Manifest:
        """The manifest of the dataset of the first run."""
        return self.runs[0].manifest

    @property
    def num_outputs(self) -> int:
        """The number of probabilities of a pixel; 1 for a sigmoid output."""
        return num_outputs(self.runs[0].config, self.manifest)

    @property
    def side_multiple(self) -> int:
        """The number of pixels by which both sides of an image must be divisible."""
        return math.lcm(*(2 ** (run.config.model.levels - 1) for run in self.runs))

    @property
    def members(self) -> tuple[EnsembleMember, ...]:
        """The weights of the export."""
        pairs = zip(self.runs, self.checkpoints, strict=True)
        return tuple(ensemble_member(run, checkpoint) for run, checkpoint in pairs)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The threshold of each class but 0; empty: 0.5 for each."""
        return self.postprocessing.values.thresholds


def name_of(store: ObjectStore) -> str:
    """Returns the name of the run in `store`."""
    return store.url.rstrip("/").rpartition("/")[2]


def open_source_runs(url: str, config: ExportConfig) -> ExportSource:
    """Returns the runs of an export, without their weights; does not import TensorFlow.

    Raises:
        UsageError: there is no run or no checkpoint, or the runs do not go together.
        ContentError: the fitted postprocessing is damaged.
    """
    runs = open_ensemble([url, *config.ensemble])
    found = tuple(find_checkpoint(run.store, which=config.checkpoint) for run in runs)
    as_usual = ImageConfig()  # what `infer` does without options
    overlap = overlap_of(runs[0], as_usual)
    members = tuple(ensemble_member(*pair) for pair in zip(runs, found, strict=True))
    postprocessing = postprocessing_of(as_usual, runs, members, overlap)
    return ExportSource(open_store(url), runs, found, postprocessing, overlap)


def load_networks(source: ExportSource) -> list["keras.Model"]:
    """Returns the network of each run in float32: (B, H, W, C) -> logits (B, H, W, K).

    Raises:
        ContentError: a checkpoint is damaged.
        NotFound: a checkpoint was deleted because training continued.
    """
    pairs = zip(source.runs, source.checkpoints, strict=True)
    return [load_model(_in_float32(run), which=found.prefix)[0] for run, found in pairs]


def networks_at_size(
    source: ExportSource, networks: Sequence["keras.Model"], size: tuple[int, int]
) -> list["keras.Model"]:
    """Returns `networks`, with the same weights, for images of another (height, width)."""
    from job.models.heads import main_model

    changes = dict(zip(("image_height", "image_width"), size, strict=True))
    resized: list[Any] = []
    for run, network in zip(source.runs, networks, strict=True):
        found = main_model(
            model_for(_in_float32(run).config, run.manifest.model_copy(update=changes))
        )
        found.set_weights(network.get_weights())
        resized.append(found)
    return resized


def _in_float32(run: TrainedRun) -> TrainedRun:
    return replace(run, config=run.config.model_copy(update={"precision": PRECISION}))
