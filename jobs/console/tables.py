"""Tables on the console, and the latency histogram of a benchmark."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from gfl.config.schema import ModelConfig
from gfl.evaluation.protocol import Benchmark
from gfl.inspection.findings import Finding, Inspection, SplitStatistics, Spread
from gfl.inspection.regression_range import RegressionRange
from gfl_platform.sweeps.analysis.statistics import seed_count
from gfl_platform.sweeps.analysis.verdicts import (
    Analysis,
    analyse,
    cost_line,
    figure_of,
    warnings_of,
)
from gfl_platform.sweeps.formatting import axis_name, point_label
from gfl_platform.sweeps.trials import SweepResults
from jobs.console.cli import console

CLASSES_SHOWN = 30
"""Classes in the table of an inspection; of more, the most and the least frequent are shown."""

BAR = 40
"""Length of the most frequent class's bar, in characters."""

POINTS_SHOWN = 10
"""Best points of a sweep in the table."""

FAILURES_SHOWN = 10
"""Failed trials of a sweep in the table."""


def show_benchmark(model: str, benchmark: Benchmark) -> None:
    """Print a line for each variant, and the model's size."""
    table = Table(title=model, title_justify="left")
    for heading in ("variant", "FPS", "p50, ms", "p90, ms", "p99, ms", "peak, MiB", "protocol"):
        table.add_column(heading, justify="left" if heading in ("variant", "protocol") else "right")
    for timing in benchmark.timings:
        if timing.unavailable:
            table.add_row(timing.name, "-", "-", "-", "-", "-", timing.unavailable)
            continue
        latencies = (f"{value:.2f}" for value in timing.percentiles_ms.values())
        peak = f"{timing.peak_bytes / 2**20:.0f}" if timing.peak_bytes else ""
        table.add_row(timing.name, f"{timing.fps:.2f}", *latencies, peak, timing.hash)
    console.print(table)
    height, width = benchmark.size
    protocol = benchmark.standard.protocol
    console.print(
        f"{benchmark.parameters / 1e6:.2f} M parameters, {benchmark.flops / 1e9:.2f} GFLOPs at "
        f"{height} x {width} px; {len(benchmark.standard.milliseconds)} passes over "
        f"{protocol['images']} images on {protocol['device']}, {protocol['threads']} threads, "
        f"torch {protocol['torch']}",
        soft_wrap=True,
    )
    console.print("latency: one forward pass with post-processing; end to end adds loading")


def draw_latencies(benchmark: Benchmark, path: Path) -> None:
    """Draw a histogram of the latencies of every variant into a PNG."""
    timings = [timing for timing in benchmark.timings if not timing.unavailable]
    figure = Figure(figsize=(7, 1.6 * len(timings) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(timings), squeeze=False)[:, 0]
    for plot, timing in zip(axes, timings, strict=True):
        highest = np.percentile(timing.milliseconds, 99.5)
        plot.hist(np.clip(timing.milliseconds, None, highest), bins=60, color="#0072B2")
        for name, value in timing.percentiles_ms.items():
            plot.axvline(min(value, highest), color="#D55E00", linewidth=1)
            plot.annotate(f"{name} {value:.1f}", (min(value, highest), 1),
                          xycoords=("data", "axes fraction"), fontsize=7, rotation=90, va="top",
                          ha="right")  # fmt: skip
        plot.set_title(f"{timing.name}: {timing.fps:.1f} FPS", fontsize=9, loc="left")
        plot.set_ylabel("passes", fontsize=8)
        plot.tick_params(labelsize=7)
    axes[-1].set_xlabel("ms per forward pass, post-processing included", fontsize=8)
    figure.savefig(path, dpi=120)


def show_inspection(inspection: Inspection, model: ModelConfig) -> None:
    """Print all that was found in the data that `model` is to learn; the worst comes last."""
    read = f"{inspection.files} files read" if inspection.files else "no file read"
    columns = [_statistics(split) for split in inspection.splits.values()]
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    _show(f"images ({read})", ["min / median / max", *inspection.splits], rows)
    _show("boxes of every class", ["class", *inspection.splits, ""], _classes(inspection))
    for at_scale in inspection.regression_ranges:
        at = (
            f"at short side {at_scale.short_side} px: {at_scale.images} images, "
            f"{at_scale.objects} objects"
        )
        names = ["level", "stride", "positives", "edges clipped", "farthest, bins", "99.9 %, bins"]
        bins = f"reg_max {model.reg_max} with Delta {model.bin_width:g}"
        dirac = model.edges == "dirac"
        title = "unlimited regression range" if dirac else f"regression range of {bins}"
        _show(f"{title} {at}", names, _levels(at_scale))
        if dirac:
            continue  # there are no bins to choose
        names = [
            "Delta",
            "reg_max to clip < 0.1 %",
            f"clipped at {model.reg_max}",
            "px between bins, P3 to P7",
        ]
        _show(f"other bins {at}", names, _bin_widths(at_scale, model))
    if inspection.findings:
        _show(
            "findings", ["", "set", "count", "what", "details"], map(_finding, inspection.findings)
        )
    else:
        console.print("nothing is wrong")


def _show(title: str, names: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; what is too long for its column goes on in the next line."""
    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _statistics(split: SplitStatistics) -> dict[str, str]:
    def spread(values: Spread) -> str:
        return f"{values.min:.4g} / {values.median:.4g} / {values.max:.4g}"

    return {
        "images": f"{split.images}",
        "height, px": spread(split.height),
        "width, px": spread(split.width),
        "width / height": spread(split.aspect),
        "boxes": f"{split.boxes}",
        "boxes of an image": spread(split.boxes_per_image),
        **{f"{size} boxes": f"{count}" for size, count in split.sizes.items()},
    }


def _classes(inspection: Inspection) -> Iterable[tuple[str, ...]]:
    train, val = (split.classes for split in inspection.splits.values())
    names = sorted(train, key=lambda name: -train[name])
    most = max(1, *train.values())
    half = CLASSES_SHOWN // 2
    hidden = names[half:-half] if len(names) > CLASSES_SHOWN else []
    for name in names:
        if name not in hidden:
            mark = "█" if console.encoding.startswith("utf") else "#"
            bar = mark * round(BAR * train[name] / most)
            yield name, f"{train[name]}", f"{val[name]}", bar
        elif name == hidden[0]:
            yield f"... {len(hidden)} more", "", "", ""


def _levels(at_scale: RegressionRange) -> Iterable[tuple[str, ...]]:
    names = [f"P{number}" for number, _ in enumerate(at_scale.levels, start=3)]
    strides = [f"{stride}" for stride in at_scale.levels]
    rows = [*at_scale.levels.values(), at_scale.total]
    for name, stride, row in zip([*names, "all"], [*strides, ""], rows, strict=True):
        far = (f"{row.largest:.1f}", f"{row.percentile:.1f}") if row.positives else ("", "")
        yield name, stride, f"{row.positives}", f"{row.share:.3%}", *far
    yield "objects clipped", "", f"{at_scale.clipped_objects}", "", "", ""
    yield "objects never learned", "", f"{at_scale.unlearned_objects}", "", "", ""


def _bin_widths(at_scale: RegressionRange, model: ModelConfig) -> Iterable[tuple[str, ...]]:
    for option in at_scale.bin_widths:
        mark = " (now)" if option.bin_width == model.bin_width else ""
        pixels = " / ".join(f"{step:g}" for step in option.resolution_px)
        yield f"{option.bin_width:g}{mark}", f"{option.reg_max}", f"{option.share:.3%}", pixels


def _finding(finding: Finding) -> tuple[str, ...]:
    kind = "ERROR" if finding.error else "warning"
    return kind, finding.split, f"{finding.count}", finding.what, "\n".join(finding.details)


def show_sweep(results: SweepResults) -> None:
    """Print the best points, the verdicts, a paper's figures, the failures and the cost."""
    analysis = analyse(results)
    if analysis.points:
        metrics = [
            metric
            for metric in dict.fromkeys((*results.sweep.objectives, "AP", "fps"))
            if any(metric in point.figures for point in analysis.points)
        ]
        names = ["point", *map(axis_name, metrics), "seeds"]
        _show("best points, mean ± sd over seeds", names, _points(analysis, metrics))
    _show("verdicts, paired over seeds", ["key", "default", "verdict"], _verdicts(analysis))
    if analysis.published:
        names = ["point", "", "paper", "ours", "paper, diff.", "ours, diff.", "seeds"]
        _show("the paper's figures and ours", names, _published(analysis))
    failures = [t for t in analysis.unfinished if t.state in ("failed", "nan")]
    if failures:
        rows = [(point_label(t.point), f"{t.seed}", t.cause or t.state) for t in failures]
        hidden = len(rows) - FAILURES_SHOWN
        more = [(f"... {hidden} more", "", "")] if hidden > 0 else []
        _show("failures", ["point", "seed", "cause"], [*rows[:FAILURES_SHOWN], *more])
    states = ", ".join(f"{count} {state}" for state, count in analysis.cost.states.items())
    for line in (
        *warnings_of(analysis),
        f"{len(results.trials)} trials: {states}",
        cost_line(analysis),
    ):
        console.print(line, highlight=False)


def _points(analysis: Analysis, metrics: Sequence[str]) -> Iterable[tuple[str, ...]]:
    for point in analysis.points[:POINTS_SHOWN]:
        name = point_label(point.point) + (" (default)" if point.default else "")
        figures = [figure_of(point, metric) for metric in metrics]
        yield name, *figures, seed_count(point)


def _verdicts(analysis: Analysis) -> Iterable[tuple[str, ...]]:
    for verdict in analysis.verdicts:
        whole = len(verdict.keys) > 1
        yield "all together" if whole else verdict.keys[0], verdict.default, verdict.text


def _published(analysis: Analysis) -> Iterable[tuple[str, ...]]:
    for row in analysis.published:
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
