"""`report.html`: one page about a run, made of nothing but the files that the run has stored.

The folder of a cross-validation gets a page about all its folds.

The page needs no network and no script: pictures are inside of it, and its own policy forbids
everything else. Text from outside (names of files, groups, classes) is escaped. What is not there
yet is said to be missing.

python -m job.report RUN
"""

import base64
import html
import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click

from data_prep.shards.manifest import (
    GROUPS_BY_FILE,
    GROUPS_UNKNOWN,
    MANIFEST_NAME,
    Manifest,
    ReducedInfo,
    parse_manifest,
)
from flexunet.cli.interrupts import quiet_interrupts
from flexunet.cli.options import PATH, SettingsCommand
from flexunet.cli.runner import run_command
from flexunet.errors import ContentError, LockedError, StorageError, UsageError
from flexunet.json_files import evaluate_again, read_json, read_table
from flexunet.settings import read_yaml
from flexunet.storage import NotFound, Store, join_url, open_store
from flexunet.text import counted
from job.data.folds import fold_words
from job.distributed.watchdog import STACKS_FOLDER
from job.metrics.per_case import (
    checkpoint_words,
    lesion_words,
    measure_rows,
    size_notes,
    titled_sizes,
)
from job.optimization.schedule import stopped_early_words
from job.reporting.csv_tables import CURVE_TITLES
from job.reporting.phrases import (
    counted_cases,
    has_foreground,
    no_foreground_words,
    summarized_words,
)
from job.runs.layout import CROSS_VALIDATION_NAME, LEASE_NAME, OUTCOME_NAME, RESTORE
from job.runs.status import read_ends, standing

REPORT_NAME = "report.html"

_FAILED_DICE = 0.5  # a case below is listed as a failure
_MAX_FAILURES = 100
_STANDINGS = {"open": "not finished", "stopped": "stopped before its end"}
_PRESENCES = ("neither", "both", "truth_only", "missed", "prediction_only")
_LESION_COUNTS = ("lesions", "lesions_found", "false_positives", "specks")
_PICTURE_SIDE = 640  # pixels; pictures of cases are made smaller, so that the page stays small
_JPEG_QUALITY = 85
_POOL_AGAIN = (
    "evaluate the run of every fold again (flexunet evaluate RUN), then give the train command "
    "with --folds again, which pools them"
)

_STYLE = """
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1d2329; background: #fff;
       max-width: 1080px; margin: 0 auto; padding: 24px; }
h1 { margin: 0 0 4px; } h2 { margin: 36px 0 8px; border-bottom: 2px solid #d7dde3; }
h3 { margin: 20px 0 6px; } .quiet { color: #5a6570; }
.warning { background: #fff4d6; border-left: 4px solid #d08700; padding: 6px 12px; margin: 8px 0; }
table { display: block; overflow-x: auto; border-collapse: collapse; margin: 8px 0;
        font-variant-numeric: tabular-nums; }
th, td { padding: 3px 12px 3px 0; text-align: left; border-bottom: 1px solid #e6eaee; }
.number { text-align: right; }
.pictures { display: flex; flex-wrap: wrap; gap: 12px; }
figure { margin: 0; } figure img { max-width: 100%; display: block; }
.curve img { width: 500px; } .case { width: 340px; }
figcaption { font-size: 13px; overflow-wrap: anywhere; }
pre { background: #f5f7f9; padding: 12px; overflow-x: auto; font-size: 13px; }
"""

logger = logging.getLogger(__name__)

Row = Sequence[Any]


def write_report(store: Store) -> str:
    """Writes `report.html` into the folder `store` of a run or a cross-validation; returns its URL.

    Raises:
        UsageError: there is neither.
        ContentError: a file of the run is damaged, or lacks what has come since it was written.
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


def renew_report(store: Store) -> None:
    """Writes the report of a run that is over; one that cannot be made is a warning.

    The run is what it is without it.

    Raises:
        LockedError, StorageError: the run was lost, or storage fails.
    """
    try:
        write_report(store)
    except (LockedError, StorageError):
        raise
    except Exception as error:
        logger.warning(
            "%s could not be made (%s); the run is not touched by that: flexunet report %s",
            *(join_url(store.url, REPORT_NAME), error, store.url),
        )


def read_summary(store: Store) -> dict[str, Any] | None:
    """Returns the newest evaluation of a run's test split, None where there is none."""
    return read_json(store, "evaluation/summary.json", evaluate_again(store))


def render(store: Store) -> str:
    """Returns the page of the run in `store`; the same files give the same page."""
    summary = read_summary(store)
    outcome = read_json(store, OUTCOME_NAME, RESTORE)
    manifest = _manifest(store)
    parts = [
        _headline(store, summary, outcome),
        _start(store, summary),
        _section("Metrics", _drawn_units(manifest) + _metrics(store, summary)),
        _section("Cases", _cases(store)),
        _section("Failures", _failures(store)),
        _section("Curves", _curves(store)),
        _section("Dataset", _dataset(manifest, _fold_of(store))),
        _section("What was stopped or killed, and resumed", _attempts(store, outcome)),
        _section("Environment", _environment(store)),
        _section("Config", f"<pre>{_text(_read(store, 'config.yaml') or '')}</pre>"),
    ]
    return _page(store, parts)


def render_folds(store: Store) -> str:
    """Returns the page of the cross-validation in `store`."""
    summary = read_json(store, CROSS_VALIDATION_NAME, _POOL_AGAIN)
    if summary is None:
        raise ContentError(f"{store.url}/{CROSS_VALIDATION_NAME} is missing; {_POOL_AGAIN}")
    links = "".join(
        f'<li><a href="../{_text(name)}/{REPORT_NAME}">{_text(name)}</a></li>'
        for name in summary["runs"]
    )
    manifest = _manifest(store)
    # An earlier version did not copy it there.
    drawn = "whole groups" if manifest is None else f"groups {manifest.group_rule}"
    parts = [
        f"<p>Cross-validation: {summary['num_folds']} runs, each evaluated on cases whose groups "
        f"it was not trained on ({_text(drawn)}), and all of these cases together.</p>"
        f"<ul>{links}</ul>",
        _origins(summary.get("init_from")),
        _drawn_units(manifest),
    ]
    for title, found in titled_sizes(summary["sizes"]):
        folds = [dict(measure_rows(fold)) for fold in found["folds"]]
        rows = [
            (label, *(fold[label]["value"] if label in fold else None for fold in folds))
            for label, _ in measure_rows(found["pooled"])
        ]
        columns = ["measure", *(f"fold {index}" for index in range(len(folds)))]
        body = _measures(title, found["pooled"]) + "<h3>Fold by fold</h3>" + _table(columns, rows)
        parts.append(_section(f"All cases at {title}", body))
    parts.append(_vanished(manifest, is_folded=True))
    folds_of = f"{summary['num_folds']} folds"
    parts.append(_section("Dataset", _dataset(manifest, folds_of)))
    return _page(store, parts)


def _page(store: Store, parts: Sequence[str]) -> str:
    name = store.url.rstrip("/").rsplit("/", 1)[-1]
    parts = [
        f"<h1>{_text(name)}</h1>",
        f'<p class="quiet">{_text(store.url)}</p>',
        *parts,
        '<p class="quiet">Research software: not a medical device.</p>',
    ]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{_text(name)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


# Sections


def _headline(
    store: Store, summary: Mapping[str, Any] | None, outcome: Mapping[str, Any] | None
) -> str:
    found = standing(store)
    status = _STANDINGS.get(found, found)
    if outcome and outcome.get("stopped_early"):
        status += f" ({stopped_early_words(outcome['epochs'], outcome['best']['epoch'])})"
    if outcome and outcome.get("skipped_steps"):
        number = counted(outcome["skipped_steps"], "training step")
        status += f" ({number} skipped, whose gradients overflowed float16)"
    if summary is None:
        return f"<p>Status: {_text(status)}.</p>"
    if not has_foreground(summary):
        return (
            f"<p>Status: {_text(status)}{_weights(summary)}.</p>"
            f"{_warning(no_foreground_words(summary))}"
        )
    mean, nothing = summary["foreground_mean"], summary["all_background"]["foreground_mean"]
    return (
        f"<p>Status: {_text(status)}. Foreground Dice <b>{_number(mean['dice'])}</b> over "
        f"{counted_cases(summary)} of {_text(summarized_words(summary))}, mean over cases"
        f"{_weights(summary)} (an all-background prediction: {_number(nothing['dice'])}). Cases "
        "with a class in neither mask are not in its mean.</p>"
    )


def _weights(summary: Mapping[str, Any]) -> str:
    used = summary.get("checkpoint")
    return f", by {checkpoint_words(used)}" if used else ""


def _metrics(store: Store, summary: Mapping[str, Any] | None) -> str:
    if summary is None:
        return _missing("evaluation/summary.json", "flexunet evaluate writes it")
    parts = [
        _way(summary),
        _table(
            ("pixels", "value", "all background"),
            [
                (
                    "pixel accuracy (hides what is missed)",
                    summary["pixel_accuracy"],
                    summary["all_background"]["pixel_accuracy"],
                ),
                ("loss", summary["loss"], None),
            ],
        ),
    ]
    for title, measures in titled_sizes(summary.get("sizes", {})):
        parts.append(f"<h3>At {_text(title)}</h3>")
        parts.append(_measures(title, measures))
    if summary.get("sizes"):
        parts.append(_vanished(_manifest(store), is_folded=_fold_of(store) is not None))
    sweep = read_table(store, "evaluation/thresholds.csv", evaluate_again(store))
    if sweep:
        parts.append("<h3>Other thresholds of the probability</h3>")
        parts.append('<p class="quiet">On the same cases: choosing one here would flatter it.</p>')
        rows = [
            [row["class"], row["threshold"], *map(_value, list(row.values())[2:])] for row in sweep
        ]
        parts.append(_table(list(sweep[0]), rows))
    return "".join(parts)


def _way(summary: Mapping[str, Any]) -> str:
    """Returns how the cases were predicted, where that is not one plain pass of this run."""
    lines = []
    if summary.get("case") == "tile":
        lines.append(_warning("Every tile is counted as if it were a picture."))
    way = summary.get("prediction") or {}
    if len(way.get("runs", ())) > 1:
        runs = ", ".join(each["run"] for each in way["runs"])
        lines.append(f"<p>Mean of {len(way['runs'])} runs: {_text(runs)}.</p>")
    if way.get("flips", "none") != "none":
        lines.append(f"<p>Mean over mirrored pictures: {_text(way['flips'])}.</p>")
    if way.get("small_regions"):
        lines.append(_regions(way["small_regions"]))
    return "".join(lines)


def _regions(regions: Mapping[str, Any]) -> str:
    where = regions["fitted_on"]
    rows = [
        (each["name"], each["min_pixels"], each["dice_before"], each["dice"])
        for each in regions["classes"]
    ]
    columns = ("class", "smallest region, pixels", "Dice there before", "Dice there with it")
    return (
        f"<p>Smaller regions are removed; fitted on {counted(where['num_cases'], 'case')} of the "
        f"{_text(where['split'])} split. The thresholds below count regions of every size.</p>"
        f"{_table(columns, rows)}"
    )


def _vanished(card: Manifest | None, *, is_folded: bool) -> str:
    """Returns the regions that the dataset's masks lost, where they were made smaller.

    Args:
        is_folded: folds are drawn of train and valid together, and nothing of test.
    """
    if card is None or not card.reduced:
        return ""
    of_splits: dict[str, list[ReducedInfo]] = {}
    for split, info in card.reduced.items():
        if not (is_folded and split == "test"):
            of_splits.setdefault("all folds" if is_folded else split, []).append(info)
    rows = [
        (
            *(cases, each.name, sum(info.num_pictures for info in infos)),
            sum(info.num_regions[each.id] for info in infos),
            sum(info.num_vanished[each.id] for info in infos),
            sum(info.num_emptied for info in infos),
        )
        for cases, infos in of_splits.items()
        for each in card.classes
        if each.id
    ]
    columns = (
        *("cases", "class", "pictures", "regions of the source", "without a stored pixel"),
        "pictures that lost all foreground",
    )
    return (
        "<h3>Lost before training</h3>"
        + _table(columns, rows)
        + '<p class="quiet">Masks were made smaller for the dataset. A region of a source mask '
        "that has no stored pixel is in none of the counts above: to miss it is no error there. A "
        "larger --image-size of flexunet prep, or --tile, keeps it.</p>"
    )


def _measures(title: str, measures: Mapping[str, Any]) -> str:
    rows = [
        (
            *(label, m["value"], _interval(m), m["num_cases"], m["num_groups"]),
            *(m["all_background"], m["all_background_num_cases"]),
        )
        for label, m in measure_rows(measures)
    ]
    counts = [
        (
            each["name"],
            *(each[f"num_{key}"] for key in _PRESENCES),
            *(each[f"num_{key}"] for key in _LESION_COUNTS),
        )
        for each in measures["classes"]
    ]
    tolerance = " or ".join(
        f"{value:g} {unit}" for unit, value in measures["nsd_tolerance"].items()
    )
    return (
        _table(
            (
                *("measure", "value", "95 % interval", "cases", "groups"),
                *("all background", "over cases"),
            ),
            rows,
        )
        + f'<p class="quiet">Intervals draw the groups again '
        f"({counted(measures['num_groups'], 'group')}); there is none where fewer than "
        f"{measures['interval']['min_groups']} groups have the measure, and one of a single value "
        "says that all groups have it, not that it is certain. All background, what "
        "predicting nothing scores, is over its own cases: one without the class has a distance "
        f"only where something was predicted. nsd: surface Dice within {tolerance}. A "
        "class in neither mask is left out; in one mask only it scores 0, and its HD95 is the "
        "diagonal of the picture.</p>"
        + _table(
            (
                *("class", "in neither mask", "in both", "nothing predicted"),
                *("not a pixel found", "false alarm"),
                *("lesions", "found", "false positives", "specks"),
            ),
            counts,
        )
        + '<p class="quiet">Nothing predicted: the case has the class, the prediction does not. '
        "Not a pixel found: these, and the cases where all that was predicted lies elsewhere. "
        f"False alarm: predicted in a case without it. {_text(lesion_words(measures))}</p>"
        + "".join(f'<p class="quiet">{_text(note)}</p>' for note in size_notes(title, measures))
    )


def _cases(store: Store) -> str:
    rows = read_table(store, "evaluation/examples.csv", evaluate_again(store))
    if not rows:
        return _missing("evaluation/examples.csv", "flexunet evaluate writes it")
    parts = ["<p>Contours: cyan is the truth, orange the prediction.</p>"]
    for kind, title in (("best", "Best"), ("middle", "Median"), ("worst", "Worst")):
        pictures = [_case(store, row) for row in rows if row["picture"].startswith(f"{kind}-")]
        if pictures:
            parts.append(f'<h3>{title}</h3><div class="pictures">{"".join(pictures)}</div>')
    return "".join(parts)


def _case(store: Store, row: Mapping[str, str]) -> str:
    dice = _value(row["foreground_dice"])
    score = "no foreground" if dice is None else f"Dice {dice:.3f}"
    data = _bytes(store, f"evaluation/overlays/{row['picture']}.png")
    caption = f"{row['filename']}: {score}"
    return (
        f"<p>{_text(caption)}</p>"
        if data is None
        else _figure(_jpeg(data), "jpeg", caption, "case")
    )


def _failures(store: Store) -> str:
    rows = read_table(store, "evaluation/measures_network.csv", evaluate_again(store))
    if not rows:
        return _missing("evaluation/measures_network.csv", "flexunet evaluate writes it")
    classes = [key.removeprefix("presence_") for key in rows[0] if key.startswith("presence_")]
    num_pairs = sum(bool(row[f"dice_{name}"]) for row in rows for name in classes)
    failed = [
        (float(row[f"dice_{name}"]), row, name)
        for row in rows
        for name in classes
        if row[f"dice_{name}"] and float(row[f"dice_{name}"]) < _FAILED_DICE
    ]
    if not failed:
        return f"<p>None of {_pairs(num_pairs)} has a Dice below {_FAILED_DICE}.</p>"
    failed.sort(key=lambda each: each[0])
    table = _table(
        (
            "case",
            "group",
            "class",
            "what",
            "Dice",
            "HD95",
            "unit",
            "lesions found",
            "false positives",
        ),
        [
            (
                *(row["id"], row["group"], name, _failure(row, name)),
                *(dice, _value(row[f"hd95_{name}"]), row["unit"]),
                f"{row[f'found_lesions_{name}']} of {row[f'lesions_{name}']}",
                int(row[f"false_positives_{name}"]),
            )
            for dice, row, name in failed[:_MAX_FAILURES]
        ],
    )
    shown = f", the first {_MAX_FAILURES} shown" if len(failed) > _MAX_FAILURES else ""
    told = f"{len(failed)} with a Dice below {_FAILED_DICE}, of {_pairs(num_pairs)}{shown}."
    return f"<p>{told}</p>{table}"


def _failure(row: Mapping[str, str], name: str) -> str:
    if row[f"presence_{name}"] != "both":
        words = {"truth_only": "nothing predicted", "prediction_only": "false alarm"}
        return words.get(row[f"presence_{name}"], "")
    return "poor overlap" if int(row[f"tp_px_{name}"]) else "not a pixel found"


def _pairs(count: int) -> str:
    return f"{counted(count, 'pair')} of a case and a class that is in one of its masks"


def _curves(store: Store) -> str:
    pictures = []
    for stem, title in CURVE_TITLES.items():
        data = _bytes(store, f"metrics/{stem}.png")
        if data is not None:
            pictures.append(_figure(data, "png", title, "curve"))
    if not pictures:
        return _missing("metrics/", "training writes curves after the first epoch")
    return f'<div class="pictures">{"".join(pictures)}</div>'


def _dataset(card: Manifest | None, folds: str | None) -> str:
    """Returns the card of a dataset.

    Args:
        folds: what is taken of train and valid, in words; None: the dataset's own splits are used.
    """
    if card is None:
        return _missing(
            MANIFEST_NAME,
            "training copies it when it starts" if folds is None else "the train command copies it",
        )
    size = f"{card.image_width} x {card.image_height}, {counted(card.channels, 'channel')}"
    rows = [
        ("name", card.name),
        ("pictures", f"{size}, {card.bit_depth} bits, {card.geometry}"),
        ("classes", ", ".join(each.name for each in card.classes)),
        ("splits", f"{card.split_rule}, seed {card.seed}"),
        ("groups", card.group_rule),
        ("made by version", card.tool_version),
    ]
    samples = "tiles" if card.geometry == "tile" else "pictures"
    if folds is None:
        splits = [(name, info.num_samples, info.num_groups) for name, info in card.splits.items()]
        taken = _table(("split", samples, "groups"), splits)
    else:
        of_both = [card.splits[name] for name in ("train", "valid") if name in card.splits]
        taken = (
            f"<p>{_text(folds)}, taken from train and valid ("
            f"{sum(info.num_samples for info in of_both)} {samples}); the dataset's test split "
            "was not touched.</p>"
        )
    return _table(("dataset", ""), rows) + taken + _leak_check(card, is_folded=folds is not None)


def _leak_check(card: Manifest, *, is_folded: bool) -> str:
    # Folds are drawn of whole groups, whatever the dataset's own splits share.
    if card.leaky and not is_folded:
        return _warning(
            "Leak check: groups or pictures are in more than one split, which was accepted with "
            "--allow-leaks. The metrics are too good."
        )
    if card.group_rule == GROUPS_BY_FILE:
        return _warning(
            "Leak check: no picture is in two splits, but no groups were given: pictures of one "
            "patient may be."
        )
    if card.group_rule == GROUPS_UNKNOWN:
        return _warning(
            "Leak check: no group is in two splits, but how groups were made is not recorded: "
            "pictures of one patient may be."
        )
    what = (
        "in what a fold is evaluated on and in what trained it"
        if is_folded
        else ("in more than one split")
    )
    return f"<p>Leak check: no group and no picture is {what}.</p>"


def _drawn_units(card: Manifest | None) -> str:
    """Returns what the intervals draw, where it is not what a reader takes it for."""
    if card is None or card.group_rule not in (GROUPS_BY_FILE, GROUPS_UNKNOWN):
        return ""
    if card.group_rule == GROUPS_UNKNOWN:
        return _warning("How groups were made is not recorded: intervals may not draw patients.")
    return _warning(
        "No groups were given: intervals draw pictures, not patients, and are too narrow where a "
        "patient has several."
    )


def _fold_of(store: Store) -> str | None:
    """Returns which fold a run trains, in words; None: the dataset's own splits."""
    config = _config(store)
    if config.get("fold") is None:
        return None
    fold = fold_words((int(config["fold"]), int(config["folds"])))
    return fold.capitalize()


def _start(store: Store, summary: Mapping[str, Any] | None) -> str:
    """Returns where the weights of a run came from."""
    if summary is not None and "init_from" in summary:
        return _origins(summary["init_from"])
    source = _config(store).get("init_from")
    return _origins([{"source": source, "seen": "unknown"}] if source else [])


def _origins(origins: Sequence[Mapping[str, Any]] | None) -> str:
    """Returns what weights started from, each source once, and whether it has seen the cases."""
    if origins is None:
        return _warning("Where the weights started from is not recorded.")
    if not origins:
        return "<p>The weights started from the seed.</p>"
    found = sorted({(str(each["source"]), str(each["seen"])) for each in origins})
    return "".join(_origin(source, seen) for source, seen in found)


def _origin(source: str, seen: str) -> str:
    start = f"The weights started from {source}"
    if seen == "no":
        return f"<p>{_text(start)}, which was trained on no group that is evaluated here.</p>"
    if seen == "yes":
        return _warning(f"{start}, which has seen groups that are evaluated here: too good.")
    return _warning(
        f"{start}; which cases trained these is not known. Where some of those evaluated here are "
        "among them, the metrics are too good."
    )


def _attempts(store: Store, outcome: Mapping[str, Any] | None) -> str:
    lease = read_json(store, LEASE_NAME, RESTORE)
    if lease is None:
        return _missing(LEASE_NAME, "training writes it when it starts")
    ends = read_ends(store)
    bases = {
        int(attempt): base
        for attempt, base in lease["bases"].items()
        # These trained nothing: a launcher's look, a command that found the run over.
        if ends.get(int(attempt), {}).get("end") != "looked"
        and not (outcome and int(attempt) > outcome["attempt"])
    }
    last = max(bases, default=0)
    rows = [
        (attempt, base or "the beginning", _end_of(attempt, last, outcome, ends.get(attempt)))
        for attempt, base in sorted(bases.items())
    ]
    stacks = [stat.name for stat in store.list(f"{STACKS_FOLDER}/")]
    told = f"<p>{counted(max(len(bases) - 1, 0), 'restart')}.</p>"
    told += _table(("attempt", "began from", "end"), rows)
    if stacks:
        told += (
            f"<p>Processes that stood still and ended themselves: {_text(', '.join(stacks))}</p>"
        )
    return told


def _end_of(
    attempt: int, last: int, outcome: Mapping[str, Any] | None, end: Mapping[str, Any] | None
) -> str:
    if end is not None:
        return f"stopped and saved at epoch {end['epoch']}, step {end['step']}"
    if attempt < last:
        return "killed, or ended by an error"
    return str(outcome["status"]) if outcome else "not over"


def _environment(store: Store) -> str:
    values = read_json(store, "environment.json", RESTORE)
    if values is None:
        return _missing("environment.json", "training writes it when it starts")
    rows = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {version}" for name, version in value.items())
        elif isinstance(value, list):
            value = ", ".join(str(each) for each in value)
        rows.append((key, str(value)))
    return _table(("environment of the last attempt", ""), rows)


# Pieces of HTML


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{body}</section>"


def _missing(name: str, who: str) -> str:
    return f'<p class="quiet">{_text(name)} is not there yet; {_text(who)}.</p>'


def _warning(text: str) -> str:
    return f'<p class="warning">{_text(text)}</p>'


def _table(columns: Iterable[str], rows: Iterable[Row]) -> str:
    """Returns a table; numbers stand at the right, None is a dash."""
    lines = ["<tr>" + "".join(f"<th>{_text(name)}</th>" for name in columns) + "</tr>"]
    lines += ["<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def _cell(value: Any) -> str:
    if isinstance(value, int | float):
        return f'<td class="number">{_number(value)}</td>'
    return f"<td>{'-' if value is None else _text(value)}</td>"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def _interval(measure: Mapping[str, Any]) -> str | None:
    if measure["low"] is None:
        return None
    return f"{measure['low']:.4f} to {measure['high']:.4f}"


def _figure(data: bytes, kind: str, caption: str, style: str) -> str:
    inline = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    caption = _text(caption)
    image = f'<img src="{inline}" alt="{caption}">'
    return f'<figure class="{style}">{image}<figcaption>{caption}</figcaption></figure>'


def _jpeg(png: bytes) -> bytes:
    """Returns a picture small enough for a page that holds many."""
    from PIL import Image

    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    buffer = io.BytesIO()
    # Colour at full resolution: contours are one or two pixels wide.
    picture.save(buffer, format="JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


# Files of the run


def _config(store: Store) -> dict[str, Any]:
    text = _read(store, "config.yaml")
    return {} if text is None else read_yaml(text, join_url(store.url, "config.yaml"))


def _manifest(store: Store) -> Manifest | None:
    data = _bytes(store, MANIFEST_NAME)
    return None if data is None else parse_manifest(data, join_url(store.url, MANIFEST_NAME))


def _bytes(store: Store, name: str) -> bytes | None:
    try:
        return store.get(name)
    except NotFound:
        return None


def _read(store: Store, name: str) -> str | None:
    data = _bytes(store, name)
    return None if data is None else data.decode(errors="replace")


def _value(cell: str) -> float | str | None:
    """Returns a cell of a CSV as a number where it is one, None where it is empty."""
    try:
        return float(cell) if cell else None
    except ValueError:
        return cell


# The command


@click.command(cls=SettingsCommand)
@click.argument("run", type=PATH)
def command(run: str) -> int:
    """Write RUN/report.html: one page with everything about a run, to be read without a network.

    RUN is the folder or gs:// URL of a run (RUNS/NAME), or of a cross-validation. Only files that
    the run stored are read. Training writes it at its end.
    """
    with quiet_interrupts():
        url = write_report(open_store(run))
    click.echo(f"report: {url}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(command, argv, "flexunet report")


if __name__ == "__main__":
    raise SystemExit(main())
