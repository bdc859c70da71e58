"""The jobs as their users call them: processes with arguments, exit status and output."""

import contextlib
import importlib
import io
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
import torch
from PIL import Image
from pycocotools.coco import COCO

from gfl.checkpoint import load_checkpoint, read_about

JOBS = ("train", "sweep", "inspect", "evaluate", "predict", "registry", "demo")


def start(*arguments):
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*arguments):
    process = start(*arguments)
    out, error = process.communicate(timeout=240)
    return process.returncode, out, error


@pytest.mark.parametrize("job", JOBS)
def test_every_job_explains_itself_with_an_example(job):
    status, out, _ = run(f"jobs.{job}", "--help")
    assert status == 0
    assert f"example: python -m jobs.{job}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("jobs.train", "configs/demo.yaml", "loss.qfl.bta=1"), "did you mean 'beta'?"),
        (("jobs.train", "configs/absent.yaml"), "configs/absent.yaml: cannot be read"),
        (
            ("jobs.train", "configs/coco128.yaml"),
            "data/coco128/images: no such folder of images",
        ),
        (("jobs.train", "configs/demo.yaml", "--resume"), "say which run with run.name=NAME"),
        (("jobs.sweep", "configs/demo.yaml"), "no sweep: section; see configs/sweeps/"),
        (("jobs.sweep", "configs/sweeps/beta_bins_demo.yaml", "--resume"), "say which sweep"),
        (
            ("jobs.sweep", "configs/sweeps/beta_bins_demo.yaml", "sweep.space.loss.qfl.bta=3"),
            "sweep.space",
        ),
        (("jobs.inspect", "configs/coco128.yaml"), "no such folder of images"),
        (("jobs.evaluate", "no/such/folder"), "no/such/folder: no such folder"),
        (("jobs.predict", "models:/x@y", "absent.jpg"), "absent.jpg: no such image or folder"),
        (("jobs.registry", "list", "loss.qfl.beta=1.5"), "has no effect here"),
        (("jobs.registry", "list", "trackng.uri=x"), "did you mean 'tracking'?"),
        (("jobs.registry", "show", "absent", "1"), "absent: no such model; there is none yet"),
    ],
)
def test_a_mistake_is_one_line_and_a_status(arguments, message, tmp_path, monkeypatch, capsys):
    # In this process: a process of its own would take seconds to import torch.
    monkeypatch.setattr(sys, "argv", [*arguments, f"storage.root={tmp_path}"])
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(arguments[0]).main()
    error = capsys.readouterr().err
    assert caught.value.code == 1
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_mistake_ends_the_process_with_that_status(tmp_path):
    status, _, error = run("jobs.train", "configs/demo.yaml", "loss.qfl.bta=1")
    assert status == 1
    assert error == "error: command line: loss.qfl.bta: unknown key; did you mean 'beta'?\n"


@pytest.fixture
def outputs(trained):
    """The storage root of the run `first` and the model `shapes@champion`."""
    return Path(trained[0].storage.root)


@pytest.mark.cluster
@pytest.mark.ray
def test_an_interrupted_training_resumes_to_the_same_weights_in_the_same_run(outputs, tiny_file):
    arguments = (
        "jobs.train",
        tiny_file,
        f"storage.root={outputs}",
        "run.name=part",
        "registry={name: tiny, alias: champion}",
    )
    folder = outputs / "runs" / "part"
    process = start(*arguments)
    deadline = time.monotonic() + 120
    while not list(folder.glob("ray/checkpoint*/about.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "--resume goes on" in error
    before = json.loads((folder / "run.json").read_text())["run_id"]
    status, out, error = run(*arguments, "--resume")
    assert status == 0, error
    assert before in out
    assert "epoch 3: AP" in out
    assert "tiny version 1" in out
    assert "promoted" in out
    for key, value in last_weights(outputs / "runs" / "first").items():
        assert torch.equal(value, last_weights(folder)[key]), key


def last_weights(folder):
    checkpoints = [path.parent for path in folder.glob("ray/checkpoint*/about.json")]
    latest = max(checkpoints, key=lambda checkpoint: read_about(checkpoint).step)
    assert read_about(latest).epoch == 3
    return load_checkpoint(latest)[0].state_dict()


@pytest.mark.ray
def test_a_model_is_evaluated_by_alias(outputs, tmp_path):
    status, out, error = run(
        "jobs.evaluate",
        "models:/shapes@champion",
        f"storage.root={outputs}",
        "postprocess.score_threshold=1.0",
        "--official",
        "--per-class",
        "--out",
        tmp_path / "new" / "e.json",
        "--results",
        tmp_path / "new" / "r.json",
    )
    assert status == 0, error
    assert "AP50" in out
    assert "ellipse" in out
    assert json.loads((tmp_path / "new" / "r.json").read_text()) == []
    figures = json.loads((tmp_path / "new" / "e.json").read_text())
    assert figures["images"] == 11
    assert figures["metrics"]["AR100"] == 0  # no score reaches the threshold
    assert figures["ap_by_class"] == {"rectangle": 0, "ellipse": 0, "triangle": 0}
    assert figures["ap_by_iou"]["0.95"] == 0
    assert figures["protocol"]["postprocess"]["score_threshold"] == 1.0


@pytest.mark.ray
def test_predictions_are_coco_json_and_pictures(outputs, shapes_folder, tmp_path):
    status, out, error = run(
        "jobs.predict", "models:/shapes@champion", shapes_folder / "val" / "images",
        "--out", tmp_path,
        f"storage.root={outputs}",
    )  # fmt: skip
    assert status == 0, error
    assert "rectangle" in out
    with contextlib.redirect_stdout(io.StringIO()):
        assert len(COCO(str(tmp_path / "predictions.json")).imgs) == 11
    content = json.loads((tmp_path / "predictions.json").read_text())
    assert len(content["images"]) == 11
    assert [c["name"] for c in content["categories"]] == ["rectangle", "ellipse", "triangle"]
    assert all(
        {"image_id", "category_id", "bbox", "score", "edge_std"} <= set(a)
        for a in content["annotations"]
    )
    pictures = sorted(tmp_path.glob("*.png"))
    assert len(pictures) == 11
    assert Image.open(pictures[0]).width > 200


@pytest.mark.ray
def test_the_registry_is_listed_shown_and_promoted(outputs, monkeypatch, capsys):
    from jobs import registry

    def registry_says(*arguments):
        monkeypatch.setattr(sys, "argv", ["registry", *arguments, f"storage.root={outputs}"])
        registry.main()
        return capsys.readouterr().out

    assert "champion" in registry_says("list")
    assert "git.commit" in registry_says("show", "shapes", "champion")
    assert "shapes@tried is version 1" in registry_says("alias", "shapes", "1", "tried")
    assert "promoted 1" in registry_says("history", "shapes")


@pytest.mark.cluster
@pytest.mark.ray
def test_a_job_is_submitted_from_a_clean_clone_with_a_token(tmp_path, ray_head):
    """`ray job submit` as the README words it, to a head that wants a token."""
    clone, address, environment = ray_head
    assert not (clone / ".venv").exists()
    # Only what travels may be used: the environment holds the checkout's packages, too.
    marked = clone / "platform" / "gfl_platform" / "__init__.py"
    marked.write_text(marked.read_text() + "print('gfl_platform travelled')\n")
    submit = [
        str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", address,
        "--runtime-env", "runtime-env.yaml", "--",
        "python", "-m", "jobs.train", "configs/demo.yaml",
        f"storage.root={tmp_path}/outputs", f"data.shapes.folder={tmp_path}/shapes",
        "data.shapes.train=16", "data.shapes.val=4", "data.shapes.size=64", "schedule.epochs=1",
        f"data.train={{images: {tmp_path}/shapes/train/images, "
        f"annotations: {tmp_path}/shapes/train/annotations.json}}",
        f"data.val={{images: {tmp_path}/shapes/val/images, "
        f"annotations: {tmp_path}/shapes/val/annotations.json}}",
        "run.name=submitted", "registry={name: submitted, alias: champion}",
    ]  # fmt: skip
    refused = subprocess.run(
        submit, cwd=clone, env=environment | {"RAY_AUTH_TOKEN": "0" * 32}, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert refused.returncode != 0
    assert "token" in (refused.stdout + refused.stderr).lower()
    done = subprocess.run(
        submit, cwd=clone, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "epoch 1: AP" in done.stdout
    assert "gfl_platform travelled" in done.stdout
    assert "submitted version 1" in done.stdout
    assert "promoted" in done.stdout
    assert list((tmp_path / "outputs" / "runs" / "submitted").glob("ray/checkpoint*/about.json"))
    evaluation = [
        sys.executable, "-m", "jobs.submit", "evaluate", "models:/submitted@champion",
        f"storage.root={tmp_path}/outputs", "--address", address,
    ]  # fmt: skip
    evaluated = subprocess.run(
        evaluation, cwd=clone, capture_output=True, text=True, timeout=240,
        env=environment | {"PYTHONPATH": "platform"},
    )  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stdout[-3000:] + evaluated.stderr[-3000:]
    assert "AP50" in evaluated.stdout
    wrong = subprocess.run(
        evaluation, cwd=clone, capture_output=True, text=True, timeout=120,
        env=environment | {"PYTHONPATH": "platform", "RAY_AUTH_TOKEN": "0" * 32},
    )  # fmt: skip
    assert wrong.returncode == 1
    assert "token" in wrong.stderr


@pytest.fixture
def ray_head(tmp_path):
    """A Ray head of its own, with token authentication and the dashboard on loopback."""
    root = Path(__file__).parents[2]
    clone = tmp_path / "clone"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=root, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    for name in files:
        if (root / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            (clone / name).write_bytes((root / name).read_bytes())
    subprocess.run(["git", "init", "-q", str(clone)], check=True)
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS" and k != "PYTHONPATH"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a1b2" * 16}
    environment |= {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    sessions = tempfile.mkdtemp(prefix="ray-")  # a short path: Ray's sockets lie below
    dashboard, port = 18265, 16379
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--num-cpus=2",
        "--node-ip-address=127.0.0.1", f"--temp-dir={sessions}", "--disable-usage-stats",
        "--min-worker-port=20000", "--max-worker-port=20100", "--dashboard-agent-listen-port=18266",
    ]  # fmt: skip
    log = (tmp_path / "head.log").open("w")
    head = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for(address, environment, head)
        yield clone, address, environment
    finally:
        # Each daemon has a session of its own; asked politely, the head takes half a minute.
        for pid in processes_naming(sessions):
            os.kill(pid, signal.SIGKILL)
        head.kill()
        head.wait()
        log.close()
        shutil.rmtree(sessions, ignore_errors=True)


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


def wait_for(address, environment, head):
    import requests

    headers = {"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"}
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert head.poll() is None, "the head stopped"
        try:
            if requests.get(f"{address}/api/jobs/", headers=headers, timeout=5).ok:
                return
        except requests.RequestException:
            pass
        time.sleep(0.5)
    raise AssertionError("the head's dashboard did not answer")
