"""What every command of `jobs.registry` prints, on a small store of made-up models."""

import re

import pytest
import torch

from gfl.checkpoint.files import About, read_config
from gfl.checkpoint.snapshot import take_snapshot
from gfl.config.loader import derive, reproducible
from gfl.evaluation.coco_eval import evaluate_split
from gfl.model.detector import Detector
from gfl_platform.config import JobConfig
from gfl_platform.registry import measurement, models
from gfl_platform.storage.storage import Storage
from tests.support.detections import rows_on
from tests.support.goldens import compare_text, run_command
from tests.support.tracking import store_of

CLASSES = ["rectangle", "ellipse", "triangle"]
SHARES = {1: 0.5, 2: 1.0, 3: 0.2, 4: 0.7}
"""Share of all objects that a version finds, by its training's seed."""

COMMANDS = [
    "list",
    "list --name m",
    "show m 1",
    "promote m 1",
    "promote m 1",
    "promote m 2",
    "promote m 3",
    "promote m 3 registry.gate.compare=false registry.gate.fps_floor=40",
    "promote m 3 registry.gate.ap_margin=-1",
    "promote m 9",
    "rollback m --why worse_in_the_field",
    "history m",
    "compare m 1 2 --out OUT/pairs.png",
    "compare m 1 2 --out OUT/pairs.jpg",
    "alias m 3 tried",
    "alias m 2 tried",
    "alias m 2 champion",
    "alias m 2 v2",
    "list --name m",
    "list --name n",
    "show m champion",
    "show m 3",
    "show m absent",
    "rollback other --why nothing_to_go_back_to",
    "history other",
    "history absent",
]


def evaluate(checkpoint, job, watch=None):
    """Return what an evaluation would: the share of all objects that the training's seed finds."""
    config = read_config(checkpoint)
    split = measurement.images_of(job, Storage(job.storage).cache, CLASSES)
    records = [
        {
            "image_id": record.image_id,
            "score": 0.9,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "category_id": split.category_ids[label],
        }
        for record in split.records
        for (x1, y1, x2, y2), label in zip(
            record.boxes.tolist(), record.labels.tolist(), strict=True
        )
    ]
    rows = rows_on(split, records[: round(len(records) * SHARES[config.seed])])
    protocol = {"device": "made-up CPU", "short_side": job.data.short_side}
    figures = {"fps": 30.0, "protocol": protocol, "digest": "d" * 64, "detections": rows}
    return vars(evaluate_split(split, rows, job)) | figures


def fill_store(job, client, folder):
    """Register three versions of `m` and one of `other`, each from a run of its own."""
    store = store_of(job)
    experiment = client.create_experiment("made-up", f"file://{folder}/artifacts")
    for name, seed, *overrides in (
        ("m", 1),
        ("m", 2, "optim.lr=0.001", "schedule.epochs=5"),
        ("m", 3),
        ("other", 4),
    ):
        config = reproducible(derive(JobConfig, job, [f"seed={seed}", *overrides]))
        checkpoint = folder / f"checkpoint-{seed}"
        checkpoint.mkdir()
        torch.manual_seed(0)
        about = About(CLASSES, [1, 2, 3], 0, 0, {})
        take_snapshot(Detector(config), config, about, {}).write(checkpoint)
        run = client.create_run(experiment, tags={"git.commit": "c" * 40, "workers": "2 (CPU)"})
        run_id = run.info.run_id
        client.log_metric(run_id, "loss", 1.25)
        client.log_text(run_id, "torch==1.0\nray==2.0\n", "packages.txt")
        client.set_terminated(run_id)
        ap = evaluate(checkpoint, job)["metrics"]["AP"]
        facts = {"AP": ap, "fps": 30.0, "protocol": "p" * 8, "data": "d" * 12}
        models.register(store, name, checkpoint, run_id, facts)


def masked(text, folder):
    """Return a transcript without times, identities and the widths that depend on them."""
    text = text.replace(str(folder), "OUT")
    text = re.sub(r"\b[0-9a-f]{32}\b", "(run)", text)
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "(time)", text)
    text = re.sub(r"\b\d+ (s|min|h) *(?=│$)", "(age) ", text, flags=re.MULTILINE)
    lines = [
        re.sub(r"([ ━─])\1+", r"\1", line) if re.search("[│┃━─]", line) else line
        for line in text.splitlines()
    ]
    return "\n".join(lines) + "\n"


@pytest.fixture
def store(tiny, tmp_path, monkeypatch):
    """The root of the storage of a small store."""
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("GFL_USER", "somebody")
    monkeypatch.setenv("GFL_GIT_COMMIT", "c" * 40)
    monkeypatch.setattr(measurement, "evaluate_checkpoint", evaluate)
    root = tmp_path / "outputs"
    root.mkdir()
    uri = f"sqlite:///{root}/mlflow.db"
    client = MlflowClient(uri, uri)
    fill_store(derive(JobConfig, tiny, [f"storage.root={root}"]), client, tmp_path)
    return root


@pytest.mark.slow
def test_the_registry_prints_what_it_printed(store, tmp_path, monkeypatch, capsys):
    transcript = []
    for command in COMMANDS:
        words = command.replace("OUT", str(tmp_path)).split()
        given = [f"storage.root={store}", "registry.gate.draws=50"]
        text = run_command(monkeypatch, capsys, "jobs.registry", *words, *given)
        transcript.append(f"$ python -m jobs.registry {command}\n{masked(text, tmp_path)}")
    compare_text("registry/transcript.txt", "\n".join(transcript))
    assert (tmp_path / "pairs.png").stat().st_size > 10_000
