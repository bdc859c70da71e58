"""The report of a sweep: one HTML page that needs nothing else, its pictures, and its numbers."""

import base64
import csv
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

from gfl_platform.storage.files import write_atomically
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
    """Return a row for each trial; values of keys that are no text or number are JSON."""
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


def results_json(found: Analysis) -> str:
    """Return all statistics and trials; what is no number, such as NaN, is null."""
    results = found.results
    content = {
        "name": results.name,
        "sweep": results.sweep.model_dump(mode="json"),
        "defaults": results.defaults,
        "device": results.device,
        "epochs": results.epochs,
        "cost": asdict(found.cost),
        "best": _point(found.best) if found.best else None,
        "points": [_point(point) for point in found.points],
        "verdicts": [asdict(verdict) for verdict in found.verdicts],
        "importance": found.importance,
        "pareto_front": [point.point for point in found.front],
        "identical": [
            {"seed": group.seed, "keys": group.keys, "trials": [trial.id for trial in group.trials]}
            for group in found.identical
        ],
        "published": [asdict(row) for row in found.published],
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
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not isfinite(value) else value


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
    environment.globals.update(unit_of_difference=unit_of_difference, seed_count=seed_count)
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
