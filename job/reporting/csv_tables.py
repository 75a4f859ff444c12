"""Formats the numbers of all epochs as CSV: in the formats of the reference, and in full.

Owns the layout of `train_losses.csv`, `train_metrics.csv` and `history.csv`.
Knows nothing of TensorFlow, storage or plots.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flexunet.tables import csv_table

_LOSSES = ("loss", "val_loss")
CURVE_TITLES = {  # by file name of the plot
    "foreground": "Validation foreground Dice and IoU, mean over images",
    "train_losses": "Training and validation loss",
    "train_metrics": "Metrics of the reference implementation, background included",
}
CURVE_LABELS = {  # of the lines in these plots; a metric of the reference keeps its name
    "loss": "training loss",
    "val_loss": "validation loss",
    "val_foreground_dice": "foreground Dice",
    "val_foreground_iou": "foreground IoU",
}


class History:
    """Holds the numbers of every finished epoch in order, as plain JSON for the checkpoint.

    Attributes:
        rows: one mapping per epoch: "epoch" (from 0), "loss", "val_loss", and other numbers, with
            the unit in the name ("learning_rate", "epoch_time_s").
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]] = (),
        *,
        metrics: Sequence[str] = ("dice_coef_multiclass", "val_dice_coef_multiclass"),
    ) -> None:
        """Starts with `rows` of an earlier attempt; `metrics` are train_metrics.csv's columns."""
        self.rows: list[dict[str, Any]] = []
        self._metrics = tuple(metrics)
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Appends the numbers of one epoch.

        Raises:
            ValueError: `row["epoch"]` is not the epoch after the last one.
        """
        epoch = row["epoch"]
        if epoch != len(self.rows):
            raise ValueError(f"epoch {epoch} after {len(self.rows)} recorded epochs (from 0)")
        self.rows.append(dict(row))

    def tables(self) -> dict[str, str]:
        """Returns the text of each table by file name.

        The first two have the columns and spaces of the reference implementation, 4 decimals, and
        an empty cell if an epoch lacks the number; `history.csv` has every number in full.
        """
        return {
            "train_losses.csv": self._reference_table("epoch, loss, val_loss", _LOSSES),
            "train_metrics.csv": self._reference_table(
                f"epoch,{','.join(self._metrics)},", self._metrics
            ),
            "history.csv": self._full_table(),
        }

    def _reference_table(self, header: str, names: Sequence[str]) -> str:
        lines = [header]
        for row in self.rows:
            numbers = [_four_decimals(row.get(name)) for name in names]
            lines.append(", ".join([str(row["epoch"]), *numbers]))
        return "\n".join(lines) + "\n"

    def _full_table(self) -> str:
        columns = list(dict.fromkeys(["epoch", *(name for row in self.rows for name in row)]))
        return csv_table(columns, ([row.get(name) for name in columns] for row in self.rows))


def _four_decimals(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
