"""Renders `report.html`: one page about a run, from the files that the run stored.

The folder of a cross-validation gets a page about all its folds.

The page needs no internet access and no script: images are embedded, and the policy of the page
forbids everything else. Text from outside (names of files, groups, classes) is escaped. The page
names the files that are still missing.
"""

import logging
from typing import Any

from flexunet.errors import ContentError, LockedError, StorageError
from flexunet.json_files import read_json
from flexunet.storage import ObjectStore, join_url
from job.data.folds import fold_words
from job.metrics.fold_spread import spread
from job.reporting.phrases import measure_rows, titled_sizes
from job.reporting.rendering import render_page
from job.reporting.views.calibration import calibration_of, postprocessing_of
from job.reporting.views.confusion import confusion_of
from job.reporting.views.evaluation import (
    distinct_origins,
    headline_of,
    metrics_of,
    origins_of,
)
from job.reporting.views.failures import failures_of
from job.reporting.views.gallery import gallery_of
from job.reporting.views.line_plots import PlotGroup
from job.reporting.views.measures import size_of
from job.reporting.views.parts import (
    Rgb,
    Table,
    class_colors,
    interval_words,
    missing_groups,
    name_once,
    read_dataset_copy,
    read_text,
    trained_fold,
)
from job.reporting.views.probabilities import threshold_groups
from job.reporting.views.run import (
    attempts_of,
    curves_of,
    dataset_card,
    environment_of,
    lost_regions,
    plan_of,
)
from job.runs.layout import (
    CROSS_VALIDATION_NAME,
    OUTCOME_NAME,
    RESTORE,
    evaluate_again,
    no_run,
)

REPORT_NAME = "report.html"

_POOL_AGAIN = (
    "evaluate the run of each fold again (flexunet evaluate RUN), then repeat the train command "
    "with --folds, which pools them"
)

_SECTIONS = (
    *("Metrics", "Examples", "Failures", "Probabilities", "Curves", "Dataset", "Plan", "Attempts"),
    *("Environment", "Config"),
)

logger = logging.getLogger(__name__)


def write_report(store: ObjectStore) -> str:
    """Writes `report.html` into the folder `store` of a run or a cross-validation; returns its URL.

    Raises:
        UsageError: the folder has neither.
        ContentError: a file of the run is damaged, or an earlier version wrote it without a field
            that the page needs.
    """
    if store.stat("config.yaml") is not None:
        page = render(store)
    elif store.stat(CROSS_VALIDATION_NAME) is not None:
        page = render_folds(store)
    else:
        raise no_run(store.url)
    store.put(REPORT_NAME, page.encode())
    return join_url(store.url, REPORT_NAME)


def renew_report(store: ObjectStore) -> None:
    """Writes the report of a run that has ended; logs a warning if that fails.

    The run is complete without a report.

    Raises:
        LockedError, StorageError: the run was lost, or storage fails.
    """
    try:
        write_report(store)
    except (LockedError, StorageError):
        raise
    except Exception as error:
        logger.warning(
            "%s was not written (%s); the run itself is complete; try again: flexunet report %s",
            join_url(store.url, REPORT_NAME),
            error,
            store.url,
        )


def read_summary(store: ObjectStore) -> dict[str, Any] | None:
    """Returns the newest evaluation of a run's test split, or None."""
    return read_json(store, "evaluation/summary.json", evaluate_again(store))


def render(store: ObjectStore) -> str:
    """Returns the page of the run in `store`; the same files give the same page."""
    summary = read_summary(store)
    outcome = read_json(store, OUTCOME_NAME, RESTORE)
    manifest, fold = read_dataset_copy(store), trained_fold(store)
    colors, plan = class_colors(manifest), plan_of(store)
    probabilities = _probabilities(store, summary, colors)
    return render_page(
        "report.html.j2",
        store.url,
        titles=_titles(has_probabilities=bool(probabilities), has_plan=plan is not None),
        headline=headline_of(store, summary, outcome),
        origins=origins_of(store, summary),
        missing_groups=missing_groups(manifest),
        metrics=metrics_of(summary, colors),
        confusion=confusion_of(store, colors),
        postprocessing=postprocessing_of(summary),
        probabilities=probabilities,
        lost=lost_regions(manifest, is_folded=fold is not None),
        examples=gallery_of(
            store, colors, has_ignored=manifest is not None and manifest.ignore_id is not None
        ),
        failures=failures_of(store, colors),
        curves=curves_of(store),
        dataset=dataset_card(manifest, fold),
        is_folded=fold is not None,
        attempts=attempts_of(store, outcome),
        plan=plan,
        environment=environment_of(store),
        config=read_text(store, "config.yaml") or "",
    )


def _probabilities(
    store: ObjectStore, summary: dict[str, Any] | None, colors: dict[str, Rgb]
) -> list[PlotGroup]:
    """Returns the plots of the probabilities of the newest evaluation; empty without one."""
    if summary is None:
        return []
    calibration = calibration_of(store, summary, colors)
    groups = threshold_groups(store, summary["split"], colors)
    return [*groups, *([calibration] if calibration is not None else [])]


def _titles(*, has_probabilities: bool, has_plan: bool) -> list[str]:
    """Returns the titles of the sections, in their order."""
    optional = {"Probabilities": has_probabilities, "Plan": has_plan}
    return [title for title in _SECTIONS if optional.get(title, True)]


def render_folds(store: ObjectStore) -> str:
    """Returns the page of the cross-validation in `store`."""
    summary = read_json(store, CROSS_VALIDATION_NAME, _POOL_AGAIN)
    if summary is None:
        raise ContentError(f"{store.url}/{CROSS_VALIDATION_NAME} is missing; {_POOL_AGAIN}")
    runs = summary["runs"]
    manifest = read_dataset_copy(store)
    return render_page(
        "cross_validation.html.j2",
        store.url,
        runs=[(fold_words((k, len(runs))), run) for k, run in enumerate(runs)],
        report_name=REPORT_NAME,
        num_folds=summary["num_folds"],
        # Earlier versions did not copy the manifest there.
        drawn="whole groups" if manifest is None else f"groups {manifest.group_rule}",
        origins=distinct_origins(summary.get("init_from")),
        missing_groups=missing_groups(manifest),
        sizes=[
            (size_of(title, found["pooled"], class_colors(manifest)), _fold_by_fold(found))
            for title, found in titled_sizes(summary["sizes"])
        ],
        lost=lost_regions(manifest, is_folded=True),
        dataset=dataset_card(manifest, f"{summary['num_folds']} folds"),
        is_folded=True,
        plan=plan_of(store),
    )


def _fold_by_fold(found: dict[str, Any]) -> Table:
    folds = [{row[:2]: row.measure["value"] for row in measure_rows(fold)}
             for fold in found["folds"]]  # fmt: skip
    rows = []
    for owner, label, pooled in measure_rows(found["pooled"]):
        values = [fold.get((owner, label)) for fold in folds]
        over = spread(values)
        rows.append(
            (
                owner,
                label,
                over["mean"],
                over["sd"],
                pooled["value"],
                interval_words(pooled),
                *values,
            )
        )
    columns = ["class", "measure", "mean of the folds", "SD of the folds", "all cases"]
    columns += ["95 % interval", *(f"fold {index + 1}" for index in range(len(folds)))]
    return Table(columns, name_once(rows))
