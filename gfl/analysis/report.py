"""The report of an analysis: one HTML page that needs nothing else, and a PNG of each figure."""

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gfl.analysis import figures
from gfl.analysis.analysis import Analysis
from gfl.analysis.edges import Calibration, calibrate, interval_check
from gfl.analysis.error_types import KINDS, MEANING
from gfl.analysis.gallery import Picture
from gfl.evaluation.bootstrap import Gain
from gfl.evaluation.coco_eval import CERTAIN, format_statistic

TEMPLATE = "report.html.jinja"

DPI = 110

LEVEL = 0.9
"""Probability of the edge intervals that the report shows."""

SIZES = (
    ("small, under 32 px", 0, 32**2),
    ("medium", 32**2, 96**2),
    ("large, from 96 px", 96**2, 1e10),
)
"""COCO's ranges of the objects' areas, in px."""


@dataclass(frozen=True)
class Report:
    """What a report shows.

    Attributes:
        title: Name of the model.
        facts: What was measured, on what, and how, by name.
        classes: Class names, by label.
        analysis: The analysis.
        errors: Pictures of each kind of error.
        worst: The images with the lowest F1.
        edges: Pictures of each form of edge distributions.
        other: Name of another model that is compared, if there is one.
        gain: AP of this model less that of the other.
    """

    title: str
    facts: Mapping[str, str]
    classes: Sequence[str]
    analysis: Analysis
    errors: Mapping[str, Sequence[Picture]]
    worst: Sequence[Picture]
    edges: Mapping[str, Sequence[Picture]]
    other: str = ""
    gain: Gain | None = None


@dataclass(frozen=True)
class _Drawing:
    """A figure with its file's name, heading and explanation."""

    name: str
    title: str
    caption: str
    figure: Figure | None = field(repr=False)


def render_report(report: Report) -> dict[str, bytes]:
    """Return the files of a report by name: `report.html`, and a PNG of each figure."""
    files: dict[str, bytes] = {}
    sources = []
    with figures.style(), warnings.catch_warnings():
        # A PNG shows the names that matplotlib's font can; the page shows all.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        drawings = [drawing for drawing in _draw(report) if drawing.figure]
        for drawing in drawings:
            files[f"{drawing.name}.png"] = _rendered(drawing.figure, "png")
            svg = base64.b64encode(_rendered(drawing.figure, "svg")).decode()
            sources.append(f"data:image/svg+xml;base64,{svg}")
    page = _page(report, list(zip(drawings, sources, strict=True)))
    return {"report.html": page.encode(), **files}


def _draw(report: Report) -> list[_Drawing]:
    analysis, classes = report.analysis, report.classes
    return [
        _Drawing(
            "errors", "What errors cost",
            "AP at an IoU of 0.5 that correcting all errors of a kind would add, each alone.",
            figures.draw_error_costs(analysis.errors),
        ),
        _Drawing(
            "ap_by_iou", "AP by IoU",
            "A steep fall means that objects are found but not placed well.",
            figures.draw_ap_by_iou(analysis.evaluation.ap_by_iou),
        ),
        _Drawing(
            "precision_recall", "Precision and recall",
            "Classes with the most objects, at an IoU of 0.5.",
            figures.draw_precision_recall(analysis, classes),
        ),
        _Drawing(
            "f1", "F1 by score",
            "Where to cut each class: the dot is the best F1.",
            figures.draw_f1(analysis, classes),
        ),
        _Drawing(
            "confusion", "Confusion",
            f"Detections with a score of at least {CERTAIN}; colours are shares of a row.",
            figures.draw_confusion(analysis.confusion, classes),
        ),
        _Drawing(
            "reliability", "Scores",
            f"Expected calibration error {analysis.reliability.error:.3f}.",
            figures.draw_reliability(analysis.reliability),
        ),
        _Drawing(
            "edge_calibration", "Uncertainty of edges",
            "Errors of edges in ten groups by their sigma. Above the dashed line, edges are less "
            "certain than the model says.",
            figures.draw_edge_calibration(analysis.edges),
        ),
    ]  # fmt: skip


def _rendered(figure: Figure | None, kind: str) -> bytes:
    assert figure
    content = io.BytesIO()
    figure.savefig(content, format=kind, dpi=DPI, metadata={"Date": None} if kind == "svg" else {})
    return content.getvalue()


def edge_table(report: Report) -> dict[str, Calibration]:
    """Return the calibration of edges of all objects, of each size, and of each class."""
    edges = report.analysis.edges
    groups = {"all": np.ones(len(edges), bool)}
    groups |= {name: (edges.area >= low) & (edges.area < high) for name, low, high in SIZES}
    groups |= {name: edges.label == label for label, name in enumerate(report.classes)}
    return {name: calibrate(edges.select(keep)) for name, keep in groups.items() if keep.any()}


def _page(report: Report, drawings: Sequence[tuple[_Drawing, str]]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["statistic"] = format_statistic
    return environment.get_template(TEMPLATE).render(
        report=report,
        analysis=report.analysis,
        drawings=drawings,
        by_class=_class_table(report),
        edge_table=edge_table(report),
        level=LEVEL,
        interval=interval_check(report.analysis.edges, LEVEL),
        kinds=KINDS,
        meaning=MEANING,
    )


def _class_table(report: Report) -> list[dict[str, Any]]:
    """Return a row for each class: AP, number of objects, working point."""
    analysis = report.analysis
    counts = np.bincount(analysis.matches.object_label, minlength=len(report.classes)).tolist()
    return [
        {
            "name": name,
            "objects": counts[label],
            "ap": analysis.evaluation.ap_by_class[name],
            "point": analysis.best_f1[name],
        }
        for label, name in enumerate(report.classes)
    ]
