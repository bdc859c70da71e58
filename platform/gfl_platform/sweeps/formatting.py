"""Values of swept keys, and figures: when two values are the same, and how they are written."""

import json
import shlex
from collections.abc import Iterable, Mapping
from math import inf
from numbers import Real
from typing import Any

import yaml

UNITS = {"fps": "images/s", "latency_ms": "ms"}
"""Of figures that are no share; the others are printed in percent, as papers do."""

NAMES = {"fps": "FPS", "latency_ms": "latency"}


def identity(value: Any) -> str:
    """Return a text that two values share if they are the same to a configuration.

    2 and 2.0 are, and a list and a tuple; True and 1 are not.
    """
    return json.dumps(_plain(value), sort_keys=True)


def _plain(value: Any) -> Any:
    if is_number(value):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, bool | str) else str(value)


def is_number(value: Any) -> bool:
    """Return whether `value` has a place on a numeric axis."""
    return isinstance(value, Real) and not isinstance(value, bool)


def distinct(values: Iterable[Any]) -> list[Any]:
    """Return the values without repetitions: numbers by size, others as they come."""
    found = list({identity(value): value for value in values}.values())
    return sorted(found) if all(map(is_number, found)) else found


def label(value: Any, longest: int = 40) -> str:
    """Return `value` for a reader: four digits of a fraction, `longest` characters at most."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Return the shortest ends of dotted keys that tell them apart: `beta` of `loss.qfl.beta`."""
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
    """Return what a shell passes to a job to train at a point: `loss.qfl.beta=2.5 seed=1`."""
    words = []
    for key, value in {**point, "seed": seed}.items():
        plain = list(value) if isinstance(value, tuple) else value
        # The text of a bare scalar ends in a document marker.
        text = yaml.safe_dump(plain, default_flow_style=True, width=inf, sort_keys=False)
        words.append(shlex.quote(f"{key}={text.removesuffix('...' + chr(10)).strip()}"))
    return " ".join(words)


def factor(metric: str) -> float:
    """Return what a figure is multiplied with to be printed."""
    return 1.0 if metric in UNITS else 100.0


def axis_name(metric: str) -> str:
    """Return the name of a figure with its unit: `AP, %`."""
    return f"{NAMES.get(metric, metric)}, {UNITS.get(metric, '%')}"


def shown(metric: str, value: float, *, sign: bool = False) -> str:
    """Return a figure or, with its sign, a difference of two, as it is printed."""
    value = value * factor(metric)
    return f"{value:+.2f}" if sign else f"{value:.2f}"


def unit_of_difference(metric: str) -> str:
    """Return the unit of a difference: points of AP, for 40 % and 41 % are no percent apart."""
    return UNITS.get(metric, f"{metric} points")
