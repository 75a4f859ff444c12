import csv
import io
import json

import pytest

from job.evaluation.artifacts import evaluation_csv
from job.reporting.csv_tables import History


def two_epochs() -> History:
    history = History()
    history.add(
        {
            "epoch": 0,
            "loss": 0.12064,
            "val_loss": 0.06766,
            "dice_coef_multiclass": 0.96451,
            "val_dice_coef_multiclass": 0.95916,
            "epoch_time_s": 1.5,
        }
    )
    history.add(
        {
            "epoch": 1,
            "loss": 0.05326,
            "val_loss": 0.0469,
            "dice_coef_multiclass": 0.97556,
            "val_dice_coef_multiclass": 0.97134,
            "learning_rate": 7e-05,
        }
    )
    return history


def test_train_losses_has_the_format_of_the_reference() -> None:
    # Rounded by hand to 4 decimals; the shape is that of the file it publishes for INbreast.
    assert two_epochs().tables()["train_losses.csv"] == (
        "epoch, loss, val_loss\n0, 0.1206, 0.0677\n1, 0.0533, 0.0469\n"
    )


def test_train_metrics_has_the_format_of_the_reference() -> None:
    # The header ends in a comma, the rows do not.
    assert two_epochs().tables()["train_metrics.csv"] == (
        "epoch,dice_coef_multiclass,val_dice_coef_multiclass,\n"
        "0, 0.9645, 0.9592\n1, 0.9756, 0.9713\n"
    )


def test_train_metrics_has_the_columns_that_were_asked_for() -> None:
    history = History([{"epoch": 0, "iou_coef": 0.5}], metrics=("iou_coef", "val_iou_coef"))
    # No validation split: the cell is empty, the row stays.
    assert history.tables()["train_metrics.csv"] == "epoch,iou_coef,val_iou_coef,\n0, 0.5000, \n"


def test_tables_of_no_epoch_are_headers_only() -> None:
    tables = History().tables()
    assert tables["train_losses.csv"] == "epoch, loss, val_loss\n"
    assert tables["history.csv"] == "epoch\n"


def test_history_csv_has_every_number_in_full() -> None:
    rows = list(csv.DictReader(io.StringIO(two_epochs().tables()["history.csv"])))
    assert float(rows[0]["loss"]) == 0.12064
    assert rows[0]["epoch_time_s"] == "1.5"
    assert rows[0]["learning_rate"] == ""
    assert float(rows[1]["learning_rate"]) == 7e-05


def test_history_continues_from_the_rows_of_a_checkpoint() -> None:
    history = two_epochs()
    restored = History(json.loads(json.dumps(history.rows)))
    for each in (history, restored):
        each.add({"epoch": 2, "loss": 0.1, "val_loss": 0.2})
    assert restored.tables() == history.tables()


@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_add_refuses_an_epoch_out_of_order(epoch: int) -> None:
    with pytest.raises(ValueError, match=f"epoch {epoch} after 2 recorded"):
        two_epochs().add({"epoch": epoch, "loss": 0.0})


def test_evaluation_csv_has_two_lines() -> None:
    assert evaluation_csv("categorical_crossentropy", 0.01168, "dice_coef_multiclass", 0.99694) == (
        "categorical_crossentropy,0.0117\ndice_coef_multiclass,0.9969\n"
    )
