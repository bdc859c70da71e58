"""The tables of a sweep on a terminal; its report has the rest."""

from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

from gfl_platform.sweeps.analysis.analysis import (
    Analysis,
    analyse,
    cost_line,
    figure_of,
    warnings_of,
)
from gfl_platform.sweeps.analysis.statistics import seeds_of
from gfl_platform.sweeps.formatting import axis_name, point_label
from gfl_platform.sweeps.trials import SweepResults
from jobs.console.cli import console

POINTS_SHOWN = 10
FAILURES_SHOWN = 10


def show_sweep(results: SweepResults) -> None:
    """Print the best points, the verdicts, a paper's figures, the failures and the cost."""
    found = analyse(results)
    if found.points:
        metrics = [
            metric
            for metric in dict.fromkeys((*results.sweep.objectives, "AP", "fps"))
            if any(metric in point.figures for point in found.points)
        ]
        names = ["point", *map(axis_name, metrics), "seeds"]
        _show_folded("best points, mean ± sd over seeds", names, _points(found, metrics))
    _show_folded("verdicts, paired over seeds", ["key", "default", "verdict"], _verdicts(found))
    if found.published:
        names = ["point", "", "paper", "ours", "paper, diff.", "ours, diff.", "seeds"]
        _show_folded("the paper's figures and ours", names, _published(found))
    failures = [t for t in found.unfinished if t.state in ("failed", "nan")]
    if failures:
        rows = [(point_label(t.point), f"{t.seed}", t.cause or t.state) for t in failures]
        hidden = len(rows) - FAILURES_SHOWN
        more = [(f"... {hidden} more", "", "")] if hidden > 0 else []
        _show_folded("failures", ["point", "seed", "cause"], [*rows[:FAILURES_SHOWN], *more])
    states = ", ".join(f"{count} {state}" for state, count in found.cost.states.items())
    for line in (*warnings_of(found), f"{len(results.trials)} trials: {states}", cost_line(found)):
        console.print(Text(line))


def _show_folded(title: str, names: list[str], rows: Iterable[tuple[str, ...]]) -> None:
    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(Text(name), overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # a name in brackets is no markup
    console.print(table)


def _points(found: Analysis, metrics: Sequence[str]) -> Iterable[tuple[str, ...]]:
    for point in found.points[:POINTS_SHOWN]:
        name = point_label(point.point) + (" (default)" if point.default else "")
        figures = [figure_of(point, metric) for metric in metrics]
        yield name, *figures, seeds_of(point)


def _verdicts(found: Analysis) -> Iterable[tuple[str, ...]]:
    for verdict in found.verdicts:
        whole = len(verdict.keys) > 1
        yield "all together" if whole else verdict.keys[0], verdict.default, verdict.text


def _published(found: Analysis) -> Iterable[tuple[str, ...]]:
    for row in found.published:
        name = point_label(row.point) + (" (reference)" if row.reference else "")
        for number, (metric, value) in enumerate(row.paper.items()):
            ours, theirs = row.our_difference.get(metric), row.paper_difference.get(metric)
            yield (
                "" if number else name,
                metric,
                f"{value:.1f}",
                f"{row.ours[metric]:.2f}" if metric in row.ours else "-",
                "-" if theirs is None else f"{theirs:+.1f}",
                "-" if ours is None else f"{ours:+.2f}",
                f"{row.seeds or '-'}",
            )
