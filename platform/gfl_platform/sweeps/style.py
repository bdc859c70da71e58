"""How the figures of a report look: colours that the colour-blind tell apart, letters for a phone.

The colours are those of Okabe and Ito (2008); whatever one marks has a marker or a line of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PINK, AMBER, SKY, BLACK = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)
COLOURS = (BLUE, GREEN, PINK, AMBER, SKY, BLACK)
"""Of seeds; orange is the best's alone."""

MARKERS = "osD^vPX"
GREY = "#8A8A8A"
COLOUR_MAP = "cividis"
INCHES = (6.0, 4.2)

LETTERS = {
    "font.size": 14,
    "axes.labelsize": 14,
    "xtick.labelsize": 13,
    "ytick.labelsize": 13,
    "legend.fontsize": 12,
    "legend.framealpha": 0.85,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "svg.hashsalt": "gfl",
    "text.parse_math": False,  # a name with two $ is no formula
}


@dataclass(frozen=True)
class Picture:
    """A figure of the report.

    Attributes:
        name: Of its file, without a suffix.
        title: Heading above it.
        caption: What is drawn.
        figure: The figure itself.
    """

    name: str
    title: str
    caption: str
    figure: Figure


@contextmanager
def style() -> Iterator[None]:
    """Draw with the report's settings, whatever those of the process are."""
    with mpl.rc_context({**mpl.rcParamsDefault, **LETTERS}):
        yield


def canvas() -> tuple[Figure, Axes]:
    """Return an empty figure with its axes."""
    figure = Figure(figsize=INCHES, layout="constrained")
    return figure, figure.add_subplot()


def legend_above(axes: Axes, columns: int = 3) -> None:
    """Put the legend above the axes, where it hides nothing, if there is anything to explain."""
    handles, labels = axes.get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    if named:
        axes.legend(
            named.values(),
            named.keys(),
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=columns,
            frameon=False,
            borderaxespad=0.2,
            handletextpad=0.5,
            columnspacing=1.2,
        )
