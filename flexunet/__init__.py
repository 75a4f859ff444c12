"""Provides errors, settings, storage and the command line to all packages, and the Python API.

API names are imported on first use. This module alone names packages above it: in its table, and in
imports for type checkers. This package has no image code, no TensorFlow and no Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_prep.config import PrepConfig
    from data_prep.inspection.config import InspectConfig
    from data_prep.inspection.findings import Inspection
    from flexunet.errors import (
        ContentError,
        DivergedError,
        FlexUNetError,
        LockedError,
        StoppedError,
        StorageError,
        UsageError,
    )
    from flexunet.storage import ObjectStore, open_store
    from job.api.datasets import Dataset, Sample, inspect, open_dataset, prepare
    from job.api.events import (
        CheckpointStored,
        EpochEnded,
        EvaluationEnded,
        Event,
        StepEnded,
        TrainingEnded,
        TrainingStarted,
    )
    from job.api.options import (
        EvaluateOptions,
        ExportOptions,
        ImageOptions,
        InferOptions,
        InspectOptions,
        PrepOptions,
        TrainOptions,
    )
    from job.api.prediction import Prediction
    from job.api.results import Comparison, compare, evaluate, export, infer, write_report
    from job.api.runs import EvaluationSummary, Run, open_run
    from job.api.training import plan, train
    from job.config import (
        AugmentationConfig,
        LossConfig,
        ModelConfig,
        OptimizerConfig,
        ScheduleConfig,
        TrainConfig,
    )
    from job.evaluation.pipeline import EvaluateConfig
    from job.exporting.options import ExportConfig
    from job.exporting.pipeline import ExportResult
    from job.inference.options import ImageConfig, InferConfig
    from job.inference.pipeline import InferResult
    from job.planning.plan_file import Choice, Plan

__all__ = [
    "AugmentationConfig",
    "CheckpointStored",
    "Choice",
    "Comparison",
    "ContentError",
    "Dataset",
    "DivergedError",
    "EpochEnded",
    "EvaluateConfig",
    "EvaluateOptions",
    "EvaluationEnded",
    "EvaluationSummary",
    "Event",
    "ExportConfig",
    "ExportOptions",
    "ExportResult",
    "FlexUNetError",
    "ImageConfig",
    "ImageOptions",
    "InferConfig",
    "InferOptions",
    "InferResult",
    "InspectConfig",
    "InspectOptions",
    "Inspection",
    "LockedError",
    "LossConfig",
    "ModelConfig",
    "ObjectStore",
    "OptimizerConfig",
    "Plan",
    "Prediction",
    "PrepConfig",
    "PrepOptions",
    "Run",
    "Sample",
    "ScheduleConfig",
    "StepEnded",
    "StoppedError",
    "StorageError",
    "TrainConfig",
    "TrainOptions",
    "TrainingEnded",
    "TrainingStarted",
    "UsageError",
    "__version__",
    "compare",
    "evaluate",
    "export",
    "infer",
    "inspect",
    "open_dataset",
    "open_run",
    "open_store",
    "plan",
    "prepare",
    "train",
    "write_report",
]

__version__: str  # of the installed package; defined in pyproject.toml only
_NOT_INSTALLED = "0+unknown"  # compares lower than every real version

# API name -> module that defines it
_MODULES = {
    "AugmentationConfig": "job.config",
    "CheckpointStored": "job.api.events",
    "Choice": "job.planning.plan_file",
    "Comparison": "job.api.results",
    "ContentError": "flexunet.errors",
    "Dataset": "job.api.datasets",
    "DivergedError": "flexunet.errors",
    "EpochEnded": "job.api.events",
    "EvaluateConfig": "job.evaluation.pipeline",
    "EvaluateOptions": "job.api.options",
    "EvaluationEnded": "job.api.events",
    "EvaluationSummary": "job.api.runs",
    "Event": "job.api.events",
    "ExportConfig": "job.exporting.options",
    "ExportOptions": "job.api.options",
    "ExportResult": "job.exporting.pipeline",
    "FlexUNetError": "flexunet.errors",
    "ImageConfig": "job.inference.options",
    "ImageOptions": "job.api.options",
    "InferConfig": "job.inference.options",
    "InferOptions": "job.api.options",
    "InferResult": "job.inference.pipeline",
    "InspectConfig": "data_prep.inspection.config",
    "InspectOptions": "job.api.options",
    "Inspection": "data_prep.inspection.findings",
    "LockedError": "flexunet.errors",
    "LossConfig": "job.config",
    "ModelConfig": "job.config",
    "ObjectStore": "flexunet.storage",
    "OptimizerConfig": "job.config",
    "Plan": "job.planning.plan_file",
    "Prediction": "job.api.prediction",
    "PrepConfig": "data_prep.config",
    "PrepOptions": "job.api.options",
    "Run": "job.api.runs",
    "Sample": "job.api.datasets",
    "ScheduleConfig": "job.config",
    "StepEnded": "job.api.events",
    "StoppedError": "flexunet.errors",
    "StorageError": "flexunet.errors",
    "TrainConfig": "job.config",
    "TrainOptions": "job.api.options",
    "TrainingEnded": "job.api.events",
    "TrainingStarted": "job.api.events",
    "UsageError": "flexunet.errors",
    "compare": "job.api.results",
    "evaluate": "job.api.results",
    "export": "job.api.results",
    "infer": "job.api.results",
    "inspect": "job.api.datasets",
    "open_dataset": "job.api.datasets",
    "open_run": "job.api.runs",
    "open_store": "flexunet.storage",
    "plan": "job.api.training",
    "prepare": "job.api.datasets",
    "train": "job.api.training",
    "write_report": "job.api.results",
}


if not TYPE_CHECKING:  # so that they report names that are not in __all__

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib import metadata  # slow to import

            try:
                return metadata.version("flexunet")
            except metadata.PackageNotFoundError:  # `hasattr` and `import *` must still work
                return _NOT_INSTALLED
        if name in _MODULES:
            return getattr(import_module(_MODULES[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
