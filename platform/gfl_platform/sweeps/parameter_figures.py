"""Figures of a sweep over its keys: a figure against each, and over each pair."""

from collections.abc import Sequence
from itertools import combinations, pairwise
from math import log10
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from gfl_platform.sweeps.analysis.analysis import Analysis
from gfl_platform.sweeps.analysis.statistics import by_seed, spread
from gfl_platform.sweeps.formatting import axis_name, distinct, factor, identity, is_number
from gfl_platform.sweeps.scales import LONGEST_TICK, Scale, scale_of, tick
from gfl_platform.sweeps.style import (
    BLACK,
    COLOUR_MAP,
    COLOURS,
    MARKERS,
    ORANGE,
    Picture,
    canvas,
    legend_above,
)
from gfl_platform.sweeps.trials import SweepResults, Trial

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
    finished = [trial for trial in results.trials if trial.state == "finished"]
    return [trial for trial in finished if by_seed([trial], metric)]


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
        found = spread(trial.figures[metric] * factor(metric) for trial in mine)
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
