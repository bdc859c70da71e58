"""How values of swept keys and figures are compared and printed."""

import json
import shlex
from collections.abc import Iterable, Mapping
from math import inf
from numbers import Real
from typing import Any

import yaml

UNITS = {"fps": "images/s", "latency_ms": "ms"}
"""Units of the figures that are no share; all others are printed in percent, as papers do."""

NAMES = {"fps": "FPS", "latency_ms": "latency"}


def identity(value: Any) -> str:
    """Return a text that is equal for two values that mean the same in a configuration.

    2 and 2.0 mean the same, and so do a list and a tuple; True and 1 differ.
    """
    return json.dumps(_plain(value), sort_keys=True)


def _plain(value: Any) -> Any:
    if is_number(value):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | str) else str(value)


def is_number(value: Any) -> bool:
    """Return whether `value` has a place on a numeric axis."""
    return isinstance(value, Real) and not isinstance(value, bool)


def distinct(values: Iterable[Any]) -> list[Any]:
    """Return the values without repetitions, sorted if all are numbers."""
    unique = list({identity(value): value for value in values}.values())
    return sorted(unique) if all(map(is_number, unique)) else unique


def label(value: Any, longest: int = 40) -> str:
    """Return `value` for a reader, with four digits and `longest` characters at most."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Return the shortest unique ends of dotted keys: `beta` for `loss.qfl.beta`."""
    keys = list(keys)
    names = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
        others = [f".{other}" for other in keys if other != key]
        unique = (end for end in ends if not any(other.endswith(f".{end}") for other in others))
        names[key] = next(unique, key)
    return names


def point_label(point: Mapping[str, Any]) -> str:
    """Return a point for a reader: `beta 2.5, reg_max 16`."""
    names = short_names(point)
    return ", ".join(f"{names[key]} {label(value)}" for key, value in point.items())


def overrides(point: Mapping[str, Any], seed: int) -> str:
    """Return a job's arguments for a training at a point: `loss.qfl.beta=2.5 seed=1`."""
    words = []
    for key, value in {**point, "seed": seed}.items():
        plain = list(value) if isinstance(value, tuple) else value
        # The text of a bare scalar ends in a document marker.
        text = yaml.safe_dump(plain, default_flow_style=True, width=inf, sort_keys=False)
        words.append(shlex.quote(f"{key}={text.removesuffix('...' + chr(10)).strip()}"))
    return " ".join(words)


def factor(metric: str) -> float:
    """Return the factor by which a figure is multiplied before it is printed."""
    return 1.0 if metric in UNITS else 100.0


def axis_name(metric: str) -> str:
    """Return the name of a figure with its unit: `AP, %`."""
    return f"{NAMES.get(metric, metric)}, {UNITS.get(metric, '%')}"


def shown(metric: str, value: float, *, sign: bool = False) -> str:
    """Return a figure as it is printed; with its sign, if it is a difference of two."""
    value = value * factor(metric)
    return f"{value:+.2f}" if sign else f"{value:.2f}"


def unit_of_difference(metric: str) -> str:
    """Return the unit of a difference: points of AP, as 41 % is not 1 % more than 40 %."""
    return UNITS.get(metric, f"{metric} points")
