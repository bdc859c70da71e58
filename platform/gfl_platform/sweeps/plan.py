"""Which trials a sweep runs: those of a list, or points that Optuna draws.

Ray Tune asks for one trial after the other. The identity of a trial is ours, so that after any
interruption the same trial goes on in the same folder and the same MLflow run, whatever Tune
remembers: all that a sweep knows is in its trials' own files (`results.py`).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray.tune.search import Searcher

from gfl_platform.sweeps.results import Point, Stage, Trial
from gfl_platform.sweeps.schema import RangeConfig, SweepConfig

MINIMISED = ("latency_ms",)
ENDED = ("finished", "stopped early", "nan", "out of budget")
"""States in which a resumed sweep leaves a trial; `failed` ones it tries again."""


@dataclass(frozen=True)
class Planned:
    """A trial to run; its fields are the `config` of Tune's trial."""

    id: str
    point: Point
    seed: int
    stage: Stage


class ListedTrials(Searcher):
    """Gives Tune the trials of a list, in its order."""

    def __init__(self, trials: Sequence[Planned]) -> None:
        super().__init__()
        self._left = list(trials)

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial's configuration."""
        return vars(self._left.pop(0)) if self._left else Searcher.FINISHED

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing depends on it."""


class DrawnTrials(Searcher):
    """Gives Tune points that Optuna draws, from what it knows of those before.

    A resumed study is made from the trials' records: the finished ones with their figures, the
    stopped ones as pruned; those that were running come first. A new one starts with the default.
    """

    def __init__(self, sweep: SweepConfig, default: Point, seed: int, known: list[Trial]) -> None:
        import optuna

        super().__init__()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._sweep, self._seed = sweep, seed
        self._ranges = {key: _distribution(values) for key, values in sweep.space.items()}
        samplers = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
        self._study = optuna.create_study(
            sampler=samplers[sweep.search.name](seed=sweep.search.seed + len(known)),
            directions=[
                "minimize" if name in MINIMISED else "maximize" for name in sweep.objectives
            ],
        )
        for trial in known:
            if trial.state in ENDED:
                self._study.add_trial(self._as_optuna(trial))
        unfinished = [trial for trial in known if trial.state not in ENDED]
        self._unfinished = [trial.id for trial in unfinished]
        first = [trial.point for trial in unfinished] if known else [default]
        for point in first:
            params = _params(sweep, point)
            if params.keys() == sweep.space.keys():  # else the default is outside the range
                self._study.enqueue_trial(params)
        self._numbers = iter(range(len(known), sweep.budget.trials or 0))
        self._asked: dict[str, Any] = {}

    def suggest(self, trial_id: str) -> Any:
        """Draw a point."""
        name = self._unfinished.pop(0) if self._unfinished else self._next_name()
        if name is None:
            return Searcher.FINISHED
        asked = self._study.ask(self._ranges)
        self._asked[trial_id] = asked
        point = {key: _value(self._sweep.space[key], asked.params[key]) for key in self._ranges}
        return vars(Planned(name, point, self._seed, "search"))

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Note an epoch, which counts if the trial is stopped after it."""
        if len(self._sweep.objectives) == 1 and "final" not in result:
            self._asked[trial_id].report(result[self._sweep.objectives[0]], result["epoch"])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Note how a trial ended."""
        from optuna.trial import TrialState

        asked = self._asked.pop(trial_id)
        result = result or {}
        if result.get("final") == "finished":
            self._study.tell(asked, [result[name] for name in self._sweep.objectives])
        elif error or "final" in result:
            self._study.tell(asked, state=TrialState.FAIL)
        else:
            self._study.tell(asked, state=TrialState.PRUNED)

    def _next_name(self) -> str | None:
        number = next(self._numbers, None)
        return None if number is None else trial_name(number)

    def _as_optuna(self, trial: Trial) -> Any:
        import optuna

        state = optuna.trial.TrialState
        states = {"finished": state.COMPLETE, "nan": state.FAIL}
        done = trial.state == "finished"
        single = len(self._sweep.objectives) == 1
        return optuna.trial.create_trial(
            state=states.get(trial.state, state.PRUNED),
            params=_params(self._sweep, trial.point),
            distributions=self._ranges,
            values=[trial.figures[name] for name in self._sweep.objectives] if done else None,
            intermediate_values=dict(trial.curve) if single else None,
        )


def trial_name(number: int) -> str:
    """Return the identity of the trial with this number."""
    return f"{number:03d}"


def _distribution(values: RangeConfig) -> Any:
    from optuna import distributions as d

    if values.values is not None:
        return d.CategoricalDistribution(range(len(values.values)))
    if values.int_uniform:
        return d.IntDistribution(*values.int_uniform)
    assert values.bounds is not None
    return d.FloatDistribution(*values.bounds, log=values.log_uniform is not None)


def _value(values: RangeConfig, drawn: Any) -> Any:
    """Return the value that Optuna's `drawn` stands for; six digits of a real number suffice."""
    if values.values is not None:
        return values.values[drawn]
    if values.int_uniform:
        return drawn
    assert values.bounds is not None
    low, high = values.bounds
    return min(max(float(f"{drawn:.6g}"), low), high)


def _params(sweep: SweepConfig, point: Point) -> dict[str, Any]:
    """Return Optuna's parameters of a point, without keys whose value is outside their range."""
    params = {}
    for key, values in sweep.space.items():
        value = point[key]
        if values.values is None:
            assert values.bounds is not None
            if isinstance(value, int | float) and values.bounds[0] <= value <= values.bounds[1]:
                params[key] = value
        elif value in values.values:
            params[key] = [json.dumps(v) for v in values.values].index(
                json.dumps(next(v for v in values.values if v == value))
            )
    return params
