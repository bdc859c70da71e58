"""Sweeps as their users call them, and what of them survives a kill."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gfl_platform.config import load_job
from gfl_platform.sweeps.space import grid_points
from gfl_platform.sweeps.trials import read_trial, trial_name
from tests.support.tracking import history, store_of

BETA, BINS = "loss.qfl.beta", "model.reg_max"


@pytest.fixture(scope="module")
def sweep_file(tiny_file, tmp_path_factory):
    """A sweep over four points, the finalist and the default with two seeds."""
    path = tmp_path_factory.mktemp("sweep") / "sweep.yaml"
    path.write_text(
        f"""
base: {tiny_file}
schedule: {{epochs: 4}}
data: {{repeat: 2}}
sweep:
  space:
    {BETA}: {{grid: [1, 2]}}
    {BINS}: {{grid: [4, 8]}}
  seeds: 2
  finalists: 1
"""
    )
    return path


@pytest.fixture
def start(sweep_file):
    """A function that starts the sweep below `root`; what still runs at the end is killed."""
    started = []

    def start(root, *more):
        words = ["-m", "jobs.sweep", sweep_file, f"storage.root={root}", "run.name=s", *more]
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        process = subprocess.Popen(
            [sys.executable, *map(str, words)], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            # A test that a shell runs in the background inherits that Ctrl-C is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


def trials_of(root):
    found = (read_trial(folder) for folder in sorted((root / "sweeps/s/trials").glob("*")))
    return {trial.id: trial for trial in found if trial}


def wait_for(process, root, condition):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(process.communicate())
        if condition(trials_of(root)):
            return
        time.sleep(0.2)
    raise AssertionError("nothing happened")


def descendants(pid):
    """Return {pid: command} of all processes below a process."""
    parents, commands = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            commands[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        parents[int(folder.name)] = int(fields[1])
    found, frontier = {}, {pid}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier}
        found |= {child: commands[child] for child in frontier}
    return found


def kill(process, name):
    victims = [pid for pid, command in descendants(process.pid).items() if name in command]
    os.kill(min(victims), signal.SIGKILL)


def finished(trials):
    return sum(trial.state == "finished" for trial in trials.values())


def under_way(trials):
    return any(t.state == "running" and t.epochs >= 1 for t in trials.values())


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_sweep_that_is_killed_in_every_way_ends_as_if_it_had_not_been(
    start, sweep_file, tmp_path
):
    undisturbed = start(tmp_path / "calm")
    out, error = undisturbed.communicate(timeout=400)
    assert undisturbed.returncode == 0, error
    assert "best points" in out

    root = tmp_path / "rough"
    process = start(root)
    wait_for(process, root, under_way)
    kill(process, "RayTrainWorker")  # one of the trainings
    wait_for(process, root, lambda trials: finished(trials) >= 1 and under_way(trials))
    process.kill()  # the driver
    process.communicate()
    first = trials_of(root)

    process = start(root, "--resume")
    wait_for(process, root, lambda trials: finished(trials) >= 3 and under_way(trials))
    kill(process, "raylet/raylet")  # the node
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    second = trials_of(root)

    process = start(root, "--resume", "--register", "swept")
    out, error = process.communicate(timeout=400)
    assert process.returncode == 0, error
    assert "swept@challenger is version 1" in out

    calm, rough = trials_of(tmp_path / "calm"), trials_of(root)
    asked = load_job(sweep_file).sweep
    assert [calm[trial_name(n)].point for n in range(4)] == grid_points(asked)
    assert rough.keys() == calm.keys()
    for name, trial in calm.items():
        other = rough[name]
        assert (other.point, other.seed, other.stage) == (trial.point, trial.seed, trial.stage)
        assert (other.state, other.config_hash) == ("finished", trial.config_hash)
        drop = ("fps", "latency_ms")
        assert {k: v for k, v in other.figures.items() if k not in drop} == {
            k: v for k, v in trial.figures.items() if k not in drop
        }, name
        assert other.curve[-1] == trial.curve[-1]
    for before in (first, second):
        for name, trial in before.items():
            if trial.run_id or trial.curve:  # else it had not started
                assert rough[name].run_id == trial.run_id
            if trial.state == "finished":  # and was not trained again
                assert rough[name].seconds == trial.seconds

    client = store_of(load_job(sweep_file, [f"storage.root={root}"])).client
    experiment = client.get_experiment_by_name("gfl").experiment_id
    runs = client.search_runs([experiment], max_results=100)
    children = {r.info.run_id for r in runs if "mlflow.parentRunId" in r.data.tags}
    assert children == {trial.run_id for trial in rough.values()}
    assert len(runs) == len(children) + 1
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in children:
        steps = [metric.step for metric in history(client, run, "loss")]
        assert steps == sorted(set(steps))


@pytest.mark.chaos
def test_ctrl_c_leaves_a_sweep_that_says_how_to_go_on(start, sweep_file, tmp_path):
    process = start(tmp_path)
    wait_for(process, tmp_path, lambda trials: any(t.epochs >= 1 for t in trials.values()))
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    command = re.search(r"interrupted - python -m (jobs.sweep .* --resume) continues", error)
    assert command, error
    trial = next(iter(trials_of(tmp_path).values()))
    client = store_of(load_job(sweep_file, [f"storage.root={tmp_path}"])).client
    assert client.get_run(trial.run_id).info.status == "KILLED"
    parent = json.loads((tmp_path / "sweeps/s/run.json").read_text())["run_id"]
    assert client.get_run(parent).info.status == "KILLED"
