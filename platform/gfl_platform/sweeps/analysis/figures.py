"""The figures of a sweep's report, each None when there is nothing to show."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import log10
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator

from gfl_platform.config import RangeConfig
from gfl_platform.sweeps.analysis.statistics import PointSummary
from gfl_platform.sweeps.analysis.verdicts import Analysis
from gfl_platform.sweeps.formatting import (
    NAMES,
    UNITS,
    axis_name,
    distinct,
    factor,
    identity,
    is_number,
    label,
    point_label,
    short_names,
    unit_of_difference,
)
from gfl_platform.sweeps.trials import SweepResults, Trial

LOG_RATIO = 50
"""Ratio of a list's largest to its smallest number from which its axis is logarithmic."""

LONGEST_TICK = 16
"""Characters of a tick's label at most."""

FEW_TICKS = 8
"""Values up to which each has a tick."""

MOST_PAIRS = 6
"""Heatmaps of a report at most: those of the most important keys."""

BINS = 5
"""Bins in a heatmap of a range, or of a list of more than twice as many numbers."""

SEEDS_SHOWN = 6
"""Seeds with a colour and marker of their own; further seeds look alike."""

MOST_NUMBERED = 15
"""Points of a Pareto front that are numbered."""

BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
AMBER, SKY, BLACK, GREY = "#E69F00", "#56B4E9", "#000000", "#8A8A8A"

COLOURS = (BLUE, GREEN, PINK, AMBER, SKY, BLACK)
"""Colours of the seeds; orange is reserved for the best trial and the means."""

MARKERS = "osD^vPX"

COLOUR_MAP = "cividis"

INCHES = (6.0, 4.2)

STYLE = {
    "font.size": 14,
    "axes.labelsize": 14,
    "xtick.labelsize": 13,
    "ytick.labelsize": 13,
    "legend.fontsize": 12,
    "legend.framealpha": 0.85,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "svg.hashsalt": "gfl",
    "text.parse_math": False,  # a name with two $ is no formula
}


LEGEND: dict[str, Any] = {
    "loc": "lower left",
    "bbox_to_anchor": (0, 1),
    "frameon": False,
    "borderaxespad": 0.2,
    "handletextpad": 0.5,
    "columnspacing": 1.2,
}


@dataclass(frozen=True)
class Picture:
    """A figure of the report: its file's name without a suffix, its heading, what is drawn."""

    name: str
    title: str
    caption: str
    figure: Figure


def draw_all(analysis: Analysis) -> list[Picture]:
    """Draw all figures that the trials allow, in the order of the report."""
    metrics = dict.fromkeys((analysis.objective, "AP"))
    keys = analysis.results.sweep.space
    with style():
        pictures = [
            *(draw_parameter(analysis.results, key, metric) for metric in metrics for key in keys),
            draw_published(analysis),
            draw_importance(analysis),
            *draw_pairs(analysis),
            draw_curves(analysis),
            draw_front(analysis),
        ]
    return [picture for picture in pictures if picture]


@contextmanager
def style() -> Iterator[None]:
    """Draw with the report's settings, whatever those of the process are."""
    with mpl.rc_context({**mpl.rcParamsDefault, **STYLE}):
        yield


def canvas() -> tuple[Figure, Axes]:
    """Return an empty figure with its axes."""
    figure = Figure(figsize=INCHES, layout="constrained")
    return figure, figure.add_subplot()


def legend_above(axes: Axes, columns: int = 3) -> None:
    """Put the legend above the axes, where it hides nothing, if there is anything to explain."""
    handles, labels = axes.get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    if named:
        axes.legend(named.values(), named.keys(), ncols=columns, **LEGEND)


def _rotate_ticks(axes: Axes) -> None:
    axes.tick_params(axis="x", rotation=30)
    for text in axes.get_xticklabels():
        text.set(ha="right", rotation_mode="anchor")


@dataclass(frozen=True)
class Scale:
    """The axis of a key's different values: sorted numbers, or other values side by side."""

    kind: Literal["linear", "log", "categorical"]
    values: list[Any]

    def position(self, value: Any) -> float:
        """Return where a value lies."""
        if self.kind == "categorical":
            return [identity(other) for other in self.values].index(identity(value))
        return float(value)

    def beside(self, value: Any, share: float) -> float:
        """Return a position next to a value, away by a share of the axis."""
        if self.kind == "categorical":
            return self.position(value) + share * len(self.values)
        low, high = float(self.values[0]), float(self.values[-1])
        if self.kind == "log":
            return float(value) * (high / low) ** share
        return float(value) + share * (high - low)

    def apply(self, axes: Axes) -> None:
        """Set the scale and the ticks of the x axis; few values have a tick each."""
        ticks = [tick(value) for value in self.values]
        if self.kind == "categorical":
            axes.set_xticks(range(len(self.values)), ticks)
            return
        if self.kind == "log":
            axes.set_xscale("log")
        if len(self.values) <= FEW_TICKS and self._has_room():
            axes.set_xticks(self.values, ticks)
            axes.set_xticks([], minor=True)
        elif self.kind == "log":
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=FEW_TICKS))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.set_xticks([], minor=True)

    def _has_room(self) -> bool:
        """Return whether no two values are so near that their ticks overlap."""
        places = [log10(value) if self.kind == "log" else float(value) for value in self.values]
        gaps = np.diff(places)
        return not gaps.size or gaps.min() > (places[-1] - places[0]) / 14


def scale_of(ranges: RangeConfig, values: Sequence[Any]) -> Scale:
    """Return the axis for a key's values: those of the trials, and the default if it is drawn."""
    drawn = distinct(values)
    if not all(map(is_number, drawn)):
        identities = {identity(value) for value in drawn}
        listed = [value for value in ranges.values or () if identity(value) in identities]
        return Scale("categorical", distinct([*listed, *drawn]))
    wide = ranges.log_uniform or (ranges.values and drawn[-1] >= LOG_RATIO * drawn[0])
    return Scale("log" if wide and drawn[0] > 0 else "linear", drawn)


def tick(value: Any) -> str:
    """Return a value as short as a tick has to be."""
    return label(value, LONGEST_TICK)


def _with_figure(results: SweepResults, metric: str) -> list[Trial]:
    """Return the finished trials that have a figure of this metric."""
    frame = results.frame().reindex(columns=["state", metric])
    has_figure = (frame["state"] == "finished") & frame[metric].notna()
    return [results.trials[row] for row in frame.index[has_figure]]


def draw_parameter(results: SweepResults, key: str, metric: str) -> Picture | None:
    """Draw a metric of all finished trials against a key; None if no trial has it."""
    trials = _with_figure(results, metric)
    if not trials:
        return None
    default = results.defaults.get(key)
    values = [trial.point.get(key) for trial in trials]
    is_near = _is_near(default, values)
    scale = scale_of(results.sweep.space[key], [*values, default] if is_near else values)
    figures = pd.DataFrame(
        {
            "value": [identity(value) for value in values],
            "seed": [trial.seed for trial in trials],
            "figure": [trial.figures[metric] * factor(metric) for trial in trials],
        }
    )
    figure, axes = canvas()
    _scatter(axes, scale, values, figures)
    _draw_means(axes, scale, values, figures)
    if is_near:
        place = scale.position(default)
        axes.axvline(place, color=BLACK, linestyle=":", label=f"default {tick(default)}", zorder=1)
    scale.apply(axes)
    if scale.kind == "categorical":
        axes.set_xlim(-0.5, len(scale.values) - 0.5)
        if sum(len(tick(value)) + 2 for value in scale.values) > 4 * LONGEST_TICK:
            _rotate_ticks(axes)
    axes.set(xlabel=key, ylabel=axis_name(metric))
    legend_above(axes)
    caption = (
        f"{metric} of each finished training; the squares are means ± sample standard "
        f"deviations of all trainings with one value of {key}."
    )
    return Picture(f"{metric}-{key}", f"{metric} against {key}", caption, figure)


def _is_near(default: Any, values: Sequence[Any]) -> bool:
    """Return whether a default is no farther off than would squeeze all else to one side."""
    if not all(map(is_number, [default, *values])):
        return True
    low, high = min(values), max(values)
    if low > 0 and default > 0:
        return low / 100 <= default <= high * 100
    return low - 2 * (high - low) <= default <= high + 2 * (high - low)


def _scatter(axes: Axes, scale: Scale, values: Sequence[Any], figures: pd.DataFrame) -> None:
    """Draw each figure at its value; trials of one value stand side by side by seed and start."""
    repeats = figures.groupby(["value", "seed"]).cumcount()
    jitters = (0.004 * (repeats % 5 - 2)).where(repeats > 0, 0.0)
    groups = figures.groupby("seed")["figure"]
    for number, (seed, of_seed) in enumerate(groups):
        shift = (number - (len(groups) - 1) / 2) * 0.012
        look = min(number, SEEDS_SHOWN - 1)
        is_shared = len(groups) > SEEDS_SHOWN and look == SEEDS_SHOWN - 1
        axes.plot(
            [scale.beside(values[row], shift + jitters[row]) for row in of_seed.index],
            of_seed,
            MARKERS[look],
            color=COLOURS[look],
            alpha=0.65,
            markersize=6,
            label="more seeds" if is_shared else f"seed {seed}",
        )


def _draw_means(axes: Axes, scale: Scale, values: Sequence[Any], figures: pd.DataFrame) -> None:
    """Draw mean ± sample standard deviation of each value that has several figures."""
    spreads = figures.groupby("value")["figure"].agg(["mean", "std"]).dropna()
    several = [value for value in distinct(values) if identity(value) in spreads.index]
    if several:
        spreads = spreads.loc[[identity(value) for value in several]]
        axes.errorbar(
            [scale.beside(value, 0.025) for value in several],
            spreads["mean"],
            spreads["std"],
            fmt="s",
            markersize=8,
            markerfacecolor="none",
            color=ORANGE,
            capsize=4,
            linewidth=1.8,
            label="mean ± sd",
            zorder=4,
        )


def draw_pairs(analysis: Analysis) -> list[Picture]:
    """Draw a heatmap over each pair of keys, of the most important ones."""
    results, metric = analysis.results, analysis.objective
    trials = _with_figure(results, metric)
    keys = [
        key
        for key in analysis.importance or results.sweep.space
        if len(distinct(trial.point.get(key) for trial in trials)) > 1
    ]
    pairs = list(combinations(keys, 2))[:MOST_PAIRS]
    return [_draw_pair(results, metric, trials, *pair) for pair in pairs]


def _draw_pair(
    results: SweepResults, metric: str, trials: Sequence[Trial], first: str, second: str
) -> Picture:
    columns, column_names = _cells(results, trials, first)
    rows, row_names = _cells(results, trials, second)
    figures = pd.Series([trial.figures[metric] * factor(metric) for trial in trials])
    means = figures.groupby([rows, columns]).mean().unstack()
    means = means.reindex(index=range(len(row_names)), columns=range(len(column_names)))
    figure, axes = canvas()
    axes.grid(visible=False)
    image = axes.imshow(means.to_numpy(), cmap=COLOUR_MAP, aspect="auto", origin="lower")
    figure.colorbar(image, label=axis_name(metric))
    _write_cells(axes, means.to_numpy())
    axes.set_xticks(range(len(column_names)), column_names)
    axes.set_yticks(range(len(row_names)), row_names)
    if sum(map(len, column_names)) > 36:
        _rotate_ticks(axes)
    axes.set(xlabel=first, ylabel=second)
    caption = (
        f"Mean {metric} of the finished trainings in each cell; where it is hatched, none finished."
    )
    return Picture(f"pair-{first}-{second}", f"{metric} over {first} and {second}", caption, figure)


def _write_cells(axes: Axes, means: np.ndarray[Any, Any]) -> None:
    """Write each mean into its cell, in black or white; hatch the empty cells."""
    low, high = np.nanmin(means), np.nanmax(means)
    colours = colormaps[COLOUR_MAP]
    for (row, column), value in np.ndenumerate(means):
        if np.isnan(value):
            cell = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, hatch="///", linewidth=0)
            cell.set_edgecolor("#BBBBBB")
            axes.add_patch(cell)
            continue
        red, green, blue, _ = colours((value - low) / (high - low) if high > low else 0.5)
        is_light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
        colour = "black" if is_light else "white"
        axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour)


def _cells(results: SweepResults, trials: Sequence[Trial], key: str) -> tuple[list[int], list[str]]:
    """Return each trial's row in a heatmap, and the rows' names; ranges are cut into bins."""
    ranges = results.sweep.space[key]
    values: list[Any] = [trial.point.get(key) for trial in trials]
    scale = scale_of(ranges, values)
    if scale.kind == "categorical" or len(scale.values) <= (BINS if ranges.bounds else 2 * BINS):
        identities = [identity(value) for value in scale.values]
        rows = [identities.index(identity(value)) for value in values]
        return rows, [tick(value) for value in scale.values]
    is_log = scale.kind == "log"
    places = np.array([log10(value) if is_log else float(value) for value in values])
    edges = np.linspace(places.min(), places.max(), BINS + 1)
    bins = np.clip(np.digitize(places, edges) - 1, 0, BINS - 1)
    ends = [10**edge if is_log else edge for edge in edges]
    return bins.tolist(), [f"{low:.2g}-{high:.2g}" for low, high in pairwise(ends)]


def draw_curves(analysis: Analysis) -> Picture | None:
    """Draw the watched metric of each trial over its epochs."""
    trials = [trial for trial in analysis.results.trials if trial.curve]
    if not trials:
        return None
    default = identity(analysis.results.defaults)
    by_role: dict[str | None, list[Trial]] = {None: [], "default": [], "best": []}
    for trial in trials:
        role = "default" if identity(trial.point) == default else None
        by_role["best" if trial is analysis.best_trial else role].append(trial)
    figure, axes = canvas()
    for role, members in by_role.items():
        for trial in members:
            _draw_curve(axes, trial, role)
    watched = analysis.results.watched
    axes.set(xlabel="epoch", ylabel=f"{watched}, %")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_above(axes, columns=4)
    missing = len(analysis.results.trials) - len(trials)
    caption = f"{watched} of each trial after each evaluated epoch; grey ones were stopped early."
    if missing:
        caption += f" {missing} trials ended before their first evaluation."
    return Picture("learning-curves", "Learning curves", caption, figure)


CURVES: dict[str, dict[str, Any]] = {
    "stopped": {"color": GREY, "linewidth": 1.0, "alpha": 0.7, "zorder": 2.0},
    "finished": {"color": BLUE, "linewidth": 1.2, "alpha": 0.65, "zorder": 2.2},
    "finalists": {"color": GREEN, "linewidth": 1.8, "linestyle": (0, (6, 1.5)), "zorder": 2.4},
    "running": {"color": SKY, "linewidth": 1.2, "zorder": 2.5},
    "failed or NaN": {"color": BLACK, "linewidth": 1.2, "linestyle": "--", "zorder": 2.5},
    "default": {"color": BLACK, "linewidth": 1.8, "linestyle": "-.", "zorder": 2.6},
    "best": {"color": ORANGE, "linewidth": 2.8, "linestyle": "-", "zorder": 2.8},
}
"""Looks of learning curves by what the trial is."""


def _draw_curve(axes: Axes, trial: Trial, role: str | None) -> None:
    """Draw a learning curve; a trial that failed is drawn as such, whatever its role."""
    kinds = {"failed": "failed or NaN", "nan": "failed or NaN", "running": "running"}
    kind = kinds.get(trial.state, "stopped")
    if trial.state == "finished":
        kind = "finalists" if trial.stage == "finalists" else "finished"
    has_failed = kind == "failed or NaN"
    name = kind if has_failed else role or kind
    look = CURVES[kind] | CURVES[name]
    epochs, values = zip(*trial.curve, strict=True)
    percent = [100 * value for value in values]
    axes.plot(epochs, percent, label=name, **look)
    if has_failed:
        axes.plot(epochs[-1], percent[-1], marker="X", color=BLACK, markersize=8, zorder=3)
    elif len(epochs) == 1:
        axes.plot(epochs, percent, marker=".", color=look["color"], zorder=2)


def draw_importance(analysis: Analysis) -> Picture | None:
    """Draw the share of variance that each key explains."""
    if not analysis.importance:
        return None
    figure, axes = canvas()
    figure.set_size_inches(6, 1.6 + 0.5 * len(analysis.importance))
    names = list(analysis.importance)[::-1]
    shares = [100 * analysis.importance[name] for name in names]
    axes.barh(names, shares, color=BLUE, height=0.6)
    for row, share in enumerate(shares):
        axes.text(share + 1, row, f"{share:.0f} %", va="center")
    axes.set(xlabel=f"share of the variance of {analysis.objective}, %", xlim=(0, 115))
    axes.set_xticks(range(0, 101, 20))
    axes.grid(visible=False, axis="y")
    caption = (
        f"How much of the variance of {analysis.objective} over the finished trials each key "
        "explains (fANOVA on a random forest); interactions are shared among their keys."
    )
    return Picture("importance", "Importance of the keys", caption, figure)


def draw_front(analysis: Analysis) -> Picture | None:
    """Draw mean AP against mean FPS of each point; the front's points are numbered."""
    if not analysis.front:
        return None
    figure, axes = canvas()
    known = [point for point in analysis.points if {"AP", "fps"} <= point.figures.keys()]
    beaten = [point for point in known if all(point is not other for other in analysis.front)]
    default = [point for point in known if point.default]
    if beaten:
        axes.plot(*_speeds_and_aps(beaten), "o", color=GREY, zorder=4, label="beaten in both")
    if default:
        speeds_and_aps = _speeds_and_aps(default)
        axes.plot(*speeds_and_aps, "*", color=BLACK, markersize=16, zorder=4, label="default")
    speeds, aps = _speeds_and_aps(analysis.front)
    axes.plot(
        speeds, aps, "D-", drawstyle="steps-pre", color=ORANGE, zorder=3, label="Pareto front"
    )
    if len(analysis.front) <= MOST_NUMBERED:
        for number, place in enumerate(zip(speeds, aps, strict=True), start=1):
            axes.annotate(f"{number}", place, (6, 6), textcoords="offset points", zorder=5)
    axes.margins(0.1, 0.12)
    axes.set(xlabel=f"{NAMES['fps']}, {UNITS['fps']}", ylabel="AP, %")
    legend_above(axes)
    legend = "; ".join(
        f"{number}: {point_label(point.point)}"
        for number, point in enumerate(analysis.front[:MOST_NUMBERED], start=1)
    )
    caption = f"Means of each point. No point beats those of the front in both: {legend}."
    return Picture("pareto", "AP and speed", caption, figure)


def _speeds_and_aps(points: Sequence[PointSummary]) -> tuple[list[float], list[float]]:
    figures = [point.figures for point in points]
    return [row["fps"].mean for row in figures], [100 * row["AP"].mean for row in figures]


def draw_published(analysis: Analysis) -> Picture | None:
    """Draw differences from the reference row, the paper's and ours, of the first common metric."""
    rows = analysis.published
    if not any(row.our_difference and not row.reference for row in rows):
        return None
    metric = next(metric for row in rows for metric in row.our_difference)
    figure, axes = canvas()
    places = _place_rows(axes, analysis)
    sides = [
        ("paper", "o--", BLUE, [row.paper_difference.get(metric) for row in rows]),
        ("ours", "s-", ORANGE, [row.our_difference.get(metric) for row in rows]),
    ]
    for name, look, colour, differences in sides:
        known = pd.Series(differences, places, dtype=float).dropna().sort_index(kind="stable")
        axes.plot(known.index, known, look, color=colour, label=name)
    axes.axhline(0, color=BLACK, linewidth=0.8)
    reference = next(point_label(row.point) for row in rows if row.reference)
    axes.set_ylabel(f"difference, {unit_of_difference(metric)}")
    legend_above(axes)
    caption = (
        f"Differences of {metric} from {reference}, in the paper and in this sweep. The data "
        "differ, so only the differences compare."
    )
    return Picture("published", "The paper's figures and ours", caption, figure)


def _place_rows(axes: Axes, analysis: Analysis) -> list[float]:
    """Return where the paper's rows lie: along the one key that they name, or side by side."""
    rows, space = analysis.published, analysis.results.sweep.space
    keys = list(dict.fromkeys(key for row in rows for key in row.point))
    if len(keys) == 1 and keys[0] in space and all(row.point for row in rows):
        values = [row.point[keys[0]] for row in rows]
        scale = scale_of(space[keys[0]], values)
        scale.apply(axes)
        axes.set_xlabel(keys[0])
        return [float(scale.position(value)) for value in values]
    names = short_names(keys)
    ticks = [
        "\n".join(f"{names[key]} {tick(value)}" for key, value in row.point.items()) for row in rows
    ]
    axes.set_xticks(range(len(rows)), ticks)
    return [float(number) for number in range(len(rows))]
