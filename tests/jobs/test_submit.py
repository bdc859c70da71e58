"""Jobs on a cluster that wants a token, submitted from a clean clone, and stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import requests
from mlflow import MlflowClient

from tests.support import servers

pytestmark = pytest.mark.chaos

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
WRONG = {"RAY_AUTH_TOKEN": "0" * 32}

TINY = """
base: demo.yaml
model: {{channels: 32, tower_convs: 1, reg_max: 8}}
data:
  shapes: {{folder: {shapes}, train: 16, val: 4, size: 64}}
  train: {{images: {shapes}/train/images, annotations: {shapes}/train/annotations.json}}
  val: {{images: {shapes}/val/images, annotations: {shapes}/val/annotations.json}}
  short_side: 64
  long_side: 64
  batch: 8
schedule: {{epochs: 1}}
tracking: {{every_steps: 1}}
cluster: {{workers: 1}}
storage: {{root: {outputs}}}
"""
SWEEP = """
base: tiny.yaml
sweep: {space: {loss.qfl.beta: {grid: [1, 2]}}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the clone, its jobs' outputs and the head's log are."""
    return tmp_path_factory.mktemp("submit")


@pytest.fixture(scope="module")
def clone(place):
    """A clone with what is not committed yet; its code says that it travelled."""
    clone = place / "clone"
    git("clone", "-q", "--shared", ROOT, clone)
    for name in git("ls-files", "--cached", "--others", "--exclude-standard").splitlines():
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    # Only what travels may be used: the environment holds the checkout's packages, too.
    marked = clone / "platform" / "gfl_platform" / "__init__.py"
    marked.write_text(marked.read_text() + "print('gfl_platform travelled')\n")
    where = {"shapes": place / "shapes", "outputs": place / "outputs"}
    (clone / "configs" / "tiny.yaml").write_text(TINY.format(**where))
    (clone / "configs" / "tiny_sweep.yaml").write_text(SWEEP)
    return clone


def git(*words):
    command = ["git", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def head(place):
    """A Ray head of its own that wants a token; a function that runs commands for it in a clone."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHONPATH"))}
    environment = kept | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a1b2" * 16}
    environment |= {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    environment["PATH"] = f"{BIN}:{environment['PATH']}"
    sessions = tempfile.mkdtemp(prefix="ray-")  # a short path: Ray's sockets lie below
    port = servers.free_port()
    command = [
        BIN / "ray", "start", "--head", "--block", f"--port={servers.free_port()}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={port}", "--num-cpus=2",
        "--node-ip-address=127.0.0.1", f"--temp-dir={sessions}", "--disable-usage-stats",
        "--min-worker-port=20000", "--max-worker-port=20100",
        f"--dashboard-agent-listen-port={servers.free_port()}",
    ]  # fmt: skip
    with (place / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, cwd=place, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for_head(address, environment["RAY_AUTH_TOKEN"], process)
        yield address, environment
    finally:
        # Each daemon has a session of its own; asked politely, the head takes half a minute.
        for pid in processes_naming(sessions):
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()
        shutil.rmtree(sessions, ignore_errors=True)


def wait_for_head(address, token, process):
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert process.poll() is None, "the head stopped"
        try:
            headers = {"Authorization": f"Bearer {token}"}
            if requests.get(f"{address}/api/jobs/", headers=headers, timeout=5).ok:
                return
        except requests.RequestException:
            pass
        time.sleep(0.5)
    raise AssertionError("the head's dashboard did not answer")


def processes_naming(word):
    """Return the pids of processes whose command line contains `word`."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes():
                pids.append(int(path.parent.name))
        except OSError:  # it has ended meanwhile
            continue
    return pids


def ray_job_submit(head, clone, *words, **more):
    """Run `ray job submit` as README words it; return the status and what it printed."""
    command = [BIN / "ray", "job", "submit", "--address", head[0],
               "--runtime-env", "runtime-env.yaml", "--", "python", "-m", *words]  # fmt: skip
    return finish(start(head, clone, command, **more))


def jobs_submit(head, clone, *words, **more):
    """Run `jobs.submit`; return the status and what it printed."""
    return finish(start(head, clone, submit_command(head, *words), **more))


def submit_command(head, *words):
    return [sys.executable, "-m", "jobs.submit", *words, "--address", head[0]]


def start(head, clone, command, **more):
    environment = head[1] | {"PYTHONPATH": "platform"} | more
    return subprocess.Popen(
        list(map(str, command)), cwd=clone, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        # A test that a shell runs in the background inherits that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def finish(process):
    printed, _ = process.communicate(timeout=240)
    return process.returncode, printed


def tracked(place, experiment):
    """Return the MLflow runs of an experiment, oldest first."""
    client = MlflowClient(f"sqlite:///{place}/outputs/mlflow.db")
    found = client.get_experiment_by_name(experiment)
    return client.search_runs([found.experiment_id], order_by=["start_time"])


@pytest.mark.timeout(600)
def test_every_kind_of_job_runs_from_a_clean_clone(head, clone, place, tmp_path):
    train = ("jobs.train", "configs/tiny.yaml", "run.name=submitted", "registry.name=submitted")
    nobody = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "", "HOME": str(tmp_path)}
    for token in (WRONG, nobody):
        status, printed = ray_job_submit(head, clone, *train, **token)
        assert status != 0
        assert "token" in printed.lower()
    assert not (place / "outputs").exists()

    status, printed = ray_job_submit(head, clone, *train, "registry.alias=champion")
    assert status == 0, printed[-3000:]
    assert "epoch 1: AP" in printed
    assert "gfl_platform travelled" in printed
    assert "submitted version 1" in printed
    assert "promoted" in printed
    (run,) = tracked(place, "gfl")
    assert run.info.status == "FINISHED"

    evaluate = ("evaluate", "models:/submitted@champion", f"storage.root={place}/outputs")
    status, printed = jobs_submit(head, clone, *evaluate, **WRONG)
    assert status == 1
    assert "token" in printed
    status, printed = jobs_submit(head, clone, *evaluate)
    assert status == 0, printed[-3000:]
    assert "AP50" in printed

    predictions = tmp_path / "predictions"
    image = next((place / "shapes" / "val" / "images").iterdir())
    status, printed = jobs_submit(
        head, clone, "predict", evaluate[1], image, "--out", predictions, evaluate[2]
    )
    assert status == 0, printed[-3000:]
    assert len(json.loads((predictions / "predictions.json").read_text())["images"]) == 1

    sweep = ("jobs.sweep", "configs/tiny_sweep.yaml", "run.name=swept")
    status, printed = ray_job_submit(head, clone, *sweep, "tracking.experiment=sweeps")
    assert status == 0, printed[-3000:]
    assert list((place / "outputs" / "sweeps" / "swept").rglob("report.html"))
    assert {run.info.status for run in tracked(place, "sweeps")} == {"FINISHED"}


@pytest.mark.timeout(300)
def test_a_run_has_one_job_which_closes_it_at_ctrl_c(head, clone, place):
    words = ("train", "configs/tiny.yaml", "run.name=endless", "schedule.epochs=1000",
             "tracking.experiment=stopped")  # fmt: skip
    process = start(head, clone, submit_command(head, *words))
    printed = ""
    while "epoch 1: AP" not in printed:
        printed += process.stdout.readline()
        assert process.poll() is None, printed[-3000:]
    status, refused = jobs_submit(head, clone, *words, "--resume")
    assert status == 1
    assert "run 'endless' is used by process" in refused
    process.send_signal(signal.SIGINT)
    status, rest = finish(process)
    assert status == 130, rest
    assert "--resume continues" in rest  # in the job's log: it was asked, and had the time
    assert "STOPPED" in rest
    (run,) = tracked(place, "stopped")
    assert run.info.status == "KILLED"
    assert run.data.tags["git.commit"] == git("rev-parse", "HEAD").strip()
    (diff,) = (place / "outputs").rglob(f"{run.info.run_id}/artifacts/git.diff")
    assert "+print('gfl_platform travelled')" in diff.read_text()
    folder = place / "outputs" / "runs" / "endless"
    assert json.loads((folder / "status.json").read_text())["state"] == "stopped"
