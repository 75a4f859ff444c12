"""Defines the training configuration: options, presets, and which options identify a run.

A field is either part of a run's identity (model, loss, seed, batch, ...) or free to change
between two attempts of one run (epochs, devices, cache, logging). Nothing here imports TensorFlow,
so that `--help` answers at once.
"""

from job.config.augmentation import AugmentationConfig
from job.config.groups import (
    MODELS,
    SSIM_SIZE,
    LossConfig,
    LossName,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    check_class_weights,
    check_ssim_sides,
)
from job.config.identity import (
    identity_of,
    nested_values,
    preset_values,
    stored_config,
    stored_options,
    values_of_identity,
)
from job.config.presets import PRESET_KEYS, dotted_keys
from job.config.train_config import (
    DATABRICKS,
    HYBRID_WEIGHTS,
    TRACKER_OPTIONS,
    MetricName,
    TrainConfig,
    checked_run_name,
)

__all__ = [
    "DATABRICKS",
    "HYBRID_WEIGHTS",
    "MODELS",
    "PRESET_KEYS",
    "SSIM_SIZE",
    "TRACKER_OPTIONS",
    "AugmentationConfig",
    "LossConfig",
    "LossName",
    "MetricName",
    "ModelConfig",
    "OptimizerConfig",
    "ScheduleConfig",
    "TrainConfig",
    "check_class_weights",
    "check_ssim_sides",
    "checked_run_name",
    "dotted_keys",
    "identity_of",
    "nested_values",
    "preset_values",
    "stored_config",
    "stored_options",
    "values_of_identity",
]
