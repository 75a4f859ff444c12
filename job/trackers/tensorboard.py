"""Writes TensorBoard's event files of a run.

The numbers of all epochs are in `tensorboard/attempt-N/`, written again by each attempt. The images
and curves of an epoch are a file of their own in `tensorboard/validation/`, whose name is that of
the epoch: an epoch that is trained again after a kill replaces its file. So every epoch is there
once, and no file grows. Long runs write them after some epochs only, see `shows_epoch`.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from data_prep.masks.color_map import ClassColor
from flexunet.storage import ObjectStore
from job.trackers.overlays import overlay_jpeg

_FOLDER = "tensorboard"
_OF_EPOCHS = f"{_FOLDER}/validation"
_PREFIX = "events.out.tfevents."
_MAX_OVERLAYS = 4
_NUM_THRESHOLDS = 129  # 0, 1/128, ..., 1, which float32 multiplies exactly

Counts = npt.NDArray[np.int64]


def shows_epoch(epoch: int) -> bool:
    """Returns whether an epoch, from 0, gets overlays and curves.

    The first 32 do, then every second up to 64, every fourth up to 128 and so on: 112 of 1024.
    """
    stride = 1 << max(0, epoch.bit_length() - 5)
    return (epoch + 1) % stride == 0


class EventLog:
    """Writes the events of one attempt."""

    def __init__(
        self,
        staging: str,
        attempt: int,
        classes: Sequence[ClassColor],
        put: Callable[[str, bytes], None],
    ) -> None:
        """Creates the file of the numbers.

        Args:
            staging: a local folder.
            put: queues a file of the run.
        """
        self._folder = os.path.join(staging, _FOLDER)
        self._target = f"{_FOLDER}/attempt-{attempt}"
        self._classes = classes
        self._put = put
        self._writer = tf.summary.create_file_writer(self._folder)
        self._overlays: list[tuple[str, tuple[int, int, bytes]]] = []
        self._histograms = {each.id: _no_pixels() for each in classes if each.id != 0}
        self._num_cases = 0

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()

    def write_numbers(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds the numbers of epochs, and stores the file.

        Args:
            rows: of `joined_rows`.
        """
        with self._writer.as_default():
            for row in rows:
                for name, value in row.items():
                    if name != "epoch" and value is not None:
                        tf.summary.scalar(name, value, step=row["epoch"])
        self._writer.flush()
        for name in os.listdir(self._folder):
            with open(os.path.join(self._folder, name), "rb") as file:
                self._put(f"{self._target}/{name}", file.read())

    def add_case(
        self,
        name: str,
        image: npt.NDArray[Any],
        truth: npt.NDArray[np.uint8] | None,
        ids: npt.NDArray[np.uint8],
        probabilities: npt.NDArray[np.float32],
    ) -> None:
        """Adds a predicted case of the epoch in progress.

        Args:
            image: (H, W, C).
            truth: (H, W) class ids; None: not known.
            ids: (H, W), the prediction.
            probabilities: (H, W, K); K = 1 is a sigmoid output.
        """
        if len(self._overlays) < _MAX_OVERLAYS:
            self._overlays.append((name, overlay_jpeg(image, ids, truth, self._classes)))
        if truth is None:
            return
        self._num_cases += 1
        known = np.isin(truth, [each.id for each in self._classes])  # not the pixels to ignore
        for class_id, histogram in self._histograms.items():
            plane = probabilities[..., min(class_id, probabilities.shape[-1] - 1)]
            histogram += probability_histogram(plane[known], truth[known] == class_id)

    def put_epoch(self, epoch: int) -> None:
        """Stores the overlays and precision-recall curves of an epoch, and begins the next."""
        summaries = [_image_summary(name, *found) for name, found in self._overlays]
        if self._num_cases:
            note = f"Pixels of the {self._num_cases} validation images that each epoch predicts."
            names = {each.id: each.name for each in self._classes}
            summaries += [
                _curve_summary(f"precision_recall/{names[class_id]}", histogram, note)
                for class_id, histogram in self._histograms.items()
            ]
        if summaries:
            self._put(_name_of(epoch), _file_of(epoch, summaries, self._folder))
        self._overlays, self._num_cases = [], 0
        self._histograms = {class_id: _no_pixels() for class_id in self._histograms}

    def forget_others(self, run: ObjectStore, num_epochs: int) -> None:
        """Deletes the numbers of earlier attempts, and epochs that are to be trained again.

        A killed attempt may have stored events of an epoch without a checkpoint.

        Args:
            num_epochs: number of epochs in the checkpoint.
        """
        kept = {_name_of(epoch) for epoch in range(num_epochs)}
        for stat in run.list(f"{_FOLDER}/"):
            if not stat.name.startswith(f"{self._target}/") and stat.name not in kept:
                run.delete(stat.name)


def probability_histogram(
    probabilities: npt.NDArray[np.float32], is_true: npt.NDArray[np.bool_]
) -> Counts:
    """Counts pixels by probability: (2, T) int64, other pixels and those of the class.

    A pixel counts at the highest of the T thresholds that is at most its probability.
    """
    places = (probabilities * np.float32(_NUM_THRESHOLDS - 1)).astype(np.intp)
    places = np.clip(places, 0, _NUM_THRESHOLDS - 1) + _NUM_THRESHOLDS * is_true
    counts = np.bincount(places.reshape(-1), minlength=2 * _NUM_THRESHOLDS)
    return counts.reshape(2, _NUM_THRESHOLDS).astype(np.int64)


def curve_counts(histogram: Counts) -> dict[str, npt.NDArray[np.float64]]:
    """Returns tp, fp, tn, fn, precision and recall at each threshold, for `histogram` (2, T).

    A pixel is found where its probability is at least the threshold. Without a found pixel the
    precision is 1, without a true one the recall is 0.
    """
    fp, tp = np.cumsum(histogram[:, ::-1], axis=1)[:, ::-1].astype(np.float64)
    others, trues = histogram.sum(axis=1)
    found = tp + fp
    precision = np.divide(tp, found, out=np.ones_like(tp), where=found > 0)
    recall = tp / max(1, trues)
    return {"tp": tp, "fp": fp, "tn": others - fp, "fn": trues - tp} | {
        "precision": precision,
        "recall": recall,
    }


def _no_pixels() -> Counts:
    return np.zeros((2, _NUM_THRESHOLDS), np.int64)


def _name_of(epoch: int) -> str:
    """Returns the file of an epoch, from 0; TensorBoard reads files in the order of their names."""
    return f"{_OF_EPOCHS}/{_PREFIX}{epoch:010d}"


def _file_of(epoch: int, summaries: Sequence[Any], folder: str) -> bytes:
    """Returns the bytes of an event file."""
    path = os.path.join(os.path.dirname(folder), "epoch-events")
    now = time.time()
    with tf.io.TFRecordWriter(path) as file:
        version = tf.compat.v1.Event(wall_time=now, file_version="brain.Event:2")
        file.write(version.SerializeToString())
        for summary in summaries:
            event = tf.compat.v1.Event(wall_time=now, step=epoch, summary=summary)
            file.write(event.SerializeToString())
    with open(path, "rb") as stored:
        data = stored.read()
    os.unlink(path)
    return data


def _image_summary(name: str, height: int, width: int, data: bytes) -> Any:
    from tensorboard.plugins.image.metadata import create_summary_metadata

    metadata = create_summary_metadata(
        name, "Left the truth, if it is known, right the prediction, in the colours of the classes."
    )
    summary = tf.compat.v1.Summary()
    summary.value.add(
        tag=f"overlays/{name}",
        metadata=tf.compat.v1.SummaryMetadata.FromString(metadata.SerializeToString()),
        tensor=tf.make_tensor_proto(
            [str(width).encode(), str(height).encode(), data], dtype=tf.string
        ),
    )
    return summary


def _curve_summary(name: str, histogram: Counts, description: str) -> Any:
    from tensorboard.plugins.pr_curve.summary import raw_data_pb

    counts = curve_counts(histogram)
    return raw_data_pb(
        name,
        *(counts[key] for key in ("tp", "fp", "tn", "fn", "precision", "recall")),
        num_thresholds=_NUM_THRESHOLDS,
        description=description,
    )
