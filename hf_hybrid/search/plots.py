"""Two pictures of a search: what every swap cost, and which layers were swapped."""

import math
import os

from ..errors import MissingDependencyError
from .greedy import SwapReport


TEACHER_COLOUR, LINEAR_COLOUR, GRID_COLOUR = "#4C566A", "#D08770", "#E5E9F0"


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError("Plots need matplotlib. Run `pip install hf_hybrid[demo]`.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_trade_off(report: SwapReport, path: str | os.PathLike) -> None:
    """The metric after every committed swap, with the floor and all other trials behind it. Writes a PNG."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=150)
    rounds = [trial.round for trial in report.trials if trial.round]
    values = [trial.metrics[report.metric] for trial in report.trials if trial.round]
    axes.scatter(
        rounds, values, s=8, color=GRID_COLOUR, edgecolor="#B8C0CC", linewidth=0.4, label="every trial", zorder=1
    )
    x = [0] + [trial.round for trial in report.commits]
    y = [report.base] + [trial.metrics[report.metric] for trial in report.commits]
    axes.plot(x, y, marker="o", color=LINEAR_COLOUR, label="best of its round, committed", zorder=3)
    axes.axhline(report.base, color=TEACHER_COLOUR, linewidth=1, label="teacher")
    if math.isfinite(report.floor):  # a search by a budget has none
        axes.axhline(report.floor, color=TEACHER_COLOUR, linewidth=1, linestyle="--", label="floor")
    axes.set_xlabel("linear layers (or heads)")
    axes.set_ylabel(report.metric.removeprefix("eval_") + ", selection split")
    axes.legend(frameon=False, fontsize=8, ncol=4, loc="lower left", bbox_to_anchor=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path, pyplot)


def plot_layer_map(sites: list[str], swapped: list[str], path: str | os.PathLike) -> None:
    """One cell per layer in the model's order; linear ones carry the round they were swapped in. Writes a PNG."""
    pyplot = _pyplot()
    layers = list(dict.fromkeys(unit.partition(":")[0] for unit in swapped))  # of heads, the layers they are in
    figure, axes = pyplot.subplots(figsize=(max(4.0, 0.32 * len(sites)), 1.1), dpi=150)
    for index, site in enumerate(sites):
        linear = site in layers
        axes.add_patch(pyplot.Rectangle((index, 0), 0.92, 1, color=LINEAR_COLOUR if linear else TEACHER_COLOUR))
        if linear:
            axes.text(
                index + 0.46, 0.5, str(layers.index(site) + 1), ha="center", va="center", color="white", fontsize=7
            )
        axes.text(index + 0.46, -0.25, str(index), ha="center", va="center", fontsize=6)
    axes.set_xlim(0, len(sites))
    axes.set_ylim(-0.4, 1)
    axes.axis("off")
    axes.set_title("orange: linear attention (number: order of replacement) · grey: softmax", fontsize=7, loc="left")
    _save(figure, path, pyplot)


def _save(figure, path, pyplot):
    temporary = f"{os.fspath(path)}.tmp"
    figure.savefig(temporary, format="png", bbox_inches="tight")
    pyplot.close(figure)
    os.replace(temporary, path)
