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
from gfl_platform.sweeps.analysis.statistics import PointSummary, spread
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
"""A list of positive numbers so far apart is drawn on a logarithmic axis."""

LONGEST_TICK = 16


@dataclass(frozen=True)
class Scale:
    """An axis of a key's values.

    Attributes:
        kind: Numbers lie linearly or by their logarithm; other values evenly, in their order.
        values: All different ones; numbers by size.
    """

    kind: Literal["linear", "log", "categorical"]
    values: list[Any]

    def position(self, value: Any) -> float:
        """Return where a value lies."""
        if self.kind == "categorical":
            return [identity(each) for each in self.values].index(identity(value))
        return float(value)

    def beside(self, value: Any, share: float) -> float:
        """Return a position next to a value, a share of the axis away."""
        if self.kind == "categorical":
            return self.position(value) + share * len(self.values)
        low, high = float(self.values[0]), float(self.values[-1])
        if self.kind == "log":
            return float(value) * (high / low) ** share
        return float(value) + share * (high - low)

    def apply(self, axes: Axes) -> None:
        """Set the scale and the ticks of the x axis: at the values if they are few."""
        if self.kind == "categorical":
            axes.set_xticks(range(len(self.values)), [tick(value) for value in self.values])
            return
        if self.kind == "log":
            axes.set_xscale("log")
        if len(self.values) <= 8 and self._room():
            axes.set_xticks(self.values, [tick(value) for value in self.values], minor=False)
            axes.set_xticks([], minor=True)
        elif self.kind == "log":
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.set_xticks([], minor=True)

    def _room(self) -> bool:
        """Whether no two values are so near that their ticks overlap."""
        at = [log10(value) if self.kind == "log" else float(value) for value in self.values]
        gaps = [second - first for first, second in pairwise(at)]
        return not gaps or min(gaps) > (at[-1] - at[0]) / 14


def scale_of(asked: RangeConfig, values: Sequence[Any]) -> Scale:
    """Return the axis for a key's values: those of the trials, and the default if it is drawn."""
    found = distinct(values)
    if not all(map(is_number, found)):
        drawn = {identity(value) for value in found}
        listed = [value for value in asked.values or () if identity(value) in drawn]
        return Scale("categorical", distinct([*listed, *found]))
    apart = asked.log_uniform or (asked.values and found[-1] >= LOG_RATIO * found[0])
    if apart and found[0] > 0:
        return Scale("log", found)
    return Scale("linear", found)


def tick(value: Any) -> str:
    """Return a value as short as a tick has to be."""
    return label(value, LONGEST_TICK)


BLUE, ORANGE, GREEN, PINK, AMBER, SKY, BLACK = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)

COLOURS = (BLUE, GREEN, PINK, AMBER, SKY, BLACK)
"""Of seeds; orange is the best's alone."""

MARKERS = "osD^vPX"

GREY = "#8A8A8A"

COLOUR_MAP = "cividis"

INCHES = (6.0, 4.2)

LETTERS = {
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


@dataclass(frozen=True)
class Picture:
    """A figure of the report.

    Attributes:
        name: Of its file, without a suffix.
        title: Heading above it.
        caption: What is drawn.
        figure: The figure itself.
    """

    name: str
    title: str
    caption: str
    figure: Figure


@contextmanager
def style() -> Iterator[None]:
    """Draw with the report's settings, whatever those of the process are."""
    with mpl.rc_context({**mpl.rcParamsDefault, **LETTERS}):
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
        axes.legend(
            named.values(),
            named.keys(),
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=columns,
            frameon=False,
            borderaxespad=0.2,
            handletextpad=0.5,
            columnspacing=1.2,
        )


MOST_PAIRS = 6
"""Heatmaps of a report: of the most important keys."""

BINS = 5
"""Of a range in a heatmap, and of a list of more than twice as many numbers."""

SEEDS_SHOWN = 6
"""By colour and marker; more seeds look alike."""


def draw_parameter(found: Analysis, key: str, metric: str) -> Picture | None:
    """Draw a figure of all finished trials against a key; None if no trial has it."""
    results = found.results
    trials = _with_figure(results, metric)
    if not trials:
        return None
    default = results.defaults.get(key)
    drawn = [trial.point.get(key) for trial in trials]
    near = not is_number(default) or _within(default, drawn)
    scale = scale_of(results.sweep.space[key], [*drawn, default] if near else drawn)
    figure, axes = canvas()
    _scatter(axes, scale, key, metric, trials)
    _means(axes, scale, key, metric, trials)
    if near:
        at = scale.position(default)
        axes.axvline(at, color=BLACK, linestyle=":", label=f"default {tick(default)}", zorder=1)
    scale.apply(axes)
    if scale.kind == "categorical":
        axes.set_xlim(-0.5, len(scale.values) - 0.5)
        _turn_long_ticks(axes, scale)
    axes.set(xlabel=key, ylabel=axis_name(metric))
    legend_above(axes)
    caption = (
        f"{metric} of each finished training; the squares are means ± sample standard "
        f"deviations of all trainings with one value of {key}."
    )
    return Picture(f"{metric}-{key}", f"{metric} against {key}", caption, figure)


def _with_figure(results: SweepResults, metric: str) -> list[Trial]:
    frame = results.frame().reindex(columns=["state", metric])
    has_figure = (frame["state"] == "finished") & frame[metric].notna()
    return [results.trials[row] for row in frame.index[has_figure]]


def _within(default: Any, drawn: Sequence[Any]) -> bool:
    """Whether a default is no farther off than would squeeze all else to one side."""
    numbers = [value for value in drawn if is_number(value)]
    if len(numbers) < len(drawn):
        return True
    low, high = min(numbers), max(numbers)
    if low > 0 and default > 0:
        return low / 100 <= default <= high * 100
    return low - 2 * (high - low) <= default <= high + 2 * (high - low)


def _scatter(axes: Axes, scale: Scale, key: str, metric: str, trials: Sequence[Trial]) -> None:
    seeds = sorted({trial.seed for trial in trials})
    for number, seed in enumerate(seeds):
        mine = [trial for trial in trials if trial.seed == seed]
        # Trials of one value stand side by side in the order of their start, whatever their figure.
        shift = (number - (len(seeds) - 1) / 2) * 0.012
        counts: dict[str, int] = {}
        positions = []
        for trial in mine:
            name = identity(trial.point.get(key))
            counts[name] = counts.get(name, -1) + 1
            jitter = (counts[name] % 5 - 2) * 0.004 if counts[name] else 0
            positions.append(scale.beside(trial.point.get(key), shift + jitter))
        look = min(number, SEEDS_SHOWN - 1)
        more = len(seeds) > SEEDS_SHOWN and look == SEEDS_SHOWN - 1
        axes.plot(
            positions,
            [trial.figures[metric] * factor(metric) for trial in mine],
            linestyle="none",
            marker=MARKERS[look],
            color=COLOURS[look],
            alpha=0.65,
            markersize=6,
            label="more seeds" if more else f"seed {seed}",
        )


def _means(axes: Axes, scale: Scale, key: str, metric: str, trials: Sequence[Trial]) -> None:
    xs, means, deviations = [], [], []
    for value in distinct(trial.point.get(key) for trial in trials):
        mine = [t for t in trials if identity(t.point.get(key)) == identity(value)]
        found = spread(pd.Series([trial.figures[metric] * factor(metric) for trial in mine]))
        if found and found.sd is not None:
            xs.append(scale.beside(value, 0.025))
            means.append(found.mean)
            deviations.append(found.sd)
    if xs:
        axes.errorbar(
            xs,
            means,
            deviations,
            fmt="s",
            markersize=8,
            markerfacecolor="none",
            color=ORANGE,
            capsize=4,
            linewidth=1.8,
            label="mean ± sd",
            zorder=4,
        )


def _turn_long_ticks(axes: Axes, scale: Scale) -> None:
    letters = sum(len(tick(value)) + 2 for value in scale.values)
    if letters > 4 * LONGEST_TICK:
        axes.tick_params(axis="x", rotation=30)
        for text in axes.get_xticklabels():
            text.set(ha="right", rotation_mode="anchor")


def draw_pairs(found: Analysis) -> list[Picture]:
    """Draw a heatmap over each pair of keys, of six pairs at most."""
    trials = _with_figure(found.results, found.objective)
    keys = [
        key
        for key in found.importance or found.results.sweep.space
        if len(distinct(trial.point.get(key) for trial in trials)) > 1
    ]
    return [_draw_pair(found, trials, *pair) for pair in list(combinations(keys, 2))[:MOST_PAIRS]]


def _draw_pair(found: Analysis, trials: Sequence[Trial], first: str, second: str) -> Picture:
    metric = found.objective
    columns, column_names = _groups(found.results, trials, first)
    rows, row_names = _groups(found.results, trials, second)
    cells: dict[tuple[int, int], list[float]] = {}
    for trial, column, row in zip(trials, columns, rows, strict=True):
        cells.setdefault((row, column), []).append(trial.figures[metric] * factor(metric))
    grid = np.full((len(row_names), len(column_names)), np.nan)
    for at, values in cells.items():
        grid[at] = np.mean(values)
    figure, axes = canvas()
    axes.grid(visible=False)
    image = axes.imshow(grid, cmap=COLOUR_MAP, aspect="auto", origin="lower")
    figure.colorbar(image, label=axis_name(metric))
    _write_cells(axes, grid)
    axes.set_xticks(range(len(column_names)), column_names)
    axes.set_yticks(range(len(row_names)), row_names)
    if sum(map(len, column_names)) > 36:
        axes.tick_params(axis="x", rotation=30)
        for text in axes.get_xticklabels():
            text.set(ha="right", rotation_mode="anchor")
    axes.set(xlabel=first, ylabel=second)
    caption = (
        f"Mean {metric} of the finished trainings in each cell; where it is hatched, none finished."
    )
    return Picture(f"pair-{first}-{second}", f"{metric} over {first} and {second}", caption, figure)


def _write_cells(axes: Axes, grid: np.ndarray[Any, Any]) -> None:
    low, high = np.nanmin(grid), np.nanmax(grid)
    colours = colormaps[COLOUR_MAP]
    for (row, column), value in np.ndenumerate(grid):
        if np.isnan(value):
            cell = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, hatch="///", linewidth=0)
            cell.set_edgecolor("#BBBBBB")
            axes.add_patch(cell)
            continue
        shade = colours((value - low) / (high - low) if high > low else 0.5)
        light = 0.299 * shade[0] + 0.587 * shade[1] + 0.114 * shade[2] > 0.5
        colour = "black" if light else "white"
        axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour)


def _groups(
    results: SweepResults, trials: Sequence[Trial], key: str
) -> tuple[list[int], list[str]]:
    """Return the row of each trial in a heatmap and the rows' names; ranges are cut into bins."""
    column: list[Any] = [trial.point.get(key) for trial in trials]
    values = scale_of(results.sweep.space[key], column).values
    bounds = results.sweep.space[key].bounds
    if not all(map(is_number, values)) or len(values) <= (BINS if bounds else 2 * BINS):
        names = [identity(value) for value in values]
        return [names.index(identity(value)) for value in column], [tick(v) for v in values]
    log = scale_of(results.sweep.space[key], values).kind == "log"
    at = np.array([log10(value) if log else float(value) for value in column])
    edges = np.linspace(at.min(), at.max(), BINS + 1)
    bins = np.clip(np.digitize(at, edges) - 1, 0, BINS - 1)
    ends = [10**edge if log else edge for edge in edges]
    names = [f"{low:.2g}-{high:.2g}" for low, high in pairwise(ends)]
    return [int(number) for number in bins], names


ENDED_BADLY = ("failed", "nan")


def draw_all(found: Analysis) -> list[Picture]:
    """Draw all figures that the trials allow, in the order of the report."""
    metrics = dict.fromkeys((found.objective, "AP"))
    with style():
        drawn = [
            *(draw_parameter(found, key, m) for m in metrics for key in found.results.sweep.space),
            draw_published(found),
            draw_importance(found),
            *draw_pairs(found),
            draw_curves(found),
            draw_front(found),
        ]
    return [picture for picture in drawn if picture]


def draw_curves(found: Analysis) -> Picture | None:
    """Draw the watched metric of each trial over its epochs."""
    trials = [trial for trial in found.results.trials if trial.curve]
    if not trials:
        return None
    best, default = found.best_trial, identity(found.results.defaults)
    figure, axes = canvas()
    for trial in trials:
        if trial is not best and identity(trial.point) != default:
            _draw_curve(axes, trial)
    for trial in trials:
        if trial is not best and identity(trial.point) == default:
            _draw_curve(axes, trial, "default", color=BLACK, linestyle="-.", linewidth=1.8)
    if best and best.curve:
        _draw_curve(axes, best, "best", color=ORANGE, linestyle="-", linewidth=2.8)
    watched = found.results.watched
    axes.set(xlabel="epoch", ylabel=f"{watched}, %")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_above(axes, columns=4)
    without = len(found.results.trials) - len(trials)
    caption = f"{watched} of each trial after each evaluated epoch; grey ones were stopped early."
    if without:
        caption += f" {without} trials ended before their first evaluation."
    return Picture("learning-curves", "Learning curves", caption, figure)


def _draw_curve(axes: Axes, trial: Trial, name: str | None = None, **look: Any) -> None:
    looks: dict[str, dict[str, Any]] = {
        "finished": {"color": BLUE, "linewidth": 1.2, "alpha": 0.65},
        "finalists": {"color": GREEN, "linewidth": 1.8, "linestyle": (0, (6, 1.5))},
        "running": {"color": SKY, "linewidth": 1.2},
        "failed or NaN": {"color": BLACK, "linewidth": 1.2, "linestyle": "--"},
        "stopped": {"color": GREY, "linewidth": 1.0, "alpha": 0.7},
    }
    kind = {"failed": "failed or NaN", "nan": "failed or NaN", "running": "running"}.get(
        trial.state, "stopped"
    )
    if trial.state == "finished":
        kind = "finalists" if trial.stage == "finalists" else "finished"
    epochs, aps = zip(*trial.curve, strict=True)
    given = {**looks[kind], **look} if trial.state not in ENDED_BADLY else looks[kind]
    named = name if name and trial.state not in ENDED_BADLY else kind
    order = {"stopped": 2.0, "finished": 2.2, "finalists": 2.4, "default": 2.6, "best": 2.8}
    shown = [100 * ap for ap in aps]
    axes.plot(epochs, shown, label=named, zorder=order.get(named, 2.5), **given)
    if kind == "failed or NaN":
        axes.plot(epochs[-1], shown[-1], marker="X", color=BLACK, markersize=8, zorder=3)
    elif len(epochs) == 1:
        axes.plot(epochs, shown, marker=".", color=given["color"], zorder=2)


def draw_importance(found: Analysis) -> Picture | None:
    """Draw the share of variance that each key explains."""
    if not found.importance:
        return None
    figure, axes = canvas()
    figure.set_size_inches(6, 1.6 + 0.5 * len(found.importance))
    names = list(found.importance)[::-1]
    shares = [100 * found.importance[name] for name in names]
    axes.barh(names, shares, color=BLUE, height=0.6)
    for row, share in enumerate(shares):
        axes.text(share + 1, row, f"{share:.0f} %", va="center")
    axes.set(xlabel=f"share of the variance of {found.objective}, %", xlim=(0, 115))
    axes.set_xticks(range(0, 101, 20))
    axes.grid(visible=False, axis="y")
    caption = (
        f"How much of the variance of {found.objective} over the finished trials each key "
        "explains (fANOVA on a random forest); interactions are shared among their keys."
    )
    return Picture("importance", "Importance of the keys", caption, figure)


def draw_front(found: Analysis) -> Picture | None:
    """Draw mean AP against mean FPS of each point; the front's points are numbered."""
    if not found.front:
        return None
    figure, axes = canvas()
    known = [point for point in found.points if {"AP", "fps"} <= set(point.figures)]
    front = {id(point) for point in found.front}
    behind = [point for point in known if id(point) not in front]
    default = [point for point in known if point.default]
    looks: list[tuple[list[PointSummary], dict[str, Any]]] = [
        (behind, {"marker": "o", "color": GREY, "label": "beaten in both"}),
        (default, {"marker": "*", "color": BLACK, "label": "default", "markersize": 16}),
    ]
    for points, look in looks:
        if points:
            axes.plot(*_ap_and_fps(points), linestyle="none", zorder=4, **look)
    speeds, aps = _ap_and_fps(found.front)
    axes.plot(
        speeds, aps, "D-", drawstyle="steps-pre", color=ORANGE, zorder=3, label="Pareto front"
    )
    for number, (x, y) in enumerate(zip(speeds, aps, strict=True), start=1):
        if len(found.front) <= 15:
            axes.annotate(f"{number}", (x, y), (6, 6), textcoords="offset points", zorder=5)
    axes.margins(0.1, 0.12)
    axes.set(xlabel=f"{NAMES['fps']}, {UNITS['fps']}", ylabel="AP, %")
    legend_above(axes)
    named_points = "; ".join(
        f"{number}: {point_label(point.point)}"
        for number, point in enumerate(found.front[:15], start=1)
    )
    caption = f"Means of each point. No point beats those of the front in both: {named_points}."
    return Picture("pareto", "AP and speed", caption, figure)


def _ap_and_fps(points: Sequence[PointSummary]) -> tuple[list[float], list[float]]:
    figures = [point.figures for point in points]
    return [each["fps"].mean for each in figures], [100 * each["AP"].mean for each in figures]


def draw_published(found: Analysis) -> Picture | None:
    """Draw differences from the reference row, the paper's and ours, of the first common metric."""
    rows = found.published
    metrics = [metric for row in rows for metric in row.our_difference]
    if not any(not row.reference for row in rows if row.our_difference):
        return None
    metric = metrics[0]
    figure, axes = canvas()
    places = _place_rows(axes, found)
    for number, (name, sides) in enumerate(
        {
            "paper": [row.paper_difference for row in rows],
            "ours": [row.our_difference for row in rows],
        }.items()
    ):
        pairs = sorted(
            (x, side[metric]) for x, side in zip(places, sides, strict=True) if metric in side
        )
        axes.plot(
            *zip(*pairs, strict=True),
            linestyle=("--", "-")[number],
            marker=MARKERS[number],
            color=(BLUE, ORANGE)[number],
            label=name,
        )
    axes.axhline(0, color=BLACK, linewidth=0.8)
    reference = next(point_label(row.point) for row in rows if row.reference)
    axes.set_ylabel(f"difference, {unit_of_difference(metric)}")
    legend_above(axes)
    caption = (
        f"Differences of {metric} from {reference}, in the paper and in this sweep. The data "
        "differ, so only the differences compare."
    )
    return Picture("published", "The paper's figures and ours", caption, figure)


def _place_rows(axes: Axes, found: Analysis) -> list[float]:
    """Return where the paper's rows lie: along the one key that they name, or side by side."""
    rows, space = found.published, found.results.sweep.space
    keys = list(dict.fromkeys(key for row in rows for key in row.point))
    if len(keys) == 1 and keys[0] in space and all(row.point for row in rows):
        values = [row.point[keys[0]] for row in rows]
        scale = scale_of(space[keys[0]], values)
        scale.apply(axes)
        axes.set_xlabel(keys[0])
        return [scale.position(value) for value in values]
    names = short_names(keys)
    ticks = ["\n".join(f"{names[k]} {label(v, 16)}" for k, v in row.point.items()) for row in rows]
    axes.set_xticks(range(len(rows)), ticks)
    return [float(number) for number, _ in enumerate(rows)]
