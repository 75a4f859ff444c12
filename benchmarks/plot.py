"""Draws the ratios in `results/*.json` and their aims into `results/ratios.png`.

python benchmarks/plot.py
"""

import json
from statistics import median
from typing import Any

import click
from machine import RESULTS

# (label, result, path in it to a list of ratios or a spread, aim, whether more is better)
ROWS: list[tuple[str, str, tuple[str, ...], float, bool]] = [
    ("step, float32: share of the matmul rate", "step-512-float32",
     ("ours", "share_of_matmul_rate"), 0.80, True),
    ("step, mixed_bfloat16: share of the matmul rate", "step-512-mixed_bfloat16",
     ("ours", "share_of_matmul_rate"), 0.75, True),
    ("step, float32: images/s over Keras' fit on one thread", "step-512-float32",
     ("ours_over", "pinned"), 2.0, True),
    ("step, mixed_bfloat16: images/s over Keras' fit in float32", "step-512-mixed_bfloat16",
     ("ours_over", "pinned"), 4.0, True),
    ("update: time over a copy of the same bytes", "optimizer", ("over_copy", "ours"), 1.5, False),
    ("2 workers, 512²: speed over no exchange", "exchange-512-float32",
     ("share_of_silent", "planned"), 0.94, True),
    ("2 workers, 256²: speed over no exchange", "exchange-256-float32",
     ("share_of_silent", "planned"), 0.88, True),
    ("2 workers, 512²: bytes over all-reduce", "exchange-512-float32",
     ("sent_over_all_reduce",), 0.125, False),
    ("input: rate over decoding alone (CPU)", "input",
     ("cpu_rate_ratios", "input / decode"), 0.95, True),
    ("input: rate over decoding and warping (CPU)", "input",
     ("cpu_rate_ratios", "input, warp / decode, warp"), 0.95, True),
    ("input: images/s over WebDataset", "peers",
     ("rate_ratios", "flexunet / WebDataset"), 1.4, True),
    ("input: images/s over MosaicML Streaming", "peers",
     ("rate_ratios", "flexunet / MosaicML Streaming"), 1.4, True),
    ("input: images/s over TFRecordDataset, 2 calls", "peers",
     ("rate_ratios", "flexunet / TFRecordDataset, not tuned"), 1.0, True),
    ("prep: images/s over decoding and encoding", "prep",
     ("ratios", "prep_1 / plain_1"), 0.85, True),
    ("prep: images/s of 2 processes over 1", "prep", ("ratios", "prep_2 / prep_1"), 1.8, True),
    ("inference: share of the matmul rate", "inference-512", ("share_of_matmul_rate",), 0.75, True),
    ("start: time over import, build and first step", "start", ("command_over_core",), 1.2, False),
]  # fmt: skip


@click.command()
def main() -> None:
    """Draw the measured ratios, and print which results are missing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [(row, ratios_of(row)) for row in ROWS]
    shown = [(row, ratios) for row, ratios in found if ratios is not None][::-1]
    if not shown:
        raise click.ClickException(f"{RESULTS}: no results; run make bench")
    figure, axes = pyplot.subplots(figsize=(9, 0.55 * len(shown) + 1.2), layout="constrained")
    for place, ((_, _, _, aim, more_is_better), (middle, least, most)) in enumerate(shown):
        is_met = middle >= aim if more_is_better else middle <= aim
        axes.barh(place, middle, color="tab:green" if is_met else "tab:orange", height=0.6)
        axes.plot([least, most], [place, place], color="black", linewidth=1.2)
        axes.plot([aim, aim], [place - 0.4, place + 0.4], color="tab:red", linewidth=2)
        sign = "≥" if more_is_better else "≤"
        axes.text(max(most, aim) + 0.03, place, f"{middle:.2f} ({sign} {aim})", va="center")
    axes.set_yticks(range(len(shown)), [row[0] for row, _ in shown])
    axes.set_xlabel("ratio: median (bar), least to most (line), aim (red)")
    axes.set_xlim(0, 1.3 * max(max(row[3], ratios[2]) for row, ratios in shown))
    figure.savefig(RESULTS / "ratios.png", dpi=110)
    for row, ratios in found:
        if ratios is None:
            print(f"not measured: {row[0]} ({row[1]}.json)")


def ratios_of(row: tuple[str, str, tuple[str, ...], float, bool]) -> Any:
    """Returns median, minimum and maximum of a row, None without a result."""
    _, name, keys, _, _ = row
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return None
    value = json.loads(path.read_text(encoding="utf-8"))
    for key in keys:
        if key not in value:
            return None
        value = value[key]
    if isinstance(value, float):
        return value, value, value
    if isinstance(value, dict):
        return value["median"], value["min"], value["max"]
    return median(value), min(value), max(value)


if __name__ == "__main__":
    main()
