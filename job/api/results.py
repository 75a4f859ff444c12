"""Evaluates, exports, reports and compares runs and predicts masks, as the commands do."""

from typing import TYPE_CHECKING, Any, Literal, Unpack

from flexunet.storage import open_store
from job.api.keywords import StrPath, keyword_errors, path_text, settings_of
from job.api.log import shown_log
from job.api.options import EvaluateOptions, ExportOptions, InferOptions
from job.api.runs import EvaluationSummary, Run, read_evaluation
from job.comparison.comparison import compare_runs
from job.comparison.page import page_target, write_page
from job.evaluation import pipeline as evaluation
from job.evaluation.pipeline import EvaluateConfig
from job.exporting import pipeline as exporting
from job.exporting.options import ExportConfig
from job.exporting.pipeline import ExportResult
from job.inference import pipeline as inference
from job.inference.options import InferConfig
from job.inference.pipeline import InferResult
from job.reporting import html_report

if TYPE_CHECKING:
    import pandas as pd


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


def export(run: Run | StrPath, output: StrPath, **options: Unpack[ExportOptions]) -> ExportResult:
    """Exports a run for programs that do not have FlexUNet, as `flexunet export` does.

    The model takes pixels as an image file has them, uint8 or uint16, in batches of any size. It
    returns probabilities and class ids. Each file is checked against `infer`; if a check fails,
    nothing is written.

    Args:
        run: a run, or the folder or gs:// URL of a run or of a cross-validation.
        output: new folder or gs:// URL of the export.
        options: the fields of `ExportConfig`: `format=["savedmodel", "onnx"]`.

    Returns:
        Where the files are, and the content of `metadata.json`.

    Raises:
        UsageError: an option is unknown or wrong, there is no run, `output` has other files, or
            packages of a format are not installed.
        ContentError: a checkpoint is damaged, or an exported file computes something else.
        StorageError: storage is unavailable or full.

    Examples:
        >>> result = flexunet.export("runs/first", "export", format=["keras"])
        >>> result.files, result.metadata["input"]["shape"]
        ({'keras': 'model.keras'}, ['batch', 'height', 'width', 1])
        >>> result.metadata["check"]["formats"]["keras"]["num_other_ids"]
        0
    """
    config = settings_of("export", ExportConfig, options, ("run", "output"))
    with keyword_errors(ExportConfig), shown_log(config.progress):
        return exporting.export(_url_of(run), path_text(output), config)


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


class Comparison(dict[str, Any]):
    """A comparison of runs with the first of them: what `flexunet compare --json` prints, by name.

    Attributes:
        url: of the page; None: none was written.
    """

    def __init__(self, values: dict[str, Any], url: str | None) -> None:
        """Takes the values of a comparison."""
        super().__init__(values)
        self.url = url

    def __repr__(self) -> str:
        """Returns a line with the names of the runs; `print(dict(comparison))` shows all values."""
        names = " and ".join(str(run["name"]) for run in self.get("runs", ()))
        return f"<Comparison: {names}, {self.get('num_cases')} cases>"

    @property
    def differences(self) -> "pd.DataFrame":
        """A row for each size, run, class and measure.

        Columns: `size`, `run`, `class`, `measure`, `first`, `value`, `difference`, `low` and `high`
        of its 95 % interval, `num_groups`, `is_mean` (over all foreground classes). Without an
        interval, `low` and `high` are NaN.
        """
        import pandas as pd

        rows = [{"size": size, **row} for size, found in self["sizes"].items() for row in found]
        return pd.DataFrame(rows).astype(dict.fromkeys(("low", "high", "difference"), float))

    @property
    def options(self) -> "pd.DataFrame":
        """The options that differ: a row for each option, a column for each run."""
        import pandas as pd

        names = [run["name"] for run in self["runs"]]
        values = self["options"]
        return pd.DataFrame.from_dict(
            {name: [str(each) for each in found] for name, found in values.items()},
            orient="index",
            columns=names,
        )


def compare(
    *runs: Run | StrPath,
    split: Literal["train", "valid", "test"] = "test",
    output: StrPath | None = None,
) -> Comparison:
    """Compares runs with the first of them, on the same cases, as `flexunet compare` does.

    Args:
        runs: two or more runs, or folders or gs:// URLs of runs or cross-validations.
        split: the evaluated split.
        output: file or gs:// URL of the page, which ends in .html; None: no page.

    Returns:
        Paired differences of all measures with 95 % bootstrap intervals over groups, and the
        options that differ.

    Raises:
        UsageError: a run is not evaluated, or not on the same cases as the first one.
        ContentError: a file of a run is damaged.
        StorageError: storage is unavailable or full.

    Examples:
        >>> comparison = flexunet.compare("runs/first", "runs/second", output="compare.html")
        >>> comparison["num_cases"], sorted(comparison["sizes"])
        (4, ['original'])
        >>> list(comparison.differences.columns[:4])
        ['size', 'run', 'class', 'measure']
    """
    target = None if output is None else path_text(output)
    if target is not None:
        page_target(target)
    compared = compare_runs([_url_of(run) for run in runs], split)
    url = None if target is None else write_page(compared, target)
    return Comparison(compared.as_json(), url)


def _url_of(run: Run | StrPath) -> str:
    return run.url if isinstance(run, Run) else path_text(run)
