"""The report of a sweep: one HTML page that needs nothing else, its pictures, and its numbers."""

import base64
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path

from gfl_platform.storage.runs import write_atomically
from gfl_platform.sweeps.analysis.analysis import (
    Analysis,
    analyse,
    cost_line,
    figure_of,
    warnings_of,
)
from gfl_platform.sweeps.analysis.figures import draw_all
from gfl_platform.sweeps.analysis.statistics import seeds_of
from gfl_platform.sweeps.analysis.verdicts import CONFIDENCE
from gfl_platform.sweeps.exports import results_json, trials_csv
from gfl_platform.sweeps.formatting import (
    axis_name,
    label,
    overrides,
    point_label,
    shown,
    unit_of_difference,
)
from gfl_platform.sweeps.style import Picture, style
from gfl_platform.sweeps.trials import SweepResults

TEMPLATE = "report.html.jinja"
DPI = 130
BEST_SHOWN = 10


def write_report(results: SweepResults, folder: Path) -> list[Path]:
    """Write report.html, a PNG of each figure, results.json and trials.csv.

    Each file is whole at any time; those of an earlier report are replaced.

    Returns:
        The files, report.html first.
    """
    found = analyse(results)
    pictures = draw_all(found)
    folder.mkdir(parents=True, exist_ok=True)
    pngs = {_file_name(picture): _render(picture, "png") for picture in pictures}
    sources = [
        _smaller(png, _render(picture, "svg"))
        for picture, png in zip(pictures, pngs.values(), strict=True)
    ]
    for name, png in pngs.items():
        _write_bytes(folder / name, png)
    texts = {
        "report.html": render_html(found, pictures, sources),
        "results.json": results_json(found),
        "trials.csv": trials_csv(results),
    }
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return [folder / name for name in (*texts, *pngs)]


def render_html(found: Analysis, pictures: Sequence[Picture], sources: Sequence[str]) -> str:
    """Return the page, `sources` being the pictures as URLs."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(label=label, point=point_label)
    environment.globals.update(shown=shown, axis_name=axis_name, figure_of=figure_of)
    environment.globals.update(unit_of_difference=unit_of_difference, seeds_of=seeds_of)
    # As the trials did: BatchNorm that trains depends on how many share a batch.
    where = {"cluster.workers": found.results.job.cluster.workers or 1}
    metrics = dict.fromkeys((*found.results.sweep.objectives, "AP", "AP50", "AP75", "fps"))
    return environment.get_template(TEMPLATE).render(
        found=found,
        results=found.results,
        sweep=found.results.sweep,
        keys=list(found.results.sweep.space),
        metrics=[m for m in metrics if any(m in point.figures for point in found.points)],
        warnings=warnings_of(found),
        reproduce=[overrides(found.best.point | where, seed) for seed in found.best.seeds[:1]]
        if found.best
        else [],
        figures=list(zip(pictures, sources, strict=True)),
        confidence=f"{CONFIDENCE:.0%}",
        best_shown=BEST_SHOWN,
        cost_line=cost_line(found),
        has_fps=any("fps" in trial.figures for trial in found.results.trials),
    )


def _file_name(picture: Picture) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", picture.name) + ".png"


def _render(picture: Picture, kind: str) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {}
    with style():
        picture.figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
    picture.figure.set_layout_engine("none")  # which a second rendering need not find again
    return buffer.getvalue()


def _smaller(png: bytes, svg: bytes) -> str:
    """Return the smaller picture as a URL; an `img` keeps the names inside an SVG to itself."""
    kind, content = ("svg+xml", svg) if len(svg) <= len(png) else ("png", png)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _write_bytes(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)
