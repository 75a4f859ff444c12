"""Maps the keys of reference INI files to settings, or notes why a key has no effect.

Builds plain values, which the settings classes check. Does not import TensorFlow.
"""

import os
from dataclasses import dataclass
from typing import Any

from data_prep.sources.pairs import Source
from job.compat.ini_augmentation import read_augmentation
from job.compat.ini_file import read_ini
from job.compat.ini_prep import read_image_size, read_masks, read_source
from job.compat.ini_reader import KeyNote, KeyReader, MappedKey, shown
from job.compat.ini_values import (
    boolean,
    channels,
    flag,
    folder_from,
    number,
    one_of,
    optional,
    pair,
    patience,
    same,
    whole,
)
from job.config import HYBRID_WEIGHTS

# Reference class name -> registered model. Source: key model.model of the reference configurations.
_MODEL_NAMES = {"TensorFlowFlexUNet": "flexunet"}
_LOSS_NAMES = {
    "categorical_crossentropy": "categorical_crossentropy",
    "dice_loss": "dice",
    "bce_dice_loss": "bce_dice",
    "iou_loss": "iou",
    "bce_iou_loss": "bce_iou",
    "basnet_hybrid_loss": "basnet_hybrid",
    "dice_loss_multiclass": "dice_multiclass",
    "categorical_focal_dice_loss": "categorical_focal_dice",
    "dice_loss_foreground": "dice_foreground",
}
# Names in reference files. `MetricName` may get others, which the reference does not have.
_METRIC_NAMES = (
    "dice_coef_multiclass",
    "dice_coef",
    "iou_coef",
    "sensitivity",
    "specificity",
    "dice_coef_foreground",
    "dice_coef_hybrid",
)

_RUN_FOLDER = "results are in the folder of the run, which is never deleted"
_NO_EFFECT = "has no effect in the reference implementation either"
_NEAREST = "a mask pixel takes the class of the nearest colour"
_AFTER_EPOCHS = "images are predicted after an epoch as in training; see infer.images_dir"
_UNUSED = {
    ("model", "dropout_seed_fixing"): "dropout is always reproducible: it depends on the seed",
    ("model", "show_summary"): "the layers are not printed",
    ("dataset", "class_name"): "masks are recognised by their content",
    ("dataset", "datasetclass"): "masks are recognised by their content",
    (
        "dataset",
        "resize_interpolation",
    ): "images are resized bilinearly, masks by nearest neighbour",
    ("train", "steps_per_epoch"): "an epoch has every training sample once",
    ("train", "validation_steps"): "validation has every validation sample once",
    ("train", "model_dir"): _RUN_FOLDER,
    ("train", "eval_dir"): _RUN_FOLDER,
    ("train", "epoch_change_infer_dir"): _RUN_FOLDER,
    ("train", "epoch_change_tiled_infer"): _AFTER_EPOCHS,
    ("train", "epoch_change_tiled_infer_dir"): _AFTER_EPOCHS,
    ("train", "epoch_change_tiledinfer"): _AFTER_EPOCHS,
    ("train", "epoch_change_tiledinfer_dir"): _AFTER_EPOCHS,
    ("train", "save_weights_only"): _NO_EFFECT,
    ("train", "create_backup"): _NO_EFFECT,
    (
        "eval",
        "batch_size",
    ): "evaluation uses the batch size of training; the results do not depend on it",
    ("infer", "output_dir"): "give the folder to `flexunet infer RUN IMAGES OUTPUT`",
    ("infer", "npy_slice_index"): "figures show the first channel; all channels are used",
    ("infer", "npy_slices_dir"): "figures show the first channel; all channels are used",
    ("tiledinfer", "split_size"): "windows have the network size",
    ("tiledinfer", "output_dir"): "give it to `flexunet infer RUN IMAGES OUTPUT --window sliding`",
    ("image", "color_order"): "images are always read as RGB",
    ("image", "file_format"): "images are recognised by their content",
    ("mask", "mask_file_format"): "masks are found by stem and recognised by their content",
    ("mask", "mask_datatype"): "masks are recognised by their content",
    ("mask", "binarize"): _NEAREST,
    ("mask", "threshold"): _NEAREST,
    ("mask", "blur"): _NEAREST,
    ("mask", "blur_size"): _NEAREST,
    ("generator", "debug"): _NO_EFFECT,
    ("generator", "verbose"): _NO_EFFECT,
    ("deformation", "alpha"): "the key that takes effect is alpah",
    ("deformation", "sigmoid"): "the key that takes effect is sigmoids",
    ("distortion", "gaussian_filter_sigma"): "the key that takes effect is gaussian_filter_rsigma",
}

_UNUSED_SECTIONS = {
    "infer3d": "training never reads it; `flexunet infer` reads images, not volumes",
    "debug": _NO_EFFECT,
}

# (section, spellings, converter, default of the reference implementation, setting of this package)
_NETWORK = (
    MappedKey("model", ("base_filters",), whole(1), 16, "model.base_filters"),
    MappedKey("model", ("num_layers",), whole(1), 6, "model.num_layers"),
    MappedKey("model", ("base_kernels",), pair, (3, 3), "model.base_kernels"),
    MappedKey("model", ("dilation",), pair, (1, 1), "model.dilation"),
    MappedKey("model", ("dropout_rate",), number, ..., "model.dropout_rate"),
    MappedKey(
        "model",
        ("input_normalize",),
        flag({True: "unit", False: "none"}),
        True,
        "model.input_scaling",
    ),
    MappedKey(
        "model",
        ("normalization",),
        flag({True: "batch", False: "none"}),
        False,
        "model.normalization",
    ),
    MappedKey(
        "model",
        ("activation",),
        one_of({"relu": "relu", "mish": "mish"}),
        "relu",
        "model.activation",
    ),
)
_TRAINING = (
    MappedKey(
        "model",
        ("optimizer",),
        one_of({"Adam": "adam", "AdamW": "adamw"}),
        "Adam",
        "optimizer.name",
    ),
    MappedKey("model", ("learning_rate",), number, 0.0001, "optimizer.learning_rate"),
    MappedKey("model", ("clipvalue",), optional(number), 0.2, "optimizer.clipvalue"),
    MappedKey("model", ("loss",), one_of(_LOSS_NAMES), "categorical_crossentropy", "loss.name"),
    MappedKey("train", ("epochs",), whole(1), 100, "epochs"),
    MappedKey("train", ("batch_size",), whole(1), 4, "global_batch_size"),
    MappedKey("train", ("patience",), patience, 10, "schedule.early_stopping_patience"),
    MappedKey("train", ("learning_rate_reducer",), boolean, False, "schedule.reduce_on_plateau"),
    MappedKey("train", ("reducer_factor",), number, 0.4, "schedule.reducer_factor"),
    MappedKey("train", ("reducer_patience",), whole(0), 4, "schedule.reducer_patience"),
)


@dataclass(frozen=True)
class ReferenceConfig:
    """Holds the settings of a reference file.

    Attributes:
        train: nested values for TrainConfig.
        prep: values for PrepConfig.
        sources: image and mask folders of the splits, absolute or as URLs; empty if the file
            names none.
        infer_images: folder of images to predict, or None.
        notes: one per key in the order of the file, then one per filled-in default.
    """

    train: dict[str, Any]
    prep: dict[str, Any]
    sources: tuple[Source, ...]
    infer_images: str | None
    notes: tuple[KeyNote, ...]


def is_reference_config(path: str) -> bool:
    """Returns whether `path` is named like a reference file: .config or .ini."""
    return path.lower().endswith((".config", ".ini"))


def read_reference_config(path: str) -> ReferenceConfig:
    """Returns the settings of the INI file at `path`; nothing in it is executed.

    A missing key has the default of the reference implementation, not of this package. A value
    that nothing reads may be anything; its note has the problem.

    Raises:
        UsageError: the file cannot be read, a value that is used is not a literal of the right
            kind, a key is given twice, or the model is not registered; names file, line and key.
    """
    reader = KeyReader(read_ini(path), _UNUSED, _UNUSED_SECTIONS)
    _read_model(reader)
    _read_training(reader)
    _read_metrics(reader)
    read_masks(reader)
    read_augmentation(reader)
    sources = tuple(
        source for split in ("train", "valid", "test") if (source := read_source(reader, split))
    )
    infer_images = _read_inference(reader)
    prep = reader.settings.pop("prep")
    return ReferenceConfig(reader.settings, prep, sources, infer_images, reader.all_notes())


def _read_model(reader: KeyReader) -> None:
    reader.take("model", "model", _model_name, ..., "model.name")
    read_image_size(reader)
    if reader.take("model", "image_channels", channels, 3, "model.image_channels") == 1:
        reader.set("prep.channels", "grey")
    num_classes = reader.take("model", "num_classes", whole(1), ..., "model.num_classes")
    if num_classes == 1:
        only_sigmoid = one_of({"sigmoid": "sigmoid"})
        reader.take("model", "final_activation", only_sigmoid, "sigmoid")
        reader.describe("model", "final_activation", "the only output is a sigmoid")
    else:
        reader.take("model", "final_activation", same, None)
        reader.describe("model", "final_activation", "num_classes > 1 is a softmax", "not used")
    for mapped in _NETWORK:
        reader.take_mapped(mapped)


def _read_training(reader: KeyReader) -> None:
    for mapped in _TRAINING:
        reader.take_mapped(mapped)
    reader.set("schedule.min_learning_rate", 0.0)


def _read_metrics(reader: KeyReader) -> None:
    """Joins the metrics of the model with those of train_metrics.csv."""
    metrics = reader.take("model", "metrics", _metrics, ["dice_coef_multiclass"])
    columns = metrics
    if reader.has("train", "metrics"):
        columns = reader.take("train", "metrics", _metrics, [])
    joined = list(dict.fromkeys([*metrics, *columns]))
    reader.set("metrics", joined)
    for section in ("model", "train"):
        reader.describe(section, "metrics", f"metrics = {','.join(joined)}")
    with reader.without_effect("dice_coef_hybrid" not in joined, "no metric is dice_coef_hybrid"):
        _read_hybrid_weights(reader)


def _read_hybrid_weights(reader: KeyReader) -> None:
    """Sets the weights of dice_coef_hybrid."""
    keys = ("hybrid_alpha", "hybrid_beta")
    defaults = zip(keys, HYBRID_WEIGHTS, strict=True)
    weights = [reader.take("model", key, number, default) for key, default in defaults]
    if reader.unused_because is not None:
        return
    if abs(sum(weights) - 2) > 1e-6:
        given = next((key for key in keys if reader.has("model", key)), keys[0])
        raise reader.file.error(
            reader.file.entries["model", given],
            f"hybrid_alpha + hybrid_beta = {sum(weights):g}; they must add up to 2 "
            f"(without the keys: {HYBRID_WEIGHTS[0]} and {HYBRID_WEIGHTS[1]})",
        )
    reader.set("hybrid_weights", weights)
    for key in keys:
        reader.describe("model", key, f"hybrid_weights = {shown(weights)}")


def _read_inference(reader: KeyReader) -> str | None:
    """Returns the folder of images to predict; sets the predictions after every epoch."""
    folder: str | None = reader.take(
        "infer", "images_dir", optional(folder_from(reader.file.path)), None
    )
    reader.describe("infer", "images_dir", "images for `flexunet infer`")
    reader.take("tiledinfer", "overlapping", optional(whole(0)), None, "window_overlap")
    reader.take("tiledinfer", "images_dir", optional(folder_from(reader.file.path)), None)
    reader.describe("tiledinfer", "images_dir", "images for `flexunet infer --window sliding`")
    is_on = reader.take("train", "epoch_change_infer", boolean, False)
    reader.describe("train", "epoch_change_infer", f"predictions after every epoch {shown(is_on)}")
    with reader.without_effect(not is_on, "train.epoch_change_infer is False"):
        num_images = reader.take("train", "num_infer_images", whole(0), 6, "prediction_images")
    reader.set("prediction_images", num_images if is_on else 0)
    if is_on and folder is not None:
        _predict_from(reader, folder)
    return folder


def _predict_from(reader: KeyReader, folder: str) -> None:
    """Sets `folder` as the images to predict after every epoch, if it exists.

    Reference projects are often distributed without this folder, and training does not need it.
    """
    if "://" in folder or os.path.isdir(folder):
        reader.set("prediction_folder", folder)
        reader.describe("infer", "images_dir", f"prediction_folder = {folder}")
        return
    detail = f"{folder} does not exist; the first validation images are predicted"
    reader.describe("infer", "images_dir", detail, "not used")


def _model_name(value: Any) -> str:
    if not isinstance(value, str) or value not in _MODEL_NAMES:
        known = ", ".join(f"{name} ({ours})" for name, ours in _MODEL_NAMES.items())
        raise ValueError(f"not a registered model; registered: {known}")
    return _MODEL_NAMES[value]


def _metrics(value: Any) -> list[str]:
    """Returns metric names without their `val_` duplicates."""
    if not isinstance(value, tuple | list):
        raise ValueError("expected a list of names")
    known = {name: name for name in _METRIC_NAMES}
    return [one_of(known)(str(name).removeprefix("val_")) for name in value]
