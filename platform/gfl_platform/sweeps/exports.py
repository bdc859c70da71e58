"""A sweep's trials and statistics for programs: JSON and CSV, figures as measured, AP up to 1."""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from math import isfinite
from typing import Any

from gfl_platform.sweeps.analysis.analysis import Analysis
from gfl_platform.sweeps.analysis.statistics import PointSummary
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
