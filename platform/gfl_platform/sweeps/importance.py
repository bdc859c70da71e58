"""How much of the variance over a sweep each key explains: fANOVA (Hutter et al., 2014)."""

import logging
import warnings
from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

from gfl_platform.sweeps.analysis.statistics import direction
from gfl_platform.sweeps.formatting import distinct, identity, is_number
from gfl_platform.sweeps.schema import RangeConfig
from gfl_platform.sweeps.trials import SweepResults

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

FEWEST_TRIALS = 4


def parameter_importance(results: SweepResults) -> dict[str, float] | None:
    """Return the share of the first objective's variance by key, the greatest first.

    Shares add up to 1; a key with one value in all finished trials has 0.

    Returns:
        None when fewer than four trials finished, or when their figures are all alike.
    """
    objective = results.sweep.objectives[0]
    trials = [trial for trial in results.trials if trial.state == "finished"]
    trials = [trial for trial in trials if isfinite(trial.figures.get(objective, float("nan")))]
    figures = [trial.figures[objective] for trial in trials]
    columns = {key: [trial.point.get(key) for trial in trials] for key in results.sweep.space}
    varied = {key: values for key, values in columns.items() if len(distinct(values)) > 1}
    if len(trials) < FEWEST_TRIALS or len(set(figures)) < 2 or not varied:
        return None
    encoded = {key: _encode(results.sweep.space[key], values) for key, values in varied.items()}
    found = dict.fromkeys(columns, 0.0) | _evaluate(encoded, figures, direction(objective))
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def _encode(asked: RangeConfig, values: Sequence[Any]) -> tuple[list[Any], "BaseDistribution"]:
    """Return values and their distribution as Optuna takes them.

    A list of numbers becomes their ranks: an order, without the gaps' widths as weights. Any other
    list becomes texts, for to Optuna True is 1.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if asked.bounds and all(map(is_number, values)):
        # The default is trained, too, and may be beyond the range.
        low, high = min(*values, asked.bounds[0]), max(*values, asked.bounds[1])
        if asked.int_uniform and all(float(value).is_integer() for value in values):
            return [int(value) for value in values], IntDistribution(int(low), int(high))
        log = asked.log_uniform is not None and low > 0
        return [float(value) for value in values], FloatDistribution(low, high, log=log)
    names = [identity(value) for value in distinct(values)]
    if all(map(is_number, values)):
        return [names.index(identity(v)) for v in values], IntDistribution(0, len(names) - 1)
    return [identity(value) for value in values], CategoricalDistribution(names)


def _evaluate(
    encoded: dict[str, tuple[list[Any], "BaseDistribution"]], figures: Sequence[float], sign: int
) -> dict[str, float]:
    logging.getLogger("optuna").setLevel(logging.WARNING)
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    distributions = {key: distribution for key, (_, distribution) in encoded.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(direction="maximize" if sign > 0 else "minimize")
        for number, value in enumerate(figures):
            params = {key: values[number] for key, (values, _) in encoded.items()}
            trial = optuna.create_trial(params=params, distributions=distributions, value=value)
            study.add_trial(trial)
        return get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
