"""The report of a sweep: one HTML page that needs nothing else, its pictures, and its numbers."""

import base64
import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

from gfl.files import write_atomically
from gfl_platform.sweeps.analysis.figures import Picture, draw_all, style
from gfl_platform.sweeps.analysis.statistics import PointSummary, seed_count
from gfl_platform.sweeps.analysis.verdicts import (
    CONFIDENCE,
    Analysis,
    analyse,
    cost_line,
    figure_of,
    warnings_of,
)
from gfl_platform.sweeps.formatting import (
    axis_name,
    label,
    overrides,
    point_label,
    shown,
    unit_of_difference,
)
from gfl_platform.sweeps.trials import SweepResults

COLUMNS = ("id", "stage", "state", "cause", "seed")

LAST_COLUMNS = ("seconds", "devices", "config_hash", "run_id", "checkpoint")


def trials_csv(results: SweepResults) -> str:
    """Return a table with a row for each trial; values of swept keys are texts or JSON."""
    keys = list(results.sweep.space)
    metrics = list(dict.fromkeys(name for trial in results.trials for name in trial.figures))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *keys, "epochs", *metrics, *LAST_COLUMNS])
    for trial in results.trials:
        values = [trial.point.get(key) for key in keys]
        writer.writerow(
            [
                *(getattr(trial, column) for column in COLUMNS),
                *(v if isinstance(v, str) else json.dumps(v, default=str) for v in values),
                trial.epochs,
                *(trial.figures.get(metric) for metric in metrics),
                *(getattr(trial, column) for column in LAST_COLUMNS),
            ]
        )
    return text.getvalue()


def results_json(analysis: Analysis) -> str:
    """Return all statistics and trials as JSON; NaN and infinity become null."""
    results = analysis.results
    content = {
        "name": results.name,
        "sweep": results.sweep.model_dump(mode="json"),
        "defaults": results.defaults,
        "device": results.device,
        "epochs": results.epochs,
        "cost": asdict(analysis.cost),
        "best": _point(analysis.best) if analysis.best else None,
        "points": [_point(point) for point in analysis.points],
        "verdicts": [asdict(verdict) for verdict in analysis.verdicts],
        "importance": analysis.importance,
        "pareto_front": [point.point for point in analysis.front],
        "identical": [
            {"seed": group.seed, "keys": group.keys, "trials": [trial.id for trial in group.trials]}
            for group in analysis.identical
        ],
        "published": [asdict(row) for row in analysis.published],
        "trials": [{**asdict(trial), "epochs": trial.epochs} for trial in results.trials],
    }
    return json.dumps(_finite(content), indent=1, default=str, allow_nan=False) + "\n"


def _point(point: PointSummary) -> dict[str, Any]:
    return {
        "point": point.point,
        "default": point.default,
        "seeds": point.seeds,
        "figures": {metric: asdict(spread) for metric, spread in point.figures.items()},
        "trials": [trial.id for trial in point.trials],
    }


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


TEMPLATE = "report.html.jinja"

DPI = 130

BEST_SHOWN = 10


def write_report(results: SweepResults, folder: Path) -> list[Path]:
    """Write report.html, results.json, trials.csv and a PNG of each figure; return the files."""
    analysis = analyse(results)
    pictures = draw_all(analysis)
    pngs: dict[str, bytes] = {}
    sources = []
    for picture in pictures:
        png = _render(picture, "png")
        pngs[re.sub(r"[^A-Za-z0-9._-]+", "_", picture.name) + ".png"] = png
        sources.append(_smaller(png, _render(picture, "svg")))
    files: dict[str, str | bytes] = {
        "report.html": render_html(analysis, pictures, sources),
        "results.json": results_json(analysis),
        "trials.csv": trials_csv(results),
        **pngs,
    }
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in files]


def render_html(analysis: Analysis, pictures: Sequence[Picture], sources: Sequence[str]) -> str:
    """Return the page; `sources` are the figures as URLs, in their order."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(label=label, point=point_label)
    environment.globals.update(
        shown=shown,
        axis_name=axis_name,
        figure_of=figure_of,
        unit_of_difference=unit_of_difference,
        seed_count=seed_count,
    )
    # The trials' number of workers: BatchNorm that trains depends on how many share a batch.
    where = {"cluster.workers": analysis.results.job.cluster.workers or 1}
    metrics = dict.fromkeys((*analysis.results.sweep.objectives, "AP", "AP50", "AP75", "fps"))
    return environment.get_template(TEMPLATE).render(
        analysis=analysis,
        results=analysis.results,
        sweep=analysis.results.sweep,
        keys=list(analysis.results.sweep.space),
        metrics=[m for m in metrics if any(m in point.figures for point in analysis.points)],
        warnings=warnings_of(analysis),
        reproduce=[overrides(analysis.best.point | where, seed) for seed in analysis.best.seeds[:1]]
        if analysis.best
        else [],
        figures=list(zip(pictures, sources, strict=True)),
        confidence=f"{CONFIDENCE:.0%}",
        best_shown=BEST_SHOWN,
        cost_line=cost_line(analysis),
        has_fps=any("fps" in trial.figures for trial in analysis.results.trials),
    )


def _render(picture: Picture, kind: str) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {}
    with style():
        picture.figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
    picture.figure.set_layout_engine("none")  # the layout is kept for a second rendering
    return buffer.getvalue()


def _smaller(png: bytes, svg: bytes) -> str:
    """Return the smaller of the two as a URL, for an `img` that keeps ids inside an SVG apart."""
    kind, content = ("svg+xml", svg) if len(svg) <= len(png) else ("png", png)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
