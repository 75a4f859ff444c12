"""Makes the table and the curves of quality.py from its cells."""

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Cells = Mapping[str, Sequence[dict[str, Any]]]  # by method
BASE = "auto"  # the others are compared with it


def read_cells(folder: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Returns the cells by set (with the minutes) and method, in the order of their folds."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.glob("*.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        found[f"{cell['set']}, {cell['minutes']:g} minutes"][cell["method"]].append(cell)
    return {name: dict(methods) for name, methods in found.items()}


def _of_images(cells: Sequence[dict[str, Any]]) -> dict[tuple[int, str], float]:
    """Returns the Dice of each image and seed."""
    return {(cell["seed"], stem): v for cell in cells for stem, v in cell["dice"].items()}


def _difference(cells: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]) -> str:
    """Returns the mean difference to `base` on the images of both, with its standard error."""
    ours, others = _of_images(base), _of_images(cells)
    pairs = [others[key] - ours[key] for key in others if key in ours]
    if len(pairs) < 2:
        return ""
    error = statistics.stdev(pairs) / len(pairs) ** 0.5
    return f"{statistics.mean(pairs):+.3f} ± {error:.3f}"


def table_of(methods: Cells) -> str:
    """Returns one set as a Markdown table, the best method first."""
    rows = ["| method | mean Dice | folds | minus auto | images | used by others |"]
    rows.append("|---|---|---|---|---|---|")
    means = {
        method: statistics.mean(_of_images(cells).values()) for method, cells in methods.items()
    }
    for method in sorted(methods, key=lambda method: -means[method]):
        cells = methods[method]
        folds = ", ".join(f"{cell['mean_dice']:.3f}" for cell in cells)
        minus = "" if method == BASE else _difference(cells, methods.get(BASE, []))
        shares = [cell["share_of_others"] for cell in cells]
        share = f"{min(shares):.2f} to {max(shares):.2f}"
        num = len(_of_images(cells))
        rows.append(f"| {method} | {means[method]:.3f} | {folds} | {minus} | {num} | {share} |")
    return "\n".join(rows)


def draw_curves(sets: Mapping[str, Cells], path: Path) -> None:
    """Draws the validation Dice over minutes: one panel a set, one line a fold."""
    figure, panels = plt.subplots(1, len(sets), figsize=(6 * len(sets), 4.2), squeeze=False)
    names = sorted({method for methods in sets.values() for method in methods})
    colors = dict(zip(names, plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    for panel, (set_name, methods) in zip(panels[0], sets.items(), strict=True):
        for method, cells in methods.items():
            for number, cell in enumerate(cells):
                minutes, values = np.array(cell["curve"] or np.empty((0, 2))).reshape(-1, 2).T
                style: dict[str, Any] = {"color": colors[method], "linewidth": 1.2}
                style |= {"marker": "D", "markersize": 4} if len(minutes) == 1 else {}
                panel.plot(minutes, values, label=method if number == 0 else None, **style)
        panel.set(
            title=set_name, xlabel="minutes of training", ylabel="validation Dice", ylim=(0, 1)
        )
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small", loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_tables(folder: Path) -> None:
    """Writes table.md and curves.png into the folder of the cells, and prints the table."""
    sets = read_cells(folder)
    if not sets:
        print("no cell is measured yet")
        return
    text = (
        "\n\n".join(f"### {name}\n\n{table_of(methods)}" for name, methods in sets.items()) + "\n"
    )
    (folder / "table.md").write_text(text, encoding="utf-8")
    draw_curves(sets, folder / "curves.png")
    print(text)
