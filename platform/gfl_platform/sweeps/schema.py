"""The `sweep:` section of a configuration."""

from math import inf
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from gfl.config.schema import Count, Positive, Section

_REAL = ((int, float), "numbers")  # a boolean is neither, and no text is read as a number


class RangeConfig(Section):
    """The values that a sweep tries for one key, in one of five forms."""

    model_config = ConfigDict(strict=False)  # a list is taken for a tuple

    grid: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    """Each of these values."""
    choice: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    """The same; the searchers that draw treat it alike."""
    uniform: tuple[float, float] | None = None
    """Between two numbers."""
    log_uniform: tuple[float, float] | None = None
    """Between two positive numbers, uniform in the logarithm."""
    int_uniform: tuple[int, int] | None = None
    """Integers between two, both included."""

    @field_validator("uniform", "log_uniform", "int_uniform", mode="before")
    @classmethod
    def _two_bounds(cls, bounds: Any, field: ValidationInfo) -> Any:
        if bounds is None:
            return None
        kinds, what = ((int,), "integers") if field.field_name == "int_uniform" else _REAL
        least = 0.0 if field.field_name == "log_uniform" else -inf
        two = isinstance(bounds, list | tuple) and len(bounds) == 2
        if not two or any(type(end) not in kinds for end in bounds):
            raise ValueError(f"got {bounds!r}: expected two {what}, [lowest, highest]")
        if not least < bounds[0] < bounds[1] < inf:
            positive = "positive " if least == 0 else ""
            raise ValueError(f"got {bounds!r}: expected {positive}bounds, [lowest, highest]")
        return bounds

    @model_validator(mode="after")
    def _one_form(self) -> "RangeConfig":
        if sum(value is not None for _, value in self) != 1:
            raise ValueError(f"expected one of {', '.join(type(self).model_fields)}")
        return self

    @property
    def values(self) -> tuple[Any, ...] | None:
        """All values, or None of a continuous or integer range."""
        return self.grid or self.choice

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Both ends of a range, or None of a list of values."""
        return self.uniform or self.log_uniform or self.int_uniform


def _dotted(space: Any) -> Any:
    """Return a space with dotted keys, which the command line's overrides nest; the last wins."""
    if not isinstance(space, dict):
        return space
    flat: dict[str, Any] = {}
    for key, value in space.items():
        if isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values()):
            flat |= {f"{key}.{below}": inner for below, inner in _dotted(value).items()}
        elif not isinstance(value, dict | RangeConfig):
            raise ValueError(
                f"sweep.space: {key}: got {value!r}: expected a range, such as {{grid: [1, 2]}}"
            )
        else:
            flat[key] = value
    return flat


class SearchConfig(Section):
    """Which points of the space a sweep tries, and in which order."""

    name: Literal["grid", "random", "tpe"] = "grid"
    """All of them; drawn at random; or drawn by Optuna's TPE, which learns from those before."""
    seed: Count = 0
    """Of what is drawn."""


class SchedulerConfig(Section):
    """Which trials a sweep stops before their last epoch."""

    name: Literal["none", "asha", "median"] = "none"
    """None; by successive halving (ASHA, Li et al., 2020); or those below the median of others."""
    grace_epochs: Positive = 1
    """No trial is stopped before."""
    reduction: Annotated[float, Field(gt=1)] = 3
    """Of ASHA: one of so many trials goes on from each rung; rungs are at its powers."""


class BudgetConfig(Section):
    """The most that a sweep's search may use; what runs then is stopped."""

    trials: Positive | None = None
    """Points drawn; a grid has all of its own."""
    epochs: Positive | None = None
    """Trained by all trials together."""
    hours: Annotated[float, Field(gt=0)] | None = None
    """Of wall time."""


class PublishedRow(Section):
    """What a paper reports for one point."""

    at: dict[str, Any]
    """Values of swept keys."""
    figures: dict[str, float]
    """By the names of our metrics, as the paper prints them: AP 40.2."""


class PublishedConfig(Section):
    """A paper's figures for the points of a sweep, printed beside ours."""

    source: str
    rows: tuple[PublishedRow, ...]


Objective = Literal["AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "fps", "latency_ms"]


class SweepConfig(Section):
    """A search over keys of the configuration; the resources of a trial are those of `cluster`."""

    space: Annotated[dict[str, RangeConfig], BeforeValidator(_dotted), Field(min_length=1)]
    """Keys, dotted or nested, and the values to try."""
    search: SearchConfig = SearchConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    objectives: tuple[Objective, ...] = ("AP",)
    """What is searched for, all at once; trials are stopped by the first. Lower latency is better,
    more of any other."""
    seeds: Positive = 1
    """Trainings of a point: with `seed`, `seed` + 1 and so on."""
    finalists: Positive | None = None
    """Points that are trained with all seeds, the best after the search; by default all points."""
    concurrency: Positive | None = None
    """Trials at once; by default as many as fit."""
    budget: BudgetConfig = BudgetConfig()
    published: PublishedConfig | None = None
