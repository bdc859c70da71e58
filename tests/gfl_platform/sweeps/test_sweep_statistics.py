"""What the trials of a sweep say together, against closed forms and loops."""

import math
import random

import pytest

from gfl_platform.config import JobConfig, PublishedConfig, RangeConfig, SweepConfig
from gfl_platform.sweeps import formatting
from gfl_platform.sweeps.analysis.statistics import (
    compare_published,
    cost,
    identical_trials,
    parameter_importance,
    pareto_front,
    ranking,
    summarize,
)
from gfl_platform.sweeps.analysis.verdicts import analyse, judge, t_interval
from gfl_platform.sweeps.trials import SweepResults, Trial

BETA = "loss.qfl.beta"
REG_MAX = "model.reg_max"


def sweep_of(space, trials, defaults=None, **asked):
    """Return the results of a sweep; a list of values is a grid."""
    ranges = {
        key: given if isinstance(given, RangeConfig) else RangeConfig(grid=tuple(given))
        for key, given in space.items()
    }
    job = JobConfig(sweep=SweepConfig(space=ranges, **asked))
    return SweepResults("beta", job, defaults or {BETA: 2.0}, "GPU", trials)


def trial(point, seed=0, ap=0.3, **given):
    """Return a finished trial at a value of beta or at a point."""
    point = point if isinstance(point, dict) else {BETA: point}
    figures = {"AP": ap, **given.pop("figures", {})}
    made = {"state": "finished", "curve": [(1, ap / 2), (2, ap)], "figures": figures, **given}
    return Trial(f"t{point}{seed}", point, seed, **made)


def seeds_of(aps_by_beta):
    return [
        trial(beta, seed, ap) for beta, aps in aps_by_beta.items() for seed, ap in enumerate(aps)
    ]


def test_a_value_has_one_identity_whatever_its_type():
    assert formatting.identity(2) == formatting.identity(2.0)
    assert formatting.identity([1, (2,)]) == formatting.identity((1.0, [2]))
    assert formatting.identity({"a": 1, "b": 2}) == formatting.identity({"b": 2, "a": 1})
    assert len({formatting.identity(value) for value in (True, 1, "1", None, "null", [1])}) == 6


def test_keys_are_shortened_as_far_as_they_stay_apart():
    names = formatting.short_names(["loss.qfl.beta", "optim.beta", "optim.lr"])
    assert names == {
        "loss.qfl.beta": "qfl.beta",
        "optim.beta": "optim.beta",
        "optim.lr": "lr",
    }


def test_overrides_are_read_back_by_the_loader():
    import shlex

    from gfl.config.loader import derive

    point = {"optim.lr": 1e-05, "storage.root": "a b", "data.long_side": 1400}
    words = shlex.split(formatting.overrides(point, seed=7))
    job = derive(JobConfig, JobConfig(), words)
    assert (job.optim.lr, job.storage.root, job.data.long_side, job.seed) == (
        1e-05,
        "a b",
        1400,
        7,
    )


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (None, "a.b=null"),
        (True, "a.b=true"),
        ("true", "'a.b='\"'\"'true'\"'\"''"),
        ((1, 2), "'a.b=[1, 2]'"),
        ({"x": 1}, "'a.b={x: 1}'"),
    ],
)
def test_overrides_keep_the_type_of_any_value(value, word):
    assert formatting.overrides({"a.b": value}, seed=0) == f"{word} seed=0"


def test_points_are_summarised_over_the_seeds_of_finished_trials():
    stopped = trial(2, 2, 0.9, state="stopped early")
    results = sweep_of({BETA: [1, 2]}, [trial(2, 0, 0.3), trial(2.0, 1, 0.4), trial(1), stopped])
    default, other = summarize(results)
    assert default.default
    assert default.seeds == (0, 1)
    assert default.figures["AP"].mean == pytest.approx(0.35)
    assert default.figures["AP"].sd == pytest.approx(0.1 / math.sqrt(2))
    assert other.figures["AP"].sd is None
    assert "fps" not in other.figures
    assert analyse(results).unfinished == [stopped]


def test_nan_figures_and_repeated_seeds_do_not_count_twice():
    trials = [trial(2, 0, 0.2), trial(2, 0, 0.4), trial(2, 1, 0.6), trial(2, 2, math.nan)]
    (point,) = summarize(sweep_of({BETA: [2]}, trials))
    assert point.figures["AP"].seeds == 2
    assert point.figures["AP"].mean == pytest.approx((0.3 + 0.6) / 2)


def test_a_lucky_single_seed_comes_after_points_of_several():
    results = sweep_of({BETA: [1, 2]}, [*seeds_of({2: [0.3, 0.31]}), trial(1, 0, 0.9)])
    assert [point.point[BETA] for point in ranking(results, summarize(results))] == [2, 1]


def test_lower_latency_is_better():
    trials = [trial(beta, figures={"latency_ms": ms}) for beta, ms in ((1, 20.0), (2, 10.0))]
    results = sweep_of({BETA: [1, 2]}, trials, objectives=("latency_ms",))
    assert [point.point[BETA] for point in ranking(results, summarize(results))] == [2, 1]


def test_the_interval_of_two_differences_has_a_closed_form():
    # With one degree of freedom t's quantile is tan(pi (p - 1/2)).
    low, high = t_interval([1.0, 3.0])
    reach = math.tan(math.pi * 0.475) * math.sqrt(2) / math.sqrt(2)
    assert (low, high) == pytest.approx((2 - reach, 2 + reach))
    low, high = t_interval([1.0, 3.0], comparisons=5)
    assert high - 2 == pytest.approx(math.tan(math.pi * 0.495))


def test_the_interval_of_three_differences_has_a_closed_form():
    # With two degrees of freedom it is (2p - 1) sqrt(2 / (1 - (2p - 1)^2)).
    differences = [0.0, 1.0, 2.0]
    quantile = 0.95 * math.sqrt(2 / (1 - 0.95**2))
    assert t_interval(differences)[1] == pytest.approx(1 + quantile / math.sqrt(3))


def test_differences_are_paired_over_seeds_and_averaged_over_the_same_settings():
    figures = {  # (beta, reg_max, seed): AP
        (2, 8, 0): 0.30,
        (2, 16, 0): 0.32,
        (2, 8, 1): 0.40,
        (1, 8, 0): 0.31,
        (1, 16, 0): 0.36,
        (1, 8, 1): 0.42,
        (1, 16, 1): 0.99,  # has no partner: this setting counts for neither seed
    }
    trials = [trial({BETA: b, REG_MAX: r}, seed, ap) for (b, r, seed), ap in figures.items()]
    space = {BETA: [1, 2], REG_MAX: [8, 16]}
    verdict = judge(sweep_of(space, trials, {BETA: 2, REG_MAX: 16}))[0]
    (comparison,) = verdict.comparisons
    assert comparison.value == 1
    assert comparison.differences == pytest.approx({0: 0.01, 1: 0.02})
    assert comparison.interval == pytest.approx(t_interval([0.01, 0.02]))


@pytest.mark.parametrize(
    ("aps", "kind"),
    [
        ({2: [0.30, 0.31, 0.32], 1: [0.40, 0.411, 0.419]}, "better than the default"),
        ({2: [0.30, 0.31, 0.32], 1: [0.20, 0.211, 0.219]}, "best"),
        ({2: [0.30, 0.31, 0.32], 1: [0.33, 0.29, 0.32]}, "within noise of the default"),
        ({2: [0.30, 0.31, 0.32], 1: [0.2, 0.211, 0.219], 4: [0.1]}, "too few seeds to say"),
        ({2: [0.3, 0.31, 0.32], 1: [0.33, 0.29, 0.32], 4: [0.9]}, "too few seeds to say"),
        ({2: [0.3, 0.31, 0.32], 1: [0.33, 0.29, 0.32], 4: [0.1]}, "within noise of the default"),
        ({2: [0.30], 1: [0.40]}, "too few seeds to say"),
        ({2: [0.30, 0.31]}, "nothing to compare with"),
        ({1: [0.30, 0.31]}, "the default was not tried"),
        ({}, "the default was not tried"),
    ],
)
def test_the_verdict_on_a_key(aps, kind):
    (verdict,) = judge(sweep_of({BETA: [1, 2, 4]}, seeds_of(aps)))
    assert verdict.kind == kind
    assert verdict.text.startswith(kind)


def test_a_verdict_says_what_it_leaves_out():
    aps = {2: [0.3, 0.31, 0.32], 1: [0.33, 0.29, 0.32], 4: [0.1]}
    (verdict,) = judge(sweep_of({BETA: [1, 2, 4]}, seeds_of(aps)))
    assert verdict.text.endswith("; 1 of 2 others have too few seeds")
    trials = [*seeds_of(aps), trial(1, 3, state="nan")]
    lost = {p.point[BETA]: p.lost for p in summarize(sweep_of({BETA: [1, 2, 4]}, trials))}
    assert lost == {2: 0, 1: 1, 4: 0}


def test_a_default_that_failed_was_tried():
    trials = [trial(2, state="failed"), trial(1)]
    assert (
        judge(sweep_of({BETA: [1, 2]}, trials))[0].kind == "no training with the default finished"
    )


def test_the_verdict_names_value_difference_interval_and_seeds():
    (verdict,) = judge(sweep_of({BETA: [1, 2]}, seeds_of({2: [0.3, 0.3], 1: [0.41, 0.43]})))
    reach = 100 * math.tan(math.pi * 0.475) * 0.01
    low, high = f"{12 - reach:+.2f}", f"{12 + reach:+.2f}"
    assert verdict.text.endswith(f": 1 by +12.00 [{low}, {high}] AP points, 2 seeds")


def test_more_comparisons_make_wider_intervals():
    one = {2: [0.3, 0.31, 0.32], 1: [0.33, 0.345, 0.35]}
    (alone,) = judge(sweep_of({BETA: [1, 2]}, seeds_of(one)))
    (among,) = judge(sweep_of({BETA: [1, 2, 4]}, seeds_of({**one, 4: [0.2, 0.21, 0.23]})))
    assert among.comparisons[0].interval[0] < alone.comparisons[0].interval[0]
    differences = list(alone.comparisons[0].differences.values())
    assert among.comparisons[0].interval == pytest.approx(t_interval(differences, 2))


def test_a_higher_latency_is_worse():
    trials = [
        trial(beta, seed, figures={"latency_ms": base + seed})
        for beta, base in ((2, 10.0), (1, 20.0))
        for seed in range(3)
    ]
    (verdict,) = judge(sweep_of({BETA: [1, 2]}, trials, objectives=("latency_ms",)))
    assert verdict.kind == "best"
    assert verdict.comparisons[0].kind == "worse than the default"


def test_a_range_is_judged_by_its_best_point_as_a_whole():
    space = {"optim.lr": RangeConfig(log_uniform=(1e-4, 1e-1)), BETA: [1, 2]}
    default = {"optim.lr": 0.01, BETA: 2}
    best = {"optim.lr": 0.02, BETA: 1}
    trials = [trial(default, seed, 0.3 + seed / 100) for seed in range(3)]
    trials += [trial(best, seed, 0.4 + seed / 99) for seed in range(3)]
    *_, whole = judge(sweep_of(space, trials, default))
    assert whole.keys == ("optim.lr", BETA)
    assert whole.kind == "better than the default"
    assert "lr 0.02, beta 1 by +10.0" in whole.text
    *_, whole = judge(sweep_of(space, trials, best))
    assert whole.kind == "best"


def test_the_front_is_that_of_a_loop_over_all_pairs():
    rng = random.Random(0)
    for _ in range(20):
        pairs = [(rng.randint(1, 6) / 10, float(rng.randint(1, 6))) for _ in range(12)]
        trials = [trial(beta, 0, ap, figures={"fps": f}) for beta, (ap, f) in enumerate(pairs)]
        points = summarize(sweep_of({BETA: range(12)}, [*trials, trial(99)]))
        expected = {
            beta
            for beta, (ap, fps) in enumerate(pairs)
            if not any(a >= ap and f >= fps and (a, f) != (ap, fps) for a, f in pairs)
        }
        assert {point.point[BETA] for point in pareto_front(points)} == expected


def test_the_cost_is_added_up_by_hand():
    key = "schedule.epochs"
    space = {key: [2, 4]}
    curve = [(1, 0.1)]
    trials = [
        trial({key: 2}, seconds=1800, devices=2),
        trial({key: 4}, seconds=900, devices=2, state="stopped early", curve=curve),
        trial({key: 4}, seconds=900, devices=2, state="failed", curve=[]),
        trial({key: 2}, 1, seconds=3600, devices=1, stage="finalists"),
    ]
    found = cost(sweep_of(space, trials, {key: 2}))
    assert found.states == {"finished": 2, "stopped early": 1, "failed": 1}
    assert found.device_hours == pytest.approx(1 + 0.5 + 0.5 + 1)
    assert (found.epochs, found.full_epochs) == (2 + 1 + 0, 2 + 4 + 4)
    assert found.saved == pytest.approx(3 / 10)  # what a failure leaves out is no saving
    assert (found.finalist_trials, found.finalist_epochs) == (1, 2)
    assert found.finalist_device_hours == pytest.approx(1)
    nothing = cost(sweep_of(space, [], {key: 2}))
    assert (nothing.full_epochs, nothing.saved) == (0, 0.0)


def test_identical_curves_of_different_points_are_found():
    same = [trial({BETA: beta, REG_MAX: 8}, 0, 0.3) for beta in (1, 2)]
    others = [
        trial({BETA: 1, REG_MAX: 8}, 1, 0.3),  # another seed
        trial({BETA: 4, REG_MAX: 8}, 0, math.nextafter(0.3, 1)),
        trial({BETA: 0, REG_MAX: 8}, 0, 0.3, state="stopped early"),
        trial({BETA: 5, REG_MAX: 8}, 2, 0.0),
        trial({BETA: 6, REG_MAX: 8}, 2, 0.0),  # zero throughout is no evidence
    ]
    space = {BETA: [1, 2], REG_MAX: [8]}
    (group,) = identical_trials(sweep_of(space, same + others, {BETA: 2, REG_MAX: 8}))
    assert (group.seed, group.keys, list(group.trials)) == (0, (BETA,), same)


def test_the_key_that_moves_the_figure_is_the_important_one():
    space = {
        BETA: [0, 1, 2, 4],
        "data.flip": [True, 1, "1", None],
        "optim.lr": RangeConfig(log_uniform=(0.001, 0.1)),
    }
    rng = random.Random(0)
    trials = [
        trial({BETA: b, "data.flip": f, "optim.lr": 10 ** rng.uniform(-3, -1)}, 0, 0.3 + b / 100)
        for b in space[BETA]
        for f in space["data.flip"]
    ]
    results = sweep_of(space, trials, {BETA: 2, "data.flip": True, "optim.lr": 0.0})
    found = parameter_importance(results)
    assert next(iter(found)) == BETA
    assert found[BETA] > 0.9
    assert sum(found.values()) == pytest.approx(1)
    assert parameter_importance(results) == found
    trials[0].point["optim.lr"] = 0.0  # a default beyond the range, and beyond its logarithm
    assert parameter_importance(results)[BETA] > 0.9


def test_importance_needs_trials_that_differ():
    assert parameter_importance(sweep_of({BETA: [1, 2]}, [trial(1), trial(2, ap=0.4)])) is None
    alike = [trial(beta, 0, 0.3) for beta in range(6)]
    assert parameter_importance(sweep_of({BETA: range(6)}, alike)) is None
    one_point = [trial(2, seed, 0.3 + seed / 100) for seed in range(6)]
    assert parameter_importance(sweep_of({BETA: [2]}, one_point)) is None


def test_a_figure_without_ground_truth_is_none():
    rows = ({"at": {BETA: 2}, "figures": {"AP": 39.9, "APl": 51.0}},)
    published = PublishedConfig(source="paper", rows=rows)
    trials = [trial(2, seed, 0.25, figures={"APl": -1.0}) for seed in (0, 1)]
    results = sweep_of({BETA: [1, 2]}, trials, published=published, objectives=("AP", "APl"))
    (row,) = compare_published(results)
    assert row.ours == {"AP": 25.0}
    assert row.our_difference == {"AP": 0.0}
    (point,) = summarize(results)
    assert "APl" not in point.figures


def test_published_differences_stand_beside_ours():
    rows = [{"at": {BETA: b}, "figures": {"AP": ap}} for b, ap in ((1, 39.0), (2, 39.9), (4, 38))]
    published = PublishedConfig(source="paper", rows=tuple(rows))
    trials = seeds_of({2: [0.30, 0.32], 1: [0.29]})
    low, reference, missing = compare_published(
        sweep_of({BETA: [1, 2, 4]}, trials, published=published)
    )
    assert reference.reference
    assert reference.ours == pytest.approx({"AP": 31.0})
    assert low.ours == pytest.approx({"AP": 29.0})
    assert low.paper_difference == pytest.approx({"AP": -0.9})
    assert low.our_difference == pytest.approx({"AP": -1.0})  # with seed 0 alone
    assert (low.seeds, missing.seeds, missing.ours) == (1, 0, {})
    other = sweep_of({BETA: [1, 2, 4]}, trials, {BETA: 3}, published=published)
    assert [row.reference for row in compare_published(other)] == [True, False, False]
