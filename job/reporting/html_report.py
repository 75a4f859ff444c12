"""Renders `report.html`: one page about a run, from the files that the run stored.

The folder of a cross-validation gets a page about all its folds.

The page needs no internet access and no script: images are embedded, and the policy of the page
forbids everything else. Text from outside (names of files, groups, classes) is escaped. The page
names the files that are still missing.
"""

import functools
import logging
from typing import TYPE_CHECKING, Any, TypeVar

from flexunet.errors import ContentError, LockedError, StorageError, UsageError
from flexunet.json_files import read_json
from flexunet.storage import ObjectStore, join_url
from flexunet.text import pluralize
from job.data.folds import fold_words
from job.metrics.fold_spread import spread
from job.reporting.calibration_view import calibration_of, postprocessing_of
from job.reporting.evaluation_view import (
    cases_of,
    distinct_origins,
    failures_of,
    headline_of,
    metrics_of,
    origins_of,
    size_of,
)
from job.reporting.phrases import measure_rows, titled_sizes
from job.reporting.run_view import (
    attempts_of,
    curves_of,
    dataset_card,
    environment_of,
    lost_regions,
    plan_of,
)
from job.reporting.view_parts import (
    Table,
    interval_words,
    missing_groups,
    name_once,
    number,
    read_dataset_copy,
    read_text,
    trained_fold,
)
from job.runs.layout import CROSS_VALIDATION_NAME, OUTCOME_NAME, RESTORE, evaluate_again

if TYPE_CHECKING:
    from jinja2 import Environment

T = TypeVar("T", bound=str)

REPORT_NAME = "report.html"

_POOL_AGAIN = (
    "evaluate the run of each fold again (flexunet evaluate RUN), then repeat the train command "
    "with --folds, which pools them"
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
        raise UsageError(
            f"{store.url}: no run here: config.yaml is missing; give the folder RUNS/NAME"
        )
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
    return _rendered(
        "report.html.j2",
        store,
        headline=headline_of(store, summary, outcome),
        origins=origins_of(store, summary),
        missing_groups=missing_groups(manifest),
        metrics=metrics_of(store, summary),
        postprocessing=postprocessing_of(summary),
        calibration=calibration_of(store, summary),
        lost=lost_regions(manifest, is_folded=fold is not None),
        cases=cases_of(store),
        failures=failures_of(store),
        curves=curves_of(store),
        dataset=dataset_card(manifest, fold),
        is_folded=fold is not None,
        attempts=attempts_of(store, outcome),
        plan=plan_of(store),
        environment=environment_of(store),
        config=read_text(store, "config.yaml") or "",
    )


def render_folds(store: ObjectStore) -> str:
    """Returns the page of the cross-validation in `store`."""
    summary = read_json(store, CROSS_VALIDATION_NAME, _POOL_AGAIN)
    if summary is None:
        raise ContentError(f"{store.url}/{CROSS_VALIDATION_NAME} is missing; {_POOL_AGAIN}")
    runs = summary["runs"]
    manifest = read_dataset_copy(store)
    return _rendered(
        "cross_validation.html.j2",
        store,
        runs=[(fold_words((k, len(runs))), run) for k, run in enumerate(runs)],
        report_name=REPORT_NAME,
        num_folds=summary["num_folds"],
        # Earlier versions did not copy the manifest there.
        drawn="whole groups" if manifest is None else f"groups {manifest.group_rule}",
        origins=distinct_origins(summary.get("init_from")),
        missing_groups=missing_groups(manifest),
        sizes=[
            (size_of(title, found["pooled"]), _fold_by_fold(found))
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


def _rendered(template: str, store: ObjectStore, **values: Any) -> str:
    name = store.url.rstrip("/").rsplit("/", 1)[-1]
    return _environment().get_template(template).render(name=name, url=store.url, **values) + "\n"


@functools.cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("job.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["one_line"] = _one_line
    environment.globals["pluralize"] = pluralize
    return environment


def _one_line(text: T) -> T:
    """Returns prose or markup with single spaces and no line breaks of the template."""
    parts = text.replace("\n", " ").split(" ")
    return type(text)(" ".join(part for part in parts if part))
