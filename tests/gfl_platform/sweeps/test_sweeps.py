"""Sweeps: what is tried, what is stopped, what is refused, what MLflow and the folder hold."""

import json
import math
import os
import subprocess
import sys
from itertools import count
from types import SimpleNamespace

import pytest

from gfl.config.loader import ConfigError, config_hash, dump_config, reproducible
from gfl_platform.cluster import launch, resources
from gfl_platform.cluster.event_queue import Events
from gfl_platform.cluster.events import (
    OfTrial,
    StepsDone,
    TrialEnded,
    TrialOutcome,
    TrialStarted,
    name_of,
)
from gfl_platform.config import load_job
from gfl_platform.storage.storage import RunFolder, Storage
from gfl_platform.sweeps.recorder import Recorder
from gfl_platform.sweeps.run import CONFIG_FILE, comparable, concurrency, free_names, run_sweep
from gfl_platform.sweeps.search import BudgetStopper, DrawnTrials, EarlyStopping
from gfl_platform.sweeps.space import check_data, check_sweep, default_point, trial_job
from gfl_platform.sweeps.trial import OUTCOME_FILE, TrialSettings, run_trial
from gfl_platform.sweeps.trials import (
    TRIAL_FILE,
    Planned,
    Trial,
    read_trial,
    trial_name,
    write_planned,
    write_trial,
)
from gfl_platform.tracking.metadata import require_same
from gfl_platform.tracking.spool import backlog
from gfl_platform.training import fit
from gfl_platform.training.worker import WorkerListener
from tests.support import dry_sweep
from tests.support.dry_sweep import dry_training
from tests.support.tracking import store_of

BETA, BINS = "loss.qfl.beta", "model.reg_max"
GRID = f"sweep.space={{{BETA}: {{grid: [0.5, 2, 3]}}, {BINS}: {{grid: [4, 8]}}}}"
DRAWN = f"sweep.space={{{BETA}: {{uniform: [1, 2.9]}}, {BINS}: {{int_uniform: [4, 16]}}}}"


def job_of(*overrides):
    return load_job("configs/demo.yaml", overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sweep={space: {loss.qfl.bta: {grid: [1, 2]}}}"],
         r"sweep\.space: loss\.qfl\.bta: unknown key; did you mean 'beta'\?"),
        (["sweep={space: {loss.qfl.beta: {grid: [1, -1]}}}"],
         r"sweep\.space: loss\.qfl\.beta: got -1"),
        (["sweep={space: {loss.qfl.beta: {uniform: [-1, 2]}}, search: {name: tpe}, "
          "budget: {trials: 3}}"], r"loss\.qfl\.beta: got -1"),
        (["sweep={space: {model.reg_max: {uniform: [4, 8.5]}}, search: {name: tpe}, "
          "budget: {trials: 3}}"], r"model\.reg_max takes integers: use int_uniform"),
        (["sweep={space: {loss.qfl.beta: {grid: [2]}}}"], r"sweep\.space has one point only"),
        (["sweep={space: {loss.qfl.beta: {grid: [2, 2]}}}"], r"a value is repeated"),
        ([DRAWN], r"loss\.qfl\.beta is no list of values, so there is no grid"),
        ([DRAWN, "sweep.search.name=tpe"], r"budget\.trials: how many points shall tpe draw\?"),
        ([GRID, "sweep.budget.trials=3"], r"a grid trains all of its points"),
        ([GRID, "sweep.scheduler.name=asha", "sweep.objectives=[fps]"],
         r"fps is never reported before the end; put AP first"),
        ([GRID, "sweep.objectives=[AP, AP]"], r"one is repeated"),
        ([GRID, "sweep.finalists=2"], r"finalists get more seeds"),
        (["sweep={space: {cluster.workers: {grid: [1, 2]}}}"], r"says how a job runs"),
        (["sweep={space: {schedule.epochs: {grid: [1, 2]}}, scheduler: {name: asha}}"],
         r"trials of different schedule\.epochs"),
        (["sweep={space: {seed: {grid: [1, 2]}}, seeds: 2}"], r"seed is swept already"),
        ([GRID, "sweep.published={source: x, rows: [{at: {optim.lr: 1}, figures: {AP: 1}}]}"],
         r"sweep\.published: optim\.lr is not in sweep\.space"),
        (["sweep={space: {data.short_side: {grid: [128, 256]}}}"], r"exceeds data\.long_side"),
        ([GRID, "sweep.objectives=[]"], r"sweep\.objectives: empty; name at least one"),
        ([], r"no sweep: section; see configs/sweeps/"),
    ],
)  # fmt: skip
def test_a_sweep_that_cannot_be_run_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        check_sweep(job_of(*overrides))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{uniform: [1]}", r"beta\.uniform: got \[1\]: expected two numbers, \[lowest, highest\]"),
        ("{uniform: [1, two]}", r"beta\.uniform: got \[1, 'two'\]: expected two numbers"),
        ("{uniform: [2, 1]}", r"beta\.uniform: got \[2, 1\]: expected bounds, \[lowest, highest\]"),
        ("{log_uniform: [0, 1]}", r"beta\.log_uniform: got \[0, 1\]: expected positive bounds"),
        ("{int_uniform: [1, 2.5]}", r"beta\.int_uniform: got \[1, 2\.5\]: expected two integers"),
        ("{}", r"sweep\.space\.loss\.qfl\.beta: expected one of grid, uniform"),
        ("{grid: [1], uniform: [2, 3]}", r"expected one of grid"),
        ("[1, 2]", r"loss\.qfl\.beta: got \[1, 2\]: expected a range, such as \{grid: \[1, 2\]\}"),
    ],
)  # fmt: skip
def test_a_range_without_its_bounds_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        job_of(f"sweep={{space: {{{BETA}: {values}}}}}")


def test_a_default_outside_the_range_is_warned_of(caplog):
    check_sweep(job_of("sweep.space={loss.qfl.beta: {grid: [1, 3]}}"))
    assert "loss.qfl.beta is 2.0 by default, which is outside the range" in caplog.text


def test_a_trial_is_the_configuration_with_its_values_and_nothing_else():
    job = job_of(GRID, "registry.name=x")
    trial = trial_job(job, {BETA: 1, BINS: 4}, 7)
    by_hand = job_of(f"{BETA}=1", f"{BINS}=4", "seed=7")
    assert reproducible(trial) == reproducible(by_hand)
    assert config_hash(trial) == config_hash(by_hand) != config_hash(job)
    assert trial.sweep is None
    assert trial.registry.name is None
    assert trial.cluster.workers == 1
    assert default_point(job) == {BETA: 2.0, BINS: 8}


def test_a_section_of_the_space_is_set_from_the_command_line():
    job = job_of(GRID, "sweep.space.loss.qfl.beta={grid: [1, 2]}")
    assert job.sweep.space[BETA].values == (1, 2)
    assert job.sweep.space[BINS].values == (4, 8)


def test_a_worker_that_trains_another_configuration_ends_the_run():
    job = job_of()
    check = fit.HashCheck(job)
    facts = {"config_hash": config_hash(job)}
    check.after_report(None, [facts, facts], None)
    with pytest.raises(launch.JobFailedError, match="worker 1 trains the configuration"):
        check.after_report(None, [facts, {"config_hash": "0" * 64}], None)


class FakeTrial:
    """What Ray Tune shows a scheduler of a trial."""

    def __init__(self, name):
        self.config = {"id": name}


@pytest.mark.parametrize("name", ["asha", "median"])
def test_early_stopping_decides_after_a_restart_as_if_there_had_been_none(name):
    sweep = job_of(GRID, f"sweep.scheduler={{name: {name}, reduction: 3}}").sweep
    curves = {
        trial_name(n): [(epoch, math.sin(7 * n) + epoch / 9) for epoch in range(1, 10)]
        for n in range(12)
    }

    def decisions(scheduler, names, start=1):
        found = {}
        for epoch in range(start, 10):
            for trial in names:
                if found.get(trial, ("CONTINUE",))[-1] == "CONTINUE":
                    value = curves[trial][epoch - 1][1]
                    result = {"epoch": epoch, "AP": value}
                    action = scheduler.on_trial_result(None, FakeTrial(trial), result)
                    found[trial] = (*found.get(trial, ()), action)
        return found

    def start(known):
        scheduler = EarlyStopping(sweep, 9, known)
        for trial in curves:
            scheduler.on_trial_add(None, FakeTrial(trial))
        return scheduler

    names = list(curves)
    undisturbed = start([])
    first = decisions(undisturbed, names[:6])
    rest = decisions(undisturbed, names[6:])
    assert "STOP" in str(rest)
    assert any(actions[-1] == "CONTINUE" for actions in rest.values())  # at its last epoch
    records = [
        Trial(trial, {}, 0, curve=curves[trial][: len(actions)]) for trial, actions in first.items()
    ]
    assert decisions(start(records), names[6:]) == rest


def test_a_restart_does_not_judge_curves_again_and_compares_new_trials_with_them():
    sweep = job_of(GRID, "sweep.scheduler.name=median").sweep
    # Side by side none was stopped; one after the other, the median is against the last ones.
    curves = [[(epoch, 0.9 - n / 10) for epoch in range(1, 6)] for n in range(6)]
    known = [Trial(trial_name(n), {}, 0, curve=curve) for n, curve in enumerate(curves)]
    scheduler = EarlyStopping(sweep, 9, known)
    decisions = {}
    for name, value in (("000", 0.95), ("006", 0.8), ("007", 0.2)):
        scheduler.on_trial_add(None, FakeTrial(name))
        epoch = 6 if name == "000" else 1
        result = {"epoch": epoch, "AP": value}
        decisions[name] = scheduler.on_trial_result(None, FakeTrial(name), result)
    assert decisions == {"000": "CONTINUE", "006": "CONTINUE", "007": "STOP"}


def test_the_searcher_keeps_its_history_and_takes_up_what_was_running():
    job = job_of(DRAWN, "sweep.search.name=tpe", "sweep.budget.trials=6", "seed=5")
    default = {BETA: 2.0, BINS: 8}
    noted = []
    searcher = DrawnTrials(job, [], map(trial_name, count()), noted.append, lambda: False)
    asked = [searcher.suggest(f"tune-{n}") for n in range(4)]
    assert [vars(planned) for planned in noted] == asked
    assert asked[0] == {"id": "000", "point": default, "seed": 5, "stage": "search"}
    assert all(1 <= a["point"][BETA] <= 2.9 and 4 <= a["point"][BINS] <= 16 for a in asked)
    searcher.on_trial_result("tune-0", {"AP": 0.5, "epoch": 1})
    searcher.on_trial_complete("tune-0", {"AP": 0.5, "epoch": 2, "final": "finished"})
    searcher.on_trial_result("tune-1", {"AP": 0.1, "epoch": 1})
    searcher.on_trial_complete("tune-1", {"AP": 0.1, "epoch": 1})  # stopped early
    known = [Trial(**a) for a in asked]
    known[0].state, known[0].figures, known[0].curve = "finished", {"AP": 0.5}, [(1, 0.5)]
    known[1].state, known[1].curve = "stopped early", [(1, 0.1)]
    known[2].state = "nan"
    again = DrawnTrials(job, known, map(trial_name, count(4)), noted.append, lambda: False)
    states = [trial.state.name for trial in again._study.trials]
    assert states == ["COMPLETE", "PRUNED", "FAIL", "WAITING"]
    assert again._study.best_trial.value == 0.5
    rest = [again.suggest(f"again-{n}") for n in range(4)]
    assert rest[0] == asked[3]
    assert [r["id"] for r in rest[:3]] == ["003", "004", "005"]
    assert rest[3] == "FINISHED"


def test_the_budget_counts_what_sessions_before_have_used():
    sweep = job_of(GRID, "sweep.budget={epochs: 10, hours: 1}").sweep
    stopper = BudgetStopper(sweep.budget, 8, 0.0, last_epoch=3)
    assert not stopper("x", {"epoch": 1, "AP": 0.1})
    assert not stopper("x", {"epoch": 1})  # of a node that was drained
    assert not stopper.used_up()
    assert stopper("x", {"epoch": 2, "AP": 0.1})
    assert stopper.used_up()
    assert not stopper("y", {"epoch": 3, "AP": 0.1})  # all that it had to do is done
    assert not stopper.stop_all()
    assert BudgetStopper(sweep.budget, 0, 3601, 3).stop_all()


def test_a_point_that_the_schema_refuses_is_drawn_again():
    job = job_of("sweep={space: {model.channels: {int_uniform: [32, 64]}}, search: {name: random}, "
                 "budget: {trials: 4}}")  # fmt: skip
    noted = []
    searcher = DrawnTrials(job, [], map(trial_name, count()), noted.append, lambda: False)
    while searcher.suggest(str(len(noted))) != "FINISHED":
        pass
    assert [planned.id for planned in noted] == ["000", "001", "002", "003"]
    assert all(planned.point["model.channels"] % 8 == 0 for planned in noted)


def test_figures_of_an_epoch_are_where_ray_tune_looks(tiny, monkeypatch):
    said = []
    monkeypatch.setattr("ray.train.report", lambda facts, **_: said.append(facts))
    monkeypatch.setattr("ray.train.get_context", lambda: SimpleNamespace(get_world_rank=lambda: 1))
    metrics = {"AP": 0.1, "AP50": 0.2}
    epoch = SimpleNamespace(epoch=1, step=2, metrics=metrics, config=tiny)
    WorkerListener(None, {}).on_epoch(epoch)
    assert said[0].items() >= {"AP": 0.1, "AP50": 0.2, "epoch": 1, "metrics": metrics}.items()


def test_a_cluster_that_grows_has_room_for_all_that_fit_at_most(monkeypatch):
    workers = resources.Workers(count=2, least=2, use_gpu=True, cpus=1)
    job = job_of(GRID)
    sweep = SimpleNamespace(workers=workers, job=job)
    monkeypatch.setattr("ray.cluster_resources", dict)
    for most, fits in (({"CPU": 64, "GPU": 8}, 4), ({"CPU": math.inf, "GPU": math.inf}, 16)):
        monkeypatch.setattr("gfl_platform.sweeps.run.most_resources", lambda _, m=most: (m, ""))
        assert concurrency(sweep) == fits


def test_a_trial_is_read_as_it_was_written(tmp_path):
    trial = Trial("007", {BETA: 1.5}, 3, curve=[(1, 0.25)], figures={"AP": 0.25}, cause="x")
    write_trial(tmp_path, trial)
    assert read_trial(tmp_path) == trial
    assert read_trial(tmp_path / "absent") is None


@pytest.mark.parametrize("damaged", [b"", b'{"id": "00', b"[]", b"\xff\0", b'{"id": "000"}'])
def test_a_damaged_record_is_rebuilt_with_one_warning(damaged, tmp_path, caplog):
    planned = Planned("000", {BETA: 1.5}, 3, "finalists")
    write_planned(tmp_path, planned)
    (tmp_path / TRIAL_FILE).write_bytes(damaged)
    assert read_trial(tmp_path) == Trial(**vars(planned))
    (warning,) = caplog.messages
    assert f"{tmp_path / TRIAL_FILE} is damaged" in warning


def test_a_record_that_cannot_be_rebuilt_ends_no_sweep_and_its_id_is_not_given_again(
    tmp_path, caplog
):
    job = job_of(DRAWN, "sweep.search.name=tpe", "sweep.budget.trials=2")
    folder = tmp_path / "trials"
    folder.joinpath("000").mkdir(parents=True)
    (folder / "000" / TRIAL_FILE).write_text("")
    recorder = Recorder(job, store_of(job), "s", folder, "0" * 32, 1, lambda *_: None)
    assert recorder.trials == {}
    (warning,) = caplog.messages
    assert f"{folder / '000' / TRIAL_FILE} is damaged" in warning
    names = free_names(folder, trial_name)
    searcher = DrawnTrials(job, [], names, recorder.plan, lambda: False)
    assert [searcher.suggest(f"{n}")["id"] for n in range(2)] == ["001", "002"]
    assert read_trial(folder / "001") == recorder.trials["001"]


@pytest.mark.parametrize("damaged", [b"", b"\0\0\0"])
def test_an_emptied_configuration_is_not_called_another_one_and_the_advice_works(damaged, tmp_path):
    job, path = comparable(job_of(GRID)), tmp_path / CONFIG_FILE
    path.write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"sweep\.yaml is empty, but held .* delete it"):
        require_same(path, job, "sweep")
    path.unlink()
    require_same(path, job, "sweep")
    require_same(path, job, "sweep")


@pytest.fixture(scope="module")
def dry_job(tiny_file, tmp_path_factory):
    root = tmp_path_factory.mktemp("sweeps")
    return load_job(tiny_file, [GRID, f"storage.root={root}", "schedule.epochs=9",
                                "sweep={scheduler: {name: asha, reduction: 2}, seeds: 2, "
                                "finalists: 1}", "cluster.max_failures=0"])  # fmt: skip


def run_dry(job, name, resume=False):
    """Return the results of a sweep and what happened to which trial."""
    events = []
    results = run_sweep(
        job, name, resume=resume, watch=lambda t, e: events.append((t.id, name_of(e))),
        train=dry_training,
    )  # fmt: skip
    return results, events


@pytest.fixture(scope="module")
def swept(dry_job, ray_cluster):
    return run_dry(dry_job, "dry")


@pytest.mark.ray
def test_a_sweep_trains_its_grid_stops_trials_and_repeats_the_finalists(dry_job, swept):
    results, events = swept
    trials = {trial.id: trial for trial in results.trials}
    assert [trial.id for trial in results.trials][:6] == [trial_name(n) for n in range(6)]
    by_state = {}
    for trial in results.trials[:6]:
        by_state.setdefault(trial.state, []).append(trial)
    assert {t.point[BETA] for t in by_state["nan"]} == {0.5}
    assert {t.point[BETA] for t in by_state["failed"]} == {3}
    assert by_state["failed"][0].cause == "3 is no good"
    finalists = results.trials[6:]
    assert [trial.id for trial in finalists] == ["f000"]
    assert [(t.point, t.seed, t.state) for t in finalists] == [({BETA: 2, BINS: 8}, 1, "finished")]
    best = max(by_state["finished"], key=lambda t: t.figures["AP"])
    assert best.point == {BETA: 2, BINS: 8}
    assert best.curve[-1][0] == best.epochs == 9
    assert best.figures["fps"] == 18
    for kind in ("started", "ended"):
        assert sorted(name for name, k in events if k == kind) == sorted(trials)

    client = store_of(dry_job).client
    parents = children = 0
    experiment = client.get_experiment_by_name("gfl").experiment_id
    for run in client.search_runs([experiment]):
        if "mlflow.parentRunId" not in run.data.tags:
            parents += 1
            assert run.info.status == "FINISHED"
            continue
        children += 1
        (trial,) = [t for t in results.trials if t.run_id == run.info.run_id]
        assert run.data.tags["sweep.state"] == trial.state
        assert run.data.tags["config.hash"] == trial.config_hash
        assert run.data.params[BETA] == str(float(trial.point[BETA]))
        expected = {"finished": "FINISHED", "stopped early": "KILLED"}
        assert run.info.status == expected.get(trial.state, "FAILED")
    assert (parents, children) == (1, 7)


@pytest.mark.ray
@pytest.mark.usefixtures("swept")
def test_a_finished_sweep_that_is_resumed_tries_only_what_failed_again(dry_job):
    before = {p.parent.name: p.read_text() for p in trial_files(dry_job)}
    results, events = run_dry(dry_job, "dry", resume=True)
    failed = {t.id for t in results.trials if t.state == "failed"}
    assert {name for name, _ in events} == failed
    after = {p.parent.name: p.read_text() for p in trial_files(dry_job)}
    assert len(before) == 7
    assert before.keys() == after.keys()
    assert all(after[name] == text for name, text in before.items() if name not in failed)
    runs = [json.loads(text)["run_id"] for text in before.values()]
    assert runs == [json.loads(text)["run_id"] for text in after.values()]


def trial_files(job):
    from gfl_platform.storage.storage import Storage

    return sorted(Storage(job.storage).root.glob("sweeps/dry/trials/*/trial.json"))


def test_a_resumed_sweep_that_asks_for_something_else_is_refused(tiny_file, tmp_path):
    job = load_job(tiny_file, [GRID, f"storage.root={tmp_path}", "sweep.seeds=2"])
    with pytest.raises(ValueError, match=r"sweep 's': nothing to resume in "):
        run_dry(job, "s", resume=True)
    assert not any(tmp_path.iterdir())
    folder = tmp_path / "sweeps" / "s"
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(dump_config(comparable(job)))
    with pytest.raises(ValueError, match=r"sweep 's' exists in .*--resume"):
        run_dry(job, "s")
    other = load_job(tiny_file, [GRID, f"storage.root={tmp_path}", "sweep.seeds=3"])
    with pytest.raises(ConfigError, match=r"this sweep was started .*\(sweep\.seeds 2 -> 3\)"):
        run_dry(other, "s", resume=True)
    assert [path.name for path in folder.iterdir()] == [CONFIG_FILE]


def test_objectives_that_the_data_cannot_have_are_refused(tiny_file):
    job = load_job(tiny_file, [GRID])
    check_data(job, 2, ("AP", "fps"))
    with pytest.raises(ConfigError, match=r"objectives: APl is never reported: .*no such objects"):
        check_data(job, 2, ("AP", "APl"))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_resources_that_can_never_be_met_are_said_at_once(dry_job):
    greedy = dry_job.model_copy(
        update={"cluster": dry_job.cluster.model_copy(update={"workers": 9})}
    )
    with pytest.raises(resources.ClusterError, match="9 workers need 9 CPUs"):
        run_sweep(greedy, "greedy", resume=False, watch=lambda *_: None, train=dry_training)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_two_objectives_are_searched_within_a_budget_of_epochs(tiny_file, tmp_path):
    job = load_job(tiny_file, [DRAWN, f"storage.root={tmp_path}", "schedule.epochs=4",
                               "sweep={search: {name: tpe}, objectives: [AP, fps], "
                               "budget: {trials: 8, epochs: 14}}"])  # fmt: skip
    results = run_sweep(job, "two", resume=False, watch=lambda *_: None, train=dry_training)
    assert {trial.state for trial in results.trials} == {"finished", "out of budget"}
    assert 14 <= sum(trial.epochs for trial in results.trials) <= 16
    assert results.trials[0].point == {BETA: 2.0, BINS: 8}
    before = {trial.id: trial for trial in results.trials}
    folder = tmp_path / "sweeps" / "two" / "trials" / "000"
    (folder / TRIAL_FILE).write_text("")

    more = load_job(tiny_file, [DRAWN, f"storage.root={tmp_path}", "schedule.epochs=4",
                                "sweep={search: {name: tpe}, objectives: [AP, fps], "
                                "budget: {trials: 8, epochs: 99}}"])  # fmt: skip
    results = run_sweep(more, "two", resume=True, watch=lambda *_: None, train=dry_training)
    assert [(trial.id, trial.state) for trial in results.trials] == [
        (trial_name(number), "finished") for number in range(8)
    ]
    for trial in results.trials:
        if trial.id in before:
            assert (trial.point, trial.run_id) == (before[trial.id].point, before[trial.id].run_id)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster", "s3")
def test_a_sweep_on_s3_goes_on_from_another_machine(tiny_file, tmp_path):
    def run_on(machine, **options):
        job = load_job(tiny_file, [GRID, "storage.root=s3://gfl/swept", "schedule.epochs=2",
                                   f"storage.cache={tmp_path / machine}", "cluster.max_failures=0",
                                   f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"])  # fmt: skip
        return run_dry(job, "s", **options)

    first, _ = run_on("one")
    with pytest.raises(ValueError, match=r"'s' exists in s3://gfl/swept"):
        run_on("two")
    again, events = run_on("two", resume=True)
    assert {name for name, _ in events} == {t.id for t in first.trials if t.state == "failed"}
    assert len(first.trials) == 6
    known = [(trial.id, trial.run_id, trial.curve) for trial in first.trials]
    assert [(trial.id, trial.run_id, trial.curve) for trial in again.trials] == known


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_hundred_trials_are_little_to_their_driver(tiny_file, tmp_path):
    space = f"sweep.space={{{BETA}: {{grid: [1, 2]}}, {BINS}: {{grid: {list(range(1, 101))}}}}}"
    words = [tiny_file, f"storage.root={tmp_path}", "schedule.epochs=2", space]
    command = [sys.executable, "-m", dry_sweep.__name__, *words]
    alone = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    ran = subprocess.run(command, env=alone, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    states, growth = ran.stdout.splitlines()[-2:]
    assert states == "200 {'finished'}"
    # The libraries take most of a driver's memory, torch alone half a GiB, whatever the sweep's
    # size. What grows with the trials is bounded: 1 MiB a trial, the report's figures included.
    assert int(growth) < 200  # MiB
    page = tmp_path / "sweeps" / "dry" / "report" / "report.html"
    assert page.stat().st_size < 5e6


def test_a_trial_may_begin_while_the_store_is_away(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = "tracking.uri=http://127.0.0.1:9"
    job = job_of(GRID, f"storage.root={tmp_path}", away)
    recorder = Recorder(job, store_of(job), "s", tmp_path / "trials", "0" * 32, 1, lambda *_: None)
    planned = {"id": "000", "point": {BETA: 2, BINS: 4}, "seed": 0, "stage": "search"}
    recorder.handle(OfTrial("000", TrialStarted(planned)))
    outcome = TrialOutcome("finished", figures={"AP": 0.5, "fps": 9.0})
    recorder.handle(OfTrial("000", outcome))
    recorder.handle(OfTrial("000", TrialEnded("stopped early", planned=planned)))
    assert read_trial(tmp_path / "trials" / "000").state == "finished"
    assert backlog(tmp_path / "trials" / "000") > 2


def test_a_trial_that_is_started_again_sends_its_outcome_unless_it_failed(tmp_path, monkeypatch):
    events, reports = [], []
    queue = SimpleNamespace(add=SimpleNamespace(remote=events.append))
    monkeypatch.setattr("ray.get", lambda reference: None)
    monkeypatch.setattr("ray.tune.report", reports.append)
    results = [ValueError("no space"), TrialOutcome("finished", figures={"AP": 0.5}, epochs=3)]

    def train(job, folder, workers, events):
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    job = job_of(GRID)
    folder = RunFolder(Storage(job.storage), tmp_path)
    settings = TrialSettings(job, folder, None, Events(queue), train, {})
    planned = vars(Planned("000", {BETA: 2, BINS: 4}, 0, "search"))
    for _ in range(3):
        run_trial(planned, settings)
    assert results == []
    outcomes = [e.event for e in events if isinstance(e.event, TrialOutcome)]
    assert [(outcome.state, outcome.cause) for outcome in outcomes] == [
        ("failed", "no space"), ("finished", None), ("finished", None)
    ]  # fmt: skip
    assert reports[1:] == 2 * [{"AP": 0.5, "epoch": 3, "final": "finished"}]
    assert outcomes[1] == outcomes[2]
    (tmp_path / "000" / OUTCOME_FILE).write_text("")  # a damaged outcome is no outcome
    results.append(TrialOutcome("finished", figures={"AP": 0.6}, epochs=3))
    run_trial(planned, settings)
    assert reports[-1]["AP"] == 0.6


def test_what_a_stopped_training_still_says_is_not_noted(tmp_path):
    job = job_of(GRID, f"storage.root={tmp_path}")
    recorder = Recorder(job, store_of(job), "s", tmp_path / "trials", "0" * 32, 1, lambda *_: None)
    planned = {"id": "000", "point": {BETA: 2, BINS: 4}, "seed": 0, "stage": "search"}
    recorder.handle(OfTrial("000", TrialStarted(planned)))
    recorder.handle(OfTrial("000", TrialEnded("stopped early", planned=planned)))
    recorder.handle(OfTrial("000", StepsDone(9, 99, 1.5, 0.0, {"loss": 1.0})))
    run = store_of(job).client.get_run(recorder.trials["000"].run_id)
    assert (run.info.status, run.data.metrics) == ("KILLED", {})
    assert recorder.trials["000"].state == "stopped early"
