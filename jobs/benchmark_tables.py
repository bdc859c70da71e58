"""What `jobs.benchmark` shows: a table, and the latencies as a picture."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from jobs.console.cli import console

if TYPE_CHECKING:
    from gfl_platform.evaluation.benchmark import Benchmark


def show_benchmark(model: str, found: "Benchmark") -> None:
    """Print a line for each variant, and the model's size."""
    table = Table(title=model, title_justify="left")
    for heading in ("variant", "FPS", "p50, ms", "p90, ms", "p99, ms", "peak, MiB", "protocol"):
        table.add_column(heading, justify="left" if heading in ("variant", "protocol") else "right")
    for timing in found.timings:
        if timing.unavailable:
            table.add_row(timing.name, "-", "-", "-", "-", "-", timing.unavailable)
            continue
        latencies = (f"{value:.2f}" for value in timing.percentiles_ms.values())
        peak = f"{timing.peak_bytes / 2**20:.0f}" if timing.peak_bytes else ""
        table.add_row(timing.name, f"{timing.fps:.2f}", *latencies, peak, timing.hash)
    console.print(table)
    height, width = found.size
    protocol = found.standard.protocol
    console.print(
        f"{found.parameters / 1e6:.2f} M parameters, {found.flops / 1e9:.2f} GFLOPs at "
        f"{height} x {width} px; {len(found.standard.milliseconds)} passes over "
        f"{protocol['images']} images on {protocol['device']}, {protocol['threads']} threads, "
        f"torch {protocol['torch']}",
        soft_wrap=True,
    )
    console.print("latency: of a forward pass and its post-processing; loading is in end to end")


def draw_latencies(found: "Benchmark", path: Path) -> None:
    """Draw a histogram of the latencies of every variant into a PNG."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timings = [timing for timing in found.timings if not timing.unavailable]
    figure = Figure(figsize=(7, 1.6 * len(timings) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(timings), squeeze=False)[:, 0]
    for each, timing in zip(axes, timings, strict=True):
        highest = np.percentile(timing.milliseconds, 99.5)
        each.hist(np.clip(timing.milliseconds, None, highest), bins=60, color="#0072B2")
        for name, value in timing.percentiles_ms.items():
            each.axvline(min(value, highest), color="#D55E00", linewidth=1)
            each.annotate(f"{name} {value:.1f}", (min(value, highest), 1),
                          xycoords=("data", "axes fraction"), fontsize=7, rotation=90, va="top",
                          ha="right")  # fmt: skip
        each.set_title(f"{timing.name}: {timing.fps:.1f} FPS", fontsize=9, loc="left")
        each.set_ylabel("passes", fontsize=8)
        each.tick_params(labelsize=7)
    axes[-1].set_xlabel("ms a forward pass, post-processing included", fontsize=8)
    figure.savefig(path, dpi=120)
