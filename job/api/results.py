"""Evaluates a run, predicts masks into a folder and writes a report, as the commands do."""

from typing import Unpack

from flexunet.storage import open_store
from job.api.keywords import StrPath, keyword_errors, path_text, settings_of
from job.api.log import shown_log
from job.api.options import EvaluateOptions, InferOptions
from job.api.runs import EvaluationSummary, Run, read_evaluation
from job.evaluation import pipeline as evaluation
from job.evaluation.pipeline import EvaluateConfig
from job.inference import pipeline as inference
from job.inference.options import InferConfig
from job.inference.pipeline import InferResult
from job.reporting import html_report


def evaluate(run: Run | StrPath, **options: Unpack[EvaluateOptions]) -> EvaluationSummary:
    """Evaluates a run on one split of its dataset, as `flexunet evaluate` does.

    Tables, `summary.json` and images of some cases go to RUN/evaluation, or to `output`.

    Args:
        run: a run, or its folder or gs:// URL.
        options: the fields of `EvaluateConfig`: `split="valid"`, `flips="both"`.

    Returns:
        The summary, a mapping; its `url` is where the tables are.

    Raises:
        UsageError: an option is unknown or wrong, there is no run, or another dataset is where its
            own was.
        ContentError: the dataset or the checkpoint is damaged.
        StorageError: storage is unavailable or full.

    Examples:
        >>> summary = flexunet.evaluate("runs/first", split="valid", flips="both")
        >>> sorted(summary["foreground_mean"])
        ['dice', 'iou', 'sensitivity', 'specificity']
        >>> len(summary.cases)
        4
    """
    config = settings_of("evaluate", EvaluateConfig, options, ("run",))
    with keyword_errors(EvaluateConfig), shown_log(config.progress):
        found, url = evaluation.evaluate(_url_of(run), config)
    return read_evaluation(open_store(url)) or EvaluationSummary(found.summary, url)


def infer(
    run: Run | StrPath,
    images: StrPath,
    output: StrPath | None = None,
    **options: Unpack[InferOptions],
) -> InferResult:
    """Predicts a mask for one image, or for each image of a folder, as `flexunet infer` does.

    The same call continues where an interrupted one stopped: masks of images that have not changed
    are kept.

    Args:
        run: a run, or its folder or gs:// URL.
        images: an image, or a folder or gs:// URL of images, of any size.
        output: folder or gs:// URL of the masks; None: RUN/inference.
        options: the fields of `InferConfig`: `overlays=False`, `flips="both"`.

    Returns:
        Where the masks are, and which images could not be read: look at `unreadable`.

    Raises:
        UsageError: an option is unknown or wrong, there is no run or no image, or `output` holds
            masks of another run or of other images.
        StorageError: storage is unavailable or full; the same call continues.

    Examples:
        >>> result = flexunet.infer("runs/first", "source/images", "masks")
        >>> result.num_written, len(result.masks), result.unreadable
        (20, 20, ())
        >>> flexunet.infer("runs/first", "source/images/disc-00.png", "masks").num_kept
        1
    """
    config = settings_of("infer", InferConfig, options, ("run", "images", "output"))
    target = None if output is None else path_text(output)
    with keyword_errors(InferConfig), shown_log(config.progress):
        return inference.infer(_url_of(run), path_text(images), target, config)


def write_report(run: Run | StrPath) -> str:
    """Writes `report.html` into the folder of a run or of a cross-validation; returns its URL.

    One self-contained page. Training and `flexunet report` write the same.

    Args:
        run: a run, or the folder or gs:// URL of a run or of a cross-validation.

    Raises:
        UsageError: there is neither.
        ContentError: a file of the run is damaged.
        StorageError: storage is unavailable or full.

    Examples:
        >>> flexunet.write_report("runs/first").rpartition("/")[2]
        'report.html'
    """
    return html_report.write_report(open_store(_url_of(run)))


def _url_of(run: Run | StrPath) -> str:
    return run.url if isinstance(run, Run) else path_text(run)
