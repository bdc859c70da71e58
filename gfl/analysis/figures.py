"""The figures of an analysis: curves, confusion, costs of errors, calibration, galleries."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from gfl.analysis.analysis import Analysis, Reliability
from gfl.analysis.edges import EdgeErrors
from gfl.analysis.error_types import KINDS, MEANING, ErrorTypes
from gfl.analysis.thresholds import curve_of

INCHES = (6.0, 4.2)

MOST_CURVES = 8
"""Largest number of classes with a curve of their own: those with the most objects."""

MOST_CONFUSED = 20
"""Largest number of classes in the confusion matrix: those with the most confusions."""

EDGE_GROUPS = 10
"""Number of groups of edges, by sigma, in the calibration of edges."""

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8A8A8A"

STYLE = {
    "font.size": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "svg.hashsalt": "gfl",
    "text.parse_math": False,  # a name with two $ is no formula
}


@contextmanager
def style() -> Iterator[None]:
    """Draw with the report's settings, whatever those of the process are."""
    with mpl.rc_context({**mpl.rcParamsDefault, **STYLE}):
        yield


def draw_ap_by_iou(ap_by_iou: dict[str, float]) -> Figure:
    """Draw AP at each IoU threshold: how fast it falls shows how well boxes are placed."""
    figure, axes = _canvas()
    axes.plot(list(ap_by_iou), [max(value, 0) for value in ap_by_iou.values()], "o-", color=BLUE)
    axes.set(xlabel="IoU threshold", ylabel="AP", ylim=(0, 1))
    return figure


def draw_precision_recall(analysis: Analysis, classes: Sequence[str]) -> Figure:
    """Draw precision over recall of the classes with the most objects, at an IoU of 0.5."""
    figure, axes = _canvas()
    for label, colour in _with_most_objects(analysis, classes):
        curve = curve_of(analysis.matches, label)
        name = _short(classes[label])
        axes.plot(curve.recall, curve.precision, color=colour, label=name, drawstyle="steps-pre")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(loc="lower left")
    return figure


def draw_f1(analysis: Analysis, classes: Sequence[str]) -> Figure:
    """Draw F1 over the score at which to cut, with the best point of each class."""
    figure, axes = _canvas()
    for label, colour in _with_most_objects(analysis, classes):
        curve = curve_of(analysis.matches, label)
        axes.plot(curve.score, curve.f1, color=colour, label=_short(classes[label]))
        if best := analysis.best_f1[classes[label]]:
            axes.plot(best.score, best.f1, "o", color=colour)
    axes.set(xlabel="smallest score that is kept", ylabel="F1", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(loc="lower left")
    return figure


def draw_confusion(confusion: npt.NDArray[np.uint64], classes: Sequence[str]) -> Figure:
    """Draw which class an object is taken for, as shares of the objects of its class."""
    count = len(classes)
    counts = confusion.astype(float)
    wrong = counts.sum(axis=0) + counts.sum(axis=1) - 2 * counts.diagonal()
    shown = sorted(np.argsort(-wrong[:count], kind="stable")[:MOST_CONFUSED].tolist())
    part = counts[np.ix_([*shown, count], [*shown, count])]
    totals = counts.sum(axis=1)[[*shown, count]]
    shares = part / np.maximum(totals, 1)[:, None]
    names = [_short(classes[label]) for label in shown]
    side = max(4.2, 0.42 * len(names) + 2)
    figure = Figure(figsize=(side * 1.1, side), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(visible=False)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names) + 1), [*names, "missed"], rotation=45, ha="right")
    axes.set_yticks(range(len(names) + 1), [*names, "no object"])
    axes.set(xlabel="detected as", ylabel="object")
    for (row, column), number in np.ndenumerate(part):
        if number:
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{number:.0f}", ha="center", va="center", color=colour,
                      fontsize=9)  # fmt: skip
    return figure


def draw_error_costs(errors: ErrorTypes) -> Figure:
    """Draw the AP at an IoU of 0.5 that correcting each kind of error would give back."""
    figure, axes = _canvas()
    gains = [errors.gain[kind] for kind in KINDS]
    bars = axes.barh(range(len(KINDS)), gains, color=BLUE)
    axes.bar_label(bars, [f" {gain:.3f}, {errors.count[kind]} errors" for kind, gain in
                          zip(KINDS, gains, strict=True)], fontsize=10)  # fmt: skip
    axes.set_yticks(range(len(KINDS)), [f"{kind}: {MEANING[kind]}" for kind in KINDS], fontsize=10)
    axes.invert_yaxis()
    axes.set(xlabel="AP50 gained by correcting all of them", xlim=(0, 1.45 * max(*gains, 0.01)))
    return figure


def draw_reliability(reliability: Reliability) -> Figure:
    """Draw the share of correct detections over their score; the diagonal is calibrated."""
    figure, axes = _canvas()
    axes.plot([0, 1], [0, 1], "--", color=GREY, label="calibrated")
    axes.plot(reliability.score, reliability.correct, "o-", color=BLUE, label="this model")
    axes.set(xlabel="score", ylabel="share of correct detections", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(loc="upper left")
    return figure


def draw_edge_calibration(edges: EdgeErrors) -> Figure | None:
    """Draw the error of edges over their sigma, in groups of equal size; None without sigmas."""
    sigma, error = edges.sigma.ravel(), np.abs(edges.error).ravel()
    if sigma.size < EDGE_GROUPS or np.ptp(sigma) == 0:
        return None
    groups = np.array_split(np.argsort(sigma, kind="stable"), EDGE_GROUPS)
    figure, axes = _canvas()
    spread = [np.sqrt(np.mean(sigma[group] ** 2)) for group in groups]
    measured = [np.sqrt(np.mean(error[group] ** 2)) for group in groups]
    middle = [np.median(error[group]) for group in groups]
    ends = [max(min(*spread, *middle), 1e-2), max(*spread, *measured)]
    axes.loglog(ends, ends, "--", color=GREY, label="calibrated")
    axes.loglog(spread, measured, "o-", color=BLUE, label="root of the mean square")
    axes.loglog(spread, middle, "s:", color=ORANGE, label="median")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.set(xlabel="sigma, px", ylabel="size of the error, px")
    axes.legend(loc="upper left")
    return figure


def _canvas() -> tuple[Figure, Axes]:
    figure = Figure(figsize=INCHES, layout="constrained")
    return figure, figure.add_subplot()


def _with_most_objects(analysis: Analysis, classes: Sequence[str]) -> list[tuple[int, Any]]:
    """Return the labels of the classes with the most objects, and a colour for each."""
    counts = np.bincount(analysis.matches.object_label, minlength=len(classes))
    labels = np.argsort(-counts, kind="stable")[:MOST_CURVES].tolist()
    colours = colormaps["tab10"]
    return [(label, colours(place)) for place, label in enumerate(labels) if counts[label]]


def _short(name: str) -> str:
    return name if len(name) <= 18 else name[:17] + "…"
