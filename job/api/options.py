"""The keyword arguments of the API's functions, typed: the fields of the settings classes.

A field that is a path takes `pathlib.Path`, too; a group takes a mapping, or settings of which the
fields count that were set. What each means, with default and unit, is said by the settings class.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from job.api.keywords import StrPath
from job.config import (
    AugmentationConfig,
    LossConfig,
    MetricName,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
)


class PrepOptions(TypedDict, total=False):
    """Keyword arguments of `flexunet.prepare`: the fields of `PrepConfig`."""

    format: Literal["pairs", "inbreast"]
    images: str | None
    masks: str | None
    field_of_view: str | None
    image_name: str | None
    mask_name: str | None
    missing_mask: Literal["error", "empty"]
    rois: Sequence[
        Literal[
            "mass", "spiculated", "cluster", "calcification", "asymmetry", "distortion", "other"
        ]
    ]
    image_size: int
    image_height: int | None
    image_width: int | None
    geometry: Literal["stretch", "pad"]
    tile: int | None
    tile_overlap: int
    crop: Literal["none", "breast"]
    flip: Literal["none", "left", "right"]
    channels: Literal["auto", "grey", "rgb"]
    full_scale: int | None
    classes: str | None
    background: str
    mask_encoding: Literal["auto", "index", "colour", "alpha", "nonzero", "mixed"]
    ignore: str | None
    ignore_id: int | None
    off_map_limit: float
    skip_bad: bool
    group_preset: Literal["augmented"] | None
    group_regex: str | None
    group_csv: StrPath | None
    fractions: Sequence[float]
    draw_valid: float | None
    seed: int
    num_folds: int | None
    allow_leaks: bool
    hash_names: bool
    shard_size: float
    max_pixels: int
    dicom_reader: Literal["pydicom", "tfio"]
    num_processes: int | None


class InspectOptions(TypedDict, total=False):
    """Keyword arguments of `flexunet.inspect`: the fields of `InspectConfig`."""

    sample: int
    format: Literal["pairs", "inbreast"] | None
    images: str | None
    masks: str | None
    field_of_view: str | None
    image_name: str | None
    mask_name: str | None
    missing_mask: Literal["error", "empty"]
    classes: str | None
    background: str
    mask_encoding: Literal["auto", "index", "colour", "alpha", "nonzero", "mixed"]
    ignore: str | None
    group_preset: Literal["augmented"] | None
    group_regex: str | None
    group_csv: StrPath | None
    full_scale: int | None
    max_pixels: int
    num_processes: int | None


class TrainOptions(TypedDict, total=False):
    """Keyword arguments of `flexunet.train`: the fields of `TrainConfig`."""

    preset: Literal["auto", "reference", "recipe"]
    data: StrPath | None
    output: StrPath
    name: str | None
    epochs: int | None
    time_budget: float | None
    time_schedule: StrPath | None
    global_batch_size: int
    accumulate: int
    folds: int | None
    fold: int | None
    foreground_share: float | None
    foreground_share_end: float | None
    seed: int
    random_streams: int
    precision: Literal["auto", "float32", "mixed_bfloat16", "mixed_float16", "float64"]
    deterministic: bool
    init_from: StrPath | None
    metrics: Sequence[MetricName]
    hybrid_weights: Sequence[float]
    fit_postprocessing: bool
    prediction_images: int
    prediction_folder: StrPath | None
    window_overlap: int | None
    checkpoint_every_minutes: float
    keep_checkpoints: int
    cache_dir: StrPath | None
    cache: Literal["full", "ranges"]
    cache_size: float | None
    cpu_replicas: int
    gradient_exchange: Literal["auto", "all_reduce"]
    gradient_dtype: Literal["float32", "bfloat16"]
    exchange_flops_per_byte: float | None
    keep_memory: bool
    xla: Literal["auto", "on", "off"]
    threads: int
    phase_timeout: float
    step_timeout: float
    storage_timeout: float
    tensorboard: bool
    tracker: Literal["mlflow"] | None
    tracking_uri: StrPath | None
    experiment: str | None
    progress: bool
    model: ModelConfig | Mapping[str, Any]
    loss: LossConfig | Mapping[str, Any]
    optimizer: OptimizerConfig | Mapping[str, Any]
    schedule: ScheduleConfig | Mapping[str, Any]
    augmentation: AugmentationConfig | Mapping[str, Any]


class PredictOptions(TypedDict, total=False):
    """The options shared by `EvaluateOptions` and `ImageOptions`: fields of `PredictConfig`."""

    checkpoint: Literal["best", "last"]
    ensemble: Sequence[StrPath]
    flips: Literal["none", "horizontal", "vertical", "both"]
    overlap: int | None
    threshold: Sequence[float] | None
    min_region: Sequence[int] | None
    temperature: float | None
    needs_gpu: bool


class EvaluateOptions(PredictOptions, total=False):
    """Keyword arguments of `flexunet.evaluate`: the fields of `EvaluateConfig`."""

    split: Literal["train", "valid", "test"]
    data: StrPath | None
    output: StrPath | None
    tiles_as_pictures: bool
    remove_small_regions: bool
    batch_size: int | None
    cpu_replicas: int
    progress: bool


class ImageOptions(PredictOptions, total=False):
    """Keyword arguments of `Run.predict`: the fields of `ImageConfig`."""

    batch_size: int
    window: Literal["auto", "sliding"]
    small_regions: StrPath | None
    full_scale: int | None
    max_pixels: int


class InferOptions(ImageOptions, total=False):
    """Keyword arguments of `flexunet.infer`: the fields of `InferConfig`."""

    probabilities: Literal["none", "tiff", "float16", "float32"]
    overlays: bool
    overwrite: bool
    progress: bool


class ExportOptions(TypedDict, total=False):
    """Keyword arguments of `flexunet.export`: the fields of `ExportConfig`."""

    format: Sequence[Literal["savedmodel", "keras", "onnx"]]
    checkpoint: Literal["best", "last"]
    ensemble: Sequence[StrPath]
    data: StrPath | None
    licence: str | None
    intended_use: str | None
    overwrite: bool
    progress: bool
