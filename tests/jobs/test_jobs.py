"""The commands as their users call them, with arguments, exit status and output."""

import contextlib
import importlib
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from gfl.checkpoint.files import read_about
from gfl.checkpoint.snapshot import load_checkpoint
from gfl_platform.registry.history import Decision
from tests.support.goldens import run_command
from tests.support.tracking import store_of


def start(*arguments):
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*arguments):
    process = start(*arguments)
    out, error = process.communicate(timeout=240)
    return process.returncode, out, error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("jobs.train", "configs/demo.yaml", "loss.qfl.bta=1"), "did you mean 'beta'?"),
        (("jobs.train", "configs/absent.yaml"), "configs/absent.yaml: cannot be read"),
        (
            ("jobs.train", "configs/coco128.yaml"),
            "data/coco128/images: no such folder of images",
        ),
        (("jobs.train", "configs/demo.yaml", "--accept-changes"), "it goes with --resume"),
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
        (("jobs.registry", "--config", "no.yaml", "show", "m", "1"), "no.yaml: cannot be read"),
        (("jobs.registry", "show", "m", "1", "--config", "no.yaml"), "no.yaml: cannot be read"),
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


@pytest.mark.parametrize(("action", "status"), [("refused", 3), ("promoted", 0)])
def test_a_refusal_of_the_gate_is_the_status_of_the_training(
    action, status, monkeypatch, capsys, tmp_path
):
    from gfl_platform.training import train

    decision = Decision(action, 2, {}, ["AP 0.1, the champion's is 0.2"], commit="c")
    result = train.TrainingResult("7f", tmp_path / "best", {"AP": 0.1}, 9.0, 1.0, 2, decision)
    monkeypatch.setattr(train, "train", lambda *_, **__: result)
    out = run_command(
        monkeypatch, capsys, "jobs.train", "configs/demo.yaml", f"storage.root={tmp_path}"
    )
    assert cells_of(out)[action] == "AP 0.1, the champion's is 0.2"
    assert out.endswith(f"exit status {status}\n")


@pytest.fixture
def outputs(trained):
    """The storage root of the run `first` and the model `shapes@champion`."""
    return Path(trained[0].storage.root)


@pytest.mark.chaos
def test_an_interrupted_training_resumes_to_the_same_weights_in_the_same_run(outputs, tiny_file):
    arguments = (
        "jobs.train",
        tiny_file,
        f"storage.root={outputs}",
        "run.name=part",
        "registry.name=tiny",
    )
    folder = outputs / "runs" / "part"
    process = start(*arguments)
    deadline = time.monotonic() + 120
    while not list(folder.glob("ray/checkpoint*/about.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "--resume continues" in error
    before = json.loads((folder / "run.json").read_text())["run_id"]
    status, out, error = run(*arguments, "--resume", "cluster.workers=1")
    assert status == 1, error
    assert "(workers (shards): 2 -> 1); undo these changes" in error
    assert "going on from the last checkpoint" not in out  # one try, whatever max_failures is
    status, out, error = run(*arguments, "--resume")
    assert status == 0, error
    assert before in out
    assert "epoch 3: AP" in out
    assert cells_of(out)["APl"] == "-"  # on images of 64 px no object is large
    assert "tiny version 1" in out
    assert "UserWarning" not in error
    for key, value in last_weights(outputs / "runs" / "first").items():
        assert torch.equal(value, last_weights(folder)[key]), key


def cells_of(out):
    """Return the printed tables of two columns as one mapping."""
    rows = [line.strip("│").split("│") for line in out.splitlines() if line.count("│") == 3]
    return {name.strip(): value.strip() for name, value in rows}


def last_weights(folder):
    checkpoints = [path.parent for path in folder.glob("ray/checkpoint*/about.json")]
    latest = max(checkpoints, key=lambda checkpoint: read_about(checkpoint).step)
    assert read_about(latest).epoch == 3
    return load_checkpoint(latest)[0].state_dict()


@pytest.mark.ray
def test_a_model_is_evaluated_by_alias(outputs, tmp_path, monkeypatch, capsys):
    out = run_command(
        monkeypatch,
        capsys,
        "jobs.evaluate",
        "models:/shapes@champion",
        f"storage.root={outputs}",
        "postprocess.score_threshold=1.0",
        "cluster.workers=0",
        "--official",
        "--per-class",
        "--out",
        f"{tmp_path}/new/e.json",
        "--results",
        f"{tmp_path}/new/r.json",
    )
    assert out.endswith("exit status 0\n")
    assert "ellipse" in out
    cells = cells_of(out)
    assert cells["AP50"] == "0.0000"
    assert cells["APl"] == cells["ARl"] == "-"  # on images of 64 px no object is large
    assert json.loads((tmp_path / "new" / "r.json").read_text()) == []
    figures = json.loads((tmp_path / "new" / "e.json").read_text())
    assert figures["images"] == 11
    assert figures["metrics"]["AR100"] == 0  # no score reaches the threshold
    assert figures["metrics"]["APl"] == -1  # as COCO has it
    assert figures["ap_by_class"] == {"rectangle": 0, "ellipse": 0, "triangle": 0}
    assert figures["ap_by_iou"]["0.95"] == 0
    assert figures["protocol"]["postprocess"]["score_threshold"] == 1.0


@pytest.mark.ray
def test_a_model_is_analysed_beside_another_and_the_report_is_kept_with_its_run(
    trained, outputs, tmp_path, monkeypatch, capsys
):
    job, result, _ = trained
    out = run_command(
        monkeypatch,
        capsys,
        "jobs.analyse",
        "models:/shapes@champion",
        "models:/shapes/2",
        f"storage.root={outputs}",
        "cluster.workers=0",
        "--out",
        f"{tmp_path}/analysis",
    )
    assert out.endswith("exit status 0\n")
    assert f"runs:/{result.run_id}/analysis" in out
    page = (tmp_path / "analysis" / "report.html").read_text()
    assert f"AP {result.metrics['AP']:.4f}" in page
    assert "AP less that of models:/shapes/2: <strong>+0.0000</strong>" in page
    kept = store_of(job).client.list_artifacts(result.run_id, "analysis")
    files = {Path(entry.path).name for entry in kept}
    assert {"report.html", "thresholds.json", "errors.csv", "confusion.png"} <= files


@pytest.mark.ray
def test_predictions_are_coco_json_and_pictures(
    outputs, shapes_folder, tmp_path, monkeypatch, capsys
):
    images, to = f"{shapes_folder}/val/images", ("--out", str(tmp_path))
    words = ("jobs.predict", "models:/shapes@champion", images, *to, f"storage.root={outputs}")
    out = run_command(monkeypatch, capsys, *words)
    assert out.endswith("exit status 0\n")
    assert "rectangle" in out
    with contextlib.redirect_stdout(io.StringIO()):
        assert len(COCO(str(tmp_path / "predictions.json")).imgs) == 11
    content = json.loads((tmp_path / "predictions.json").read_text())
    assert len(content["images"]) == 11
    assert [c["name"] for c in content["categories"]] == ["rectangle", "ellipse", "triangle"]
    assert content["annotations"]
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
