"""The gate's verdict on real registered versions; what workers would measure is made up."""

import shutil
import tempfile
import time
from pathlib import Path
from urllib.parse import urlparse

import pytest
import torch

from gfl.checkpoint.files import About, read_config
from gfl.checkpoint.snapshot import take_snapshot
from gfl.config.loader import derive, reproducible
from gfl.evaluation.coco_eval import evaluate_split
from gfl.evaluation.protocol import Benchmark, Timing
from gfl.model.detector import Detector
from gfl_platform.cluster.launch import JobFailedError
from gfl_platform.config import JobConfig
from gfl_platform.evaluation.benchmark import keep
from gfl_platform.registry import gate, history, measurement, models
from gfl_platform.tracking.client import connect
from gfl_platform.training import train
from tests.support.detections import as_rows

CLASSES = ["rectangle", "ellipse", "triangle"]


@pytest.fixture
def job(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    draws = "registry.gate.draws=20"
    return derive(JobConfig, tiny, [f"storage.root={tmp_path / 'outputs'}", draws])


@pytest.fixture
def register(job, tmp_path):
    """Return a function that registers an untrained detector as the next version of `m`."""

    client = connect(job)
    experiment = client.create_experiment("e", artifact_location=f"file://{tmp_path}/artifacts")

    def make(ap, *overrides):
        config = reproducible(derive(type(job), job, overrides))
        torch.manual_seed(0)
        checkpoint = Path(tempfile.mkdtemp(dir=tmp_path))
        about = About(CLASSES, [1, 2, 3], 0, 0, {})
        take_snapshot(Detector(config), config, about, {}).write(checkpoint)
        run = client.create_run(experiment).info.run_id
        client.set_terminated(run)
        return models.register(job, "m", checkpoint, run, {"AP": ap, "fps": 30.0})

    return make


@pytest.fixture
def measures(monkeypatch):
    """Return a function that makes `share(trained, job)` of all objects what a version finds."""

    def make(share):
        def evaluate(checkpoint, job, watch):
            trained = read_config(checkpoint)
            split = measurement.images_of(job, CLASSES)
            records = [
                {"image_id": record.image_id, "score": 0.9,
                 "bbox": [x1, y1, x2 - x1, y2 - y1], "category_id": split.category_ids[label]}
                for record in split.records
                for (x1, y1, x2, y2), label in zip(
                    record.boxes.tolist(), record.labels.tolist(), strict=True
                )
            ]  # fmt: skip
            rows = as_rows(records[: round(len(records) * share(trained, job))])
            figures = {"fps": 30.0, "protocol": protocol_of(job), "digest": split.digest}
            return vars(evaluate_split(split, rows, job)) | figures | {"detections": rows}

        monkeypatch.setattr(measurement, "evaluate_checkpoint", evaluate)

    return make


def protocol_of(job):
    sides = {"short_side": job.data.short_side, "long_side": job.data.long_side}
    return sides | {"postprocess": job.postprocess.model_dump(mode="json")}


def promote(job, number, *overrides):
    return gate.promote(derive(type(job), job, overrides), "m", number, lambda _: None)


TOLERANT = "registry.gate.ap_tolerance=1"


def test_a_champion_is_not_beaten_at_settings_that_do_not_suit_it(job, register, measures):
    measures(lambda trained, job: (
        0.7 if trained.data.short_side == 96 else 1.0 if job.data.short_side == 64 else 0.4
    ))  # fmt: skip
    register(1.0)
    register(0.7, "data.short_side=96", "data.long_side=96")
    first = promote(job, 1, TOLERANT)
    assert first.action == "promoted", first.reasons
    decision = promote(job, 2, TOLERANT)
    assert decision.action == "refused"
    assert decision.figures["gain"]["ap"] > 0
    said = " ".join(decision.reasons)
    assert "the champion (version 1, at its own settings) 1.0000: -" in said
    assert promote(job, 2, TOLERANT, "registry.gate.ap_margin=-1").action == "promoted"


def test_a_promotion_that_a_crash_interrupted_is_finished_by_another(
    job, register, measures, monkeypatch
):
    measures(lambda trained, job: trained.seed)
    register(1.0, "seed=1")
    register(0.0, "seed=0", "data.flip=0.5")

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(history, "_move", crash)
        with pytest.raises(KeyboardInterrupt):
            promote(job, 1)
    assert models.find(job, "m", "1").aliases == []
    first = promote(job, 1)
    assert (first.action, first.number, first.applied) == ("promoted", 1, True)
    assert models.find(job, "m", "champion").version == 1
    assert promote(job, 2).action == "refused"
    assert promote(job, 1) == first  # not the refusal, which came later
    assert len(history.read_trail(connect(job), "m")) == 2


def test_a_benchmark_under_the_same_protocol_counts(job, register, measures, tmp_path):
    measures(lambda trained, job: 1.0)
    register(1.0)
    (picture := tmp_path / "latency.png").write_bytes(b"")

    def benchmark(fps, **changed):
        timing = Timing("float32", fps, {"p50": 1.0}, 0, protocol_of(job) | changed, [1.0])
        run_id = models.find(job, "m", "1").run_id
        keep(job, "m", run_id, Benchmark([timing], 1, 1, (64, 64), time.time()), picture)

    benchmark(50.0, images=7)
    decision = promote(job, 1, "registry.gate.fps_floor=40")
    assert (decision.action, decision.reasons[-1]) == ("refused", "FPS 30.0, the floor is 40.")
    benchmark(50.0)
    decision = promote(job, 1, "registry.gate.fps_floor=40")
    assert decision.action == "promoted"
    assert decision.reasons[-1] == "FPS 50.0 in its benchmark, the floor is 40."


def test_a_champion_that_cannot_be_measured_is_a_refusal_on_record(job, register, measures):
    measures(lambda trained, job: 1.0)
    register(1.0)
    register(1.0, "seed=1")
    promote(job, 1)
    location = connect(job).get_model_version_download_uri("m", "1")
    shutil.rmtree(Path(urlparse(location).path))
    decision = promote(job, 2)
    assert decision.action == "refused"
    assert "The champion (version 1) cannot be measured: m version 1: its" in decision.reasons[-2]
    assert history.read_trail(connect(job), "m")[-1].reasons == decision.reasons
    decision = promote(job, 2, "registry.gate.compare=false")
    assert decision.action == "promoted"
    assert "Not compared with the champion (version 1), as told." in decision.reasons


def test_a_champion_of_other_classes_is_a_refusal_on_record(job, register, measures):
    def share(trained, job):
        if trained.seed == 0:
            raise JobFailedError("class 2 is 'square', but 'triangle' in the model")
        return 1.0

    measures(lambda trained, job: 1.0)
    register(1.0, "seed=0")
    register(1.0, "seed=1", "postprocess.nms_iou=0.5")  # nothing is kept of the champion at that
    promote(job, 1)
    measures(share)
    decision = promote(job, 2)
    assert decision.action == "refused"
    assert "cannot be measured: class 2 is 'square'" in decision.reasons[-2]


def test_a_version_whose_registration_was_interrupted_can_be_promoted(
    job, register, measures, monkeypatch
):
    measures(lambda trained, job: 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(models, "tag", lambda *_: None)
        register(1.0)
    version = models.find(job, "m", "1")
    assert "AP" not in version.tags

    class Tracker:
        def require_run(self):
            return version.run_id

    facts = {"AP": 1.0, "fps": 30.0}
    for _ in range(2):
        assert train._register(job, "m", Path("unread"), Tracker(), facts) == 1
    assert models.find(job, "m", "1").tags["AP"] == "1"
    assert promote(job, 1).action == "promoted"


@pytest.fixture
def champions(job, register, measures):
    """Four versions, of which the first three have become champion one after the other."""
    measures(lambda trained, job: 1.0)
    for number in (1, 2, 3, 4):
        register(1.0, f"seed={number}")
    for number in (1, 2, 3):
        assert promote(job, number, "registry.gate.compare=false").action == "promoted"


def champion_of(job):
    return models.find(job, "m", "champion").version


def test_a_rollback_that_was_interrupted_is_not_done_twice(job, champions, monkeypatch):
    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(history, "_move", crash)
        with pytest.raises(KeyboardInterrupt):
            gate.rollback(job, "m", "worse")
    assert champion_of(job) == 3
    assert gate.rollback(job, "m", "worse").reasons == ["worse"]
    assert champion_of(job) == 2
    assert gate.rollback(job, "m", "it was the better one").version == 3
    assert champion_of(job) == 3


def test_a_rollback_does_not_undo_what_came_first(job, champions, monkeypatch):
    load = models.load

    def overtaken_by(other):
        others = [other]

        def late(*arguments):
            if others:
                others.pop()()
            return load(*arguments)

        monkeypatch.setattr(models, "load", late)

    overtaken_by(lambda: gate.rollback(job, "m", "the first"))
    assert gate.rollback(job, "m", "the second").reasons == ["the first"]
    assert champion_of(job) == 2
    overtaken_by(lambda: promote(job, 4, "registry.gate.compare=false"))
    with pytest.raises(models.RegistryError, match="champion is version 4 now; nothing rolled"):
        gate.rollback(job, "m", "the third")
    assert champion_of(job) == 4


def test_a_promotion_is_weighed_against_what_became_champion_meanwhile(
    job, register, measures, monkeypatch
):
    monkeypatch.setattr(history, "SECOND_LOOK_S", 0.01)
    client = connect(job)
    by_hand = []

    def share(trained, job):
        if by_hand:
            client.set_registered_model_alias("m", "champion", str(by_hand.pop()))
        return 0.5 if trained.seed == 1 else 1.0

    measures(share)
    for number in (1, 2, 3):
        register(1.0, f"seed={number}")
    assert promote(job, 1, TOLERANT).action == "promoted"
    by_hand.append(3)
    decision = promote(job, 2, "registry.gate.ap_margin=0.1")
    assert decision.action == "refused"
    assert any("the champion (version 3) 1.0000" in reason for reason in decision.reasons)
    assert champion_of(job) == 3
    actions = [each.action for each in history.read_trail(client, "m")]
    assert actions == ["promoted", "moved by hand", "refused"]
