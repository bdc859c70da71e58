"""The figures of a sweep's report, each None when there is nothing to show."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from gfl_platform.sweeps.analysis.analysis import Analysis
from gfl_platform.sweeps.analysis.statistics import PointSummary
from gfl_platform.sweeps.formatting import (
    NAMES,
    UNITS,
    identity,
    label,
    point_label,
    short_names,
    unit_of_difference,
)
from gfl_platform.sweeps.parameter_figures import draw_pairs, draw_parameter
from gfl_platform.sweeps.scales import scale_of
from gfl_platform.sweeps.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    MARKERS,
    ORANGE,
    SKY,
    Picture,
    canvas,
    legend_above,
    style,
)
from gfl_platform.sweeps.trials import Trial

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
