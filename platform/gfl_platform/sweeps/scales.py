"""Where the values of a swept key lie on an axis of a figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log10
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from gfl_platform.sweeps.formatting import distinct, identity, is_number, label
from gfl_platform.sweeps.schema import RangeConfig

LOG_RATIO = 50
"""A list of positive numbers so far apart is drawn on a logarithmic axis."""

LONGEST_TICK = 16


@dataclass(frozen=True)
class Scale:
    """An axis of a key's values.

    Attributes:
        kind: Numbers lie linearly or by their logarithm; other values evenly, in their order.
        values: All different ones; numbers by size.
    """

    kind: Literal["linear", "log", "categorical"]
    values: list[Any]

    def position(self, value: Any) -> float:
        """Return where a value lies."""
        if self.kind == "categorical":
            return [identity(each) for each in self.values].index(identity(value))
        return float(value)

    def beside(self, value: Any, share: float) -> float:
        """Return a position next to a value, a share of the axis away."""
        if self.kind == "categorical":
            return self.position(value) + share * len(self.values)
        low, high = float(self.values[0]), float(self.values[-1])
        if self.kind == "log":
            return float(value) * (high / low) ** share
        return float(value) + share * (high - low)

    def apply(self, axes: Axes) -> None:
        """Set the scale and the ticks of the x axis: at the values if they are few."""
        if self.kind == "categorical":
            axes.set_xticks(range(len(self.values)), [tick(value) for value in self.values])
            return
        if self.kind == "log":
            axes.set_xscale("log")
        if len(self.values) <= 8 and self._room():
            axes.set_xticks(self.values, [tick(value) for value in self.values], minor=False)
            axes.set_xticks([], minor=True)
        elif self.kind == "log":
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.set_xticks([], minor=True)

    def _room(self) -> bool:
        """Whether no two values are so near that their ticks overlap."""
        at = [log10(value) if self.kind == "log" else float(value) for value in self.values]
        gaps = [second - first for first, second in pairwise(at)]
        return not gaps or min(gaps) > (at[-1] - at[0]) / 14


def scale_of(asked: RangeConfig, values: Sequence[Any]) -> Scale:
    """Return the axis for a key's values: those of the trials, and the default if it is drawn."""
    found = distinct(values)
    if not all(map(is_number, found)):
        drawn = {identity(value) for value in found}
        listed = [value for value in asked.values or () if identity(value) in drawn]
        return Scale("categorical", distinct([*listed, *found]))
    apart = asked.log_uniform or (asked.values and found[-1] >= LOG_RATIO * found[0])
    if apart and found[0] > 0:
        return Scale("log", found)
    return Scale("linear", found)


def tick(value: Any) -> str:
    """Return a value as short as a tick has to be."""
    return label(value, LONGEST_TICK)
