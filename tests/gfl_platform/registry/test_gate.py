"""The gate: its verdict on made-up measurements, promotions and rollbacks, one of them with Ray."""

import json
import shutil
import tempfile
import time
from itertools import count
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest
import torch

from gfl.checkpoint.files import About, model_digest, read_config, write_checksums
from gfl.checkpoint.snapshot import take_snapshot
from gfl.config.loader import derive, reproducible
from gfl.evaluation.bootstrap import Gain
from gfl.evaluation.coco_eval import evaluate_split
from gfl.evaluation.protocol import Benchmark, Timing, protocol_hash
from gfl.model.detector import Detector
from gfl_platform.cluster.launch import JobFailedError
from gfl_platform.cluster.resources import ClusterError
from gfl_platform.config import GateConfig, JobConfig
from gfl_platform.evaluation.benchmark import keep
from gfl_platform.provenance import git_state
from gfl_platform.registry import gate, history, measurement, models
from gfl_platform.registry.gate import Evidence, Rival, Verdict, decide
from gfl_platform.registry.measurement import Measurement
from gfl_platform.registry.models import Version
from gfl_platform.storage.storage import Storage
from tests.support.detections import rows_on
from tests.support.tracking import store_of

CLASSES = ["rectangle", "ellipse", "triangle"]

PROTOCOL = {"short_side": 64, "device": "cpu"}


def measured(ap, fps=30.0, **protocol):
    """Return a made-up measurement."""
    return Measurement({"AP": ap}, {}, fps, PROTOCOL | protocol, "0" * 64, np.empty((0, 7)))


def evidence(ap=0.5, *, fps=30.0, logged_ap=0.5, repeated_ap=0.5, **others):
    """Return made-up evidence about version 2."""
    return Evidence(2, measured(ap, fps), logged_ap, repeated_ap, **others)


def over(ap, gain, low=None, high=None, **protocol):
    """Return a champion's measurement and the candidate's gain over it."""
    bounds = (gain if low is None else low, gain if high is None else high)
    return measured(ap, **protocol), Gain(gain, *bounds, {})


def test_the_first_version_passes_on_its_own_figures():
    verdict = decide(GateConfig(), evidence())
    assert verdict.passes
    assert verdict.reasons == [
        "AP 0.5000 measured again, 0.5000 logged (0.001 allowed).",
        "FPS 30.0, the floor is 0.",
    ]
    assert verdict.figures == {
        "gate": GateConfig().model_dump(mode="json"),
        "data": "0" * 64,
        "protocol": protocol_hash(PROTOCOL),
        "candidate": {"version": 2, "AP": 0.5, "fps": 30.0},
    }


@pytest.mark.parametrize(
    ("fps", "benchmark_fps", "passes", "reason"),
    [
        (39.9, None, False, "FPS 39.9, the floor is 40."),
        (40.0, None, True, "FPS 40.0, the floor is 40."),
        (30.0, 50.0, True, "FPS 50.0 in its benchmark, the floor is 40."),
        (50.0, 30.0, False, "FPS 30.0 in its benchmark, the floor is 40."),
    ],
)
def test_fps_must_reach_the_floor_in_its_benchmark_if_there_is_one(
    fps, benchmark_fps, passes, reason
):
    verdict = decide(GateConfig(fps_floor=40), evidence(fps=fps, benchmark_fps=benchmark_fps))
    assert (verdict.passes, verdict.reasons[-1]) == (passes, reason)
    assert verdict.figures["candidate"].get("benchmark_fps") == benchmark_fps


@pytest.mark.parametrize(
    ("logged_ap", "passes", "reason"),
    [
        (0.501, True, "AP 0.5000 measured again, 0.5010 logged (0.001 allowed)."),
        (0.49, False, "AP 0.5000 measured again, 0.4900 logged (0.001 allowed)."),
        (None, False, "No AP was logged when it was registered: nothing to reproduce."),
    ],
)
def test_the_logged_ap_must_come_out_again(logged_ap, passes, reason):
    verdict = decide(GateConfig(ap_tolerance=1e-3 + 1e-12), evidence(logged_ap=logged_ap))
    assert (verdict.passes, verdict.reasons[0]) == (passes, reason)


@pytest.mark.parametrize(("margin", "passes"), [(0.0, True), (0.02, True), (0.03, False)])
def test_ap_must_exceed_the_champions_by_the_margin(margin, passes):
    rival = Rival(1, over(0.48, 0.02, 0.01, 0.03))
    verdict = decide(GateConfig(ap_margin=margin), evidence(champion=1, rival=rival))
    assert verdict.passes == passes
    assert verdict.reasons[1:-1] == [
        "AP 0.5000, the champion (version 1) 0.4800: +0.0200 "
        f"(95 % interval +0.0100 to +0.0300); required {margin:+g}."
    ]
    assert verdict.figures["champion"] == {"version": 1, "AP": 0.48, "fps": 30.0}
    assert verdict.figures["gain"] == {"ap": 0.02, "low": 0.01, "high": 0.03}


def test_a_difference_within_the_noise_is_called_so():
    rival = Rival(1, over(0.5, 0.0, -0.01, 0.01))
    gate_config = GateConfig(ap_margin=0.01)
    verdict = decide(gate_config, evidence(champion=1, rival=rival))
    assert not verdict.passes
    assert verdict.reasons[1].endswith(
        "+0.0000 (95 % interval -0.0100 to +0.0100, within the noise); required +0.01."
    )


def test_a_champion_that_is_better_at_its_own_settings_is_not_beaten():
    rival = Rival(
        1,
        over(0.4, 0.1, short_side=96),
        ["data.short_side 64 -> 96"],
        over(0.6, -0.1),
    )
    verdict = decide(GateConfig(), evidence(champion=1, rival=rival))
    assert not verdict.passes
    assert verdict.reasons[2:4] == [
        "The FPS of both do not compare: short_side 64 -> 96.",
        "Version 1 was measured with data.short_side 64 -> 96.",
    ]
    assert "the champion (version 1, at its own settings) 0.6000: -0.1000" in verdict.reasons[4]
    assert verdict.figures["champion at its own settings"]["AP"] == 0.6
    assert decide(GateConfig(ap_margin=-1), evidence(champion=1, rival=rival)).passes


def test_a_champion_that_cannot_be_measured_is_not_beaten():
    verdict = decide(GateConfig(), evidence(champion=1, rival=Rival(1, fault="its files are gone")))
    assert not verdict.passes
    assert verdict.reasons[1] == (
        "The champion (version 1) cannot be measured: its files are gone. To promote without a "
        "comparison: registry.gate.compare=false."
    )
    verdict = decide(GateConfig(compare=False), evidence(champion=1))
    assert verdict.passes
    assert verdict.reasons[1] == (
        "Not compared with the champion (version 1), because registry.gate.compare is false."
    )


@pytest.fixture(scope="module")
def store(tiny, tmp_path_factory):
    """A job with a registry of its own, and the experiment for the runs of its models."""
    root = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        job = derive(JobConfig, tiny, [f"storage.root={root}", "registry.gate.draws=20"])
        artifacts = f"file://{root}/artifacts"
        yield job, store_of(job).client.create_experiment("e", artifact_location=artifacts)


@pytest.fixture
def job(store):
    return store[0]


@pytest.fixture
def client(job):
    return store_of(job).client


NUMBERS = count(1)


@pytest.fixture
def name():
    """The name of a model that no other test uses."""
    return f"m{next(NUMBERS)}"


def promote(job, name, number, *overrides):
    job = derive(type(job), job, overrides)
    return gate.promote(job, store_of(job), name, number, lambda _: None)


def champion_of(job, name):
    return models.find(store_of(job), name, "champion").version


class MadeUpExaminer:
    """Passes a version unless the champion is among those it does not beat.

    Attributes:
        unbeaten: Versions that beat every candidate.
        meanwhile: Called once, during the next examination.
    """

    unbeaten: set[int] = set()  # noqa: RUF012
    meanwhile = None

    def __init__(self, job, store, candidate, watch):
        pass

    def examine(self, champion):
        if late := MadeUpExaminer.meanwhile:
            MadeUpExaminer.meanwhile = None
            late()
        passes = champion not in self.unbeaten
        return Verdict([f"Compared with {champion}."], {"compared": champion}, passes)


@pytest.fixture
def versions(client, name, monkeypatch):
    """Four versions of the model `name` that need no measurement, nor any file."""
    client.create_registered_model(name)
    for number in range(1, 5):
        client.create_model_version(name, f"file:///absent/{number}")
    monkeypatch.setattr(gate, "Examiner", MadeUpExaminer)
    monkeypatch.setattr(MadeUpExaminer, "unbeaten", set())
    monkeypatch.setattr(MadeUpExaminer, "meanwhile", None)
    monkeypatch.setattr(models, "load", lambda *_: None)


@pytest.fixture
def interrupted(monkeypatch):
    """Return a function that runs a command until a crash, before any alias moves."""

    def run(command, *arguments):
        def crash(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(history, "_apply", crash)
            with pytest.raises(KeyboardInterrupt):
                command(*arguments)

    return run


@pytest.mark.usefixtures("versions")
def test_promotions_refusals_and_rollbacks_move_the_aliases(job, name, client):
    promote(job, name, 1)
    decision = promote(job, name, 2)
    assert (decision.action, decision.figures) == ("promoted", {"compared": 1})
    assert decision.aliases == {"champion": 2, "previous": 1}
    MadeUpExaminer.unbeaten = {2}
    assert promote(job, name, 3).action == "refused"
    decision = gate.rollback(store_of(job), name, "worse in the field")
    assert (decision.version, decision.reasons) == (1, ["worse in the field"])
    assert history.settle(client, name).aliases == {"champion": 1, "previous": 2}
    actions = [(d.action, d.version) for d in history.settle(client, name).decisions]
    assert actions == [("promoted", 1), ("promoted", 2), ("refused", 3), ("rolled back", 1)]


@pytest.mark.usefixtures("versions")
def test_a_champion_is_not_promoted_again(job, name, client):
    first = promote(job, name, 1)
    MadeUpExaminer.unbeaten = {1}
    assert promote(job, name, 2).action == "refused"
    assert promote(job, name, 1) == first  # not the refusal, which came later
    client.set_registered_model_alias(name, "champion", "4")
    with pytest.raises(models.RegistryError, match="is champion already, but by no decision"):
        promote(job, name, 4)
    assert len(history.settle(client, name).decisions) == 2


@pytest.mark.usefixtures("versions")
def test_a_promotion_that_a_crash_interrupted_is_finished_by_another(
    job, name, client, interrupted
):
    interrupted(promote, job, name, 1)
    assert models.find(store_of(job), name, "1").aliases == []
    MadeUpExaminer.unbeaten = {1}
    decision = promote(job, name, 2)
    assert (decision.action, decision.figures) == ("refused", {"compared": 1})
    assert champion_of(job, name) == 1
    assert promote(job, name, 1).number == 1
    assert len(history.settle(client, name).decisions) == 2


@pytest.mark.usefixtures("versions")
def test_a_promotion_is_weighed_against_what_became_champion_meanwhile(job, name, client):
    promote(job, name, 1)
    MadeUpExaminer.unbeaten = {3}
    MadeUpExaminer.meanwhile = lambda: client.set_registered_model_alias(name, "champion", "3")
    decision = promote(job, name, 2)
    assert decision.action == "refused"
    assert decision.reasons == [
        "champion was version 1 and is version 3, by no decision.",
        "Compared with 3.",
    ]
    assert champion_of(job, name) == 3
    MadeUpExaminer.meanwhile = lambda: promote(job, name, 4, "registry.gate.compare=false")
    MadeUpExaminer.unbeaten = set()
    assert promote(job, name, 2).figures == {"compared": 4}
    assert history.settle(client, name).aliases == {"champion": 2, "previous": 4}


@pytest.mark.usefixtures("versions")
def test_a_version_deleted_during_its_promotion_moves_no_alias(job, name, client, monkeypatch):
    promote(job, name, 1)
    promote(job, name, 2)
    before = {"champion": 2, "previous": 1}

    def delete(number):
        client.delete_model_version(name, str(number))

    MadeUpExaminer.meanwhile = lambda: delete(3)
    with pytest.raises(history.HistoryError, match=f"{name}: the version is not there any more"):
        promote(job, name, 3)
    assert history.settle(client, name).aliases == before
    write = history._write

    def write_and_delete(client, model, decision):
        write(client, model, decision)
        if not decision.applied:
            delete(decision.version)

    with monkeypatch.context() as patch:
        patch.setattr(history, "_write", write_and_delete)
        with pytest.raises(history.HistoryError, match="the version is not there any more"):
            promote(job, name, 4)
    assert history.settle(client, name).aliases == before
    assert gate.rollback(store_of(job), name, "worse").version == 1
    assert promote(job, name, 2).action == "promoted"


@pytest.mark.usefixtures("versions")
def test_a_champion_deleted_during_a_promotion_is_not_compared_with(job, name, client):
    promote(job, name, 1)
    MadeUpExaminer.meanwhile = lambda: client.delete_model_version(name, "1")
    decision = promote(job, name, 2)
    assert (decision.action, decision.reasons[-1]) == ("promoted", "Compared with None.")
    assert history.settle(client, name).aliases == {"champion": 2}


@pytest.mark.usefixtures("versions")
def test_without_a_previous_champion_nothing_is_rolled_back(job, name, client):
    for _ in range(2):
        with pytest.raises(models.RegistryError, match="no champion before this one"):
            gate.rollback(store_of(job), name, "why not")
        promote(job, name, 1)
    with pytest.raises(models.RegistryError, match="absent: no such model"):
        gate.rollback(store_of(job), "absent", "why not")
    assert len(history.settle(client, name).decisions) == 1


@pytest.fixture
def champions(job, name, versions):
    """The first three versions have become champion one after the other."""
    for number in (1, 2, 3):
        assert promote(job, name, number).action == "promoted"


@pytest.mark.usefixtures("champions")
def test_a_rollback_that_was_interrupted_is_not_done_twice(job, name, interrupted):
    interrupted(gate.rollback, store_of(job), name, "worse")
    assert champion_of(job, name) == 3
    assert gate.rollback(store_of(job), name, "worse").reasons == ["worse"]
    assert champion_of(job, name) == 2
    assert gate.rollback(store_of(job), name, "it was the better one").version == 3
    assert champion_of(job, name) == 3


@pytest.mark.usefixtures("champions")
def test_a_rollback_does_not_undo_what_came_first(job, name, monkeypatch):
    def overtake(command):
        commands = [command]
        monkeypatch.setattr(models, "load", lambda *_: commands and commands.pop()())

    overtake(lambda: gate.rollback(store_of(job), name, "the first"))
    assert gate.rollback(store_of(job), name, "the second").reasons == ["the first"]
    assert champion_of(job, name) == 2
    overtake(lambda: promote(job, name, 4))
    with pytest.raises(models.RegistryError, match="champion is version 4 now; nothing rolled"):
        gate.rollback(store_of(job), name, "the third")
    assert champion_of(job, name) == 4


@pytest.fixture
def register(store, name, tmp_path):
    """Return a function that registers an untrained detector as the next version of `name`."""
    job, experiment = store
    client = store_of(job).client

    def register(ap, *overrides):
        config = reproducible(derive(type(job), job, overrides))
        torch.manual_seed(0)
        checkpoint = Path(tempfile.mkdtemp(dir=tmp_path))
        about = About(CLASSES, [1, 2, 3], 0, 0, {})
        take_snapshot(Detector(config), config, about, {}).write(checkpoint)
        run = client.create_run(experiment).info.run_id
        client.set_terminated(run)
        return models.register(store_of(job), name, checkpoint, run, {"AP": ap, "fps": 30.0})

    return register


@pytest.fixture
def make_up_evaluations(monkeypatch):
    """Return a function that lets a version find `share(trained, job)` of all objects."""

    def patch(share):
        def evaluate(checkpoint, job, watch):
            fraction = share(read_config(checkpoint), job)
            split = measurement.images_of(job, Storage(job.storage).cache, CLASSES)
            records = [
                {"image_id": record.image_id, "score": 0.9,
                 "bbox": [x1, y1, x2 - x1, y2 - y1], "category_id": split.category_ids[label]}
                for record in split.records
                for (x1, y1, x2, y2), label in zip(
                    record.boxes.tolist(), record.labels.tolist(), strict=True
                )
            ]  # fmt: skip
            rows = rows_on(split, records[: round(len(records) * fraction)])
            figures = {"fps": 30.0, "protocol": protocol_of(job), "digest": split.digest}
            return vars(evaluate_split(split, rows, job)) | figures | {"detections": rows}

        monkeypatch.setattr(measurement, "evaluate_checkpoint", evaluate)

    return patch


def protocol_of(job):
    sides = {"short_side": job.data.short_side, "long_side": job.data.long_side}
    return sides | {"postprocess": job.postprocess.model_dump(mode="json")}


def artifacts_of(job, name, number):
    location = store_of(job).client.get_model_version_download_uri(name, str(number))
    return Path(urlparse(location).path)


TOLERANT = "registry.gate.ap_tolerance=1"


def test_the_champion_is_measured_as_the_candidate_and_as_itself_each_once(
    job, name, register, make_up_evaluations
):
    sides = []

    def share(trained, job):
        sides.append((trained.data.short_side, job.data.short_side))
        if trained.data.short_side == 96:
            return 0.7
        return 1.0 if job.data.short_side == 64 else 0.4

    make_up_evaluations(share)
    register(1.0)
    register(0.7, "data.short_side=96", "data.long_side=96")
    assert promote(job, name, 1, TOLERANT).action == "promoted"
    decision = promote(job, name, 2, TOLERANT)
    assert decision.action == "refused"
    assert decision.figures["gain"]["ap"] > 0
    assert "the champion (version 1, at its own settings) 1.0000: -" in " ".join(decision.reasons)
    assert "Version 1 was measured with data.short_side 64 -> 96, data.long_side 64 -> 96." in (
        decision.reasons
    )
    assert sides == [(64, 64), (96, 96), (64, 96)]  # what was measured of version 1 is used again


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:100]])
def test_a_measurement_whose_file_is_damaged_counts_as_none(job, client, damage):
    run = client.create_run(client.create_experiment(f"damage {damage(b'some')!r}"))
    version = Version("m", 1, [], run.info.run_id, 0, {})
    kept = measured(0.5)
    measurement.keep(store_of(job), version, kept)
    assert measurement.recall(store_of(job), version, kept.key).protocol == kept.protocol
    (file,) = Path(urlparse(run.info.artifact_uri).path).rglob("*.npz")
    file.write_bytes(damage(file.read_bytes()))
    assert measurement.recall(store_of(job), version, kept.key) is None


def test_a_benchmark_under_the_same_protocol_counts(
    job, name, register, make_up_evaluations, tmp_path
):
    make_up_evaluations(lambda trained, job: 1.0)
    register(1.0)
    (picture := tmp_path / "latency.png").write_bytes(b"")

    def benchmark(fps, **changed):
        timing = Timing("float32", fps, {"p50": 1.0}, 0, protocol_of(job) | changed, [1.0])
        run_id = models.find(store_of(job), name, "1").run_id
        keep(store_of(job), run_id, Benchmark([timing], 1, 1, (64, 64), time.time()), picture)

    benchmark(50.0, images=7)
    decision = promote(job, name, 1, "registry.gate.fps_floor=40")
    assert (decision.action, decision.reasons[-1]) == ("refused", "FPS 30.0, the floor is 40.")
    benchmark(50.0)
    decision = promote(job, name, 1, "registry.gate.fps_floor=40")
    assert decision.action == "promoted"
    assert decision.reasons[-1] == "FPS 50.0 in its benchmark, the floor is 40."


def test_a_champion_that_cannot_be_measured_is_a_refusal_on_record(
    job, name, client, register, make_up_evaluations
):
    make_up_evaluations(lambda trained, job: 1.0)
    register(1.0)
    register(1.0, "seed=1", "postprocess.nms_iou=0.5")  # nothing is kept of the champion at that
    promote(job, name, 1)

    def fail(error):
        def share(trained, job):
            if trained.seed == 0:
                raise error
            return 1.0

        make_up_evaluations(share)

    fail(JobFailedError("class 2 is 'square', but 'triangle' in the model"))
    decision = promote(job, name, 2)
    assert decision.action == "refused"
    assert "cannot be measured: class 2 is 'square'" in decision.reasons[-2]
    fail(ClusterError("the cluster has no GPU"))  # which says nothing of the champion
    with pytest.raises(ClusterError):
        promote(job, name, 2)
    shutil.rmtree(artifacts_of(job, name, 1))
    decision = promote(job, name, 2)
    assert decision.action == "refused"
    reason = f"The champion (version 1) cannot be measured: {name} version 1: its"
    assert reason in decision.reasons[-2]
    assert history.settle(client, name).decisions[-1] == decision
    decision = promote(job, name, 2, "registry.gate.compare=false")
    assert decision.action == "promoted"
    assert decision.reasons[1].startswith("Not compared with the champion (version 1)")


def test_a_version_with_unfit_files_is_refused_before_it_is_measured(
    job, name, register, make_up_evaluations
):
    def share(trained, job):
        raise AssertionError("measured")

    make_up_evaluations(share)
    register(1.0)
    folder = artifacts_of(job, name, 1)
    (folder / "code" / "extra.pkl").write_bytes(b"")
    (weights,) = (folder / "artifacts" / "checkpoint").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    decision = promote(job, name, 1)
    assert decision.action == "refused"
    extra, damage = decision.reasons
    assert extra.startswith("Artifact code/extra.pkl is none of those that a registration writes")
    assert damage.startswith("It cannot be loaded: ")
    assert decision.figures == {}


def test_a_promoted_version_loads_only_with_the_checkpoint_that_was_measured(
    job, name, register, make_up_evaluations, tmp_path
):
    make_up_evaluations(lambda trained, job: 1.0)
    register(1.0)
    decision = promote(job, name, 1)
    folder = artifacts_of(job, name, 1) / "artifacts" / "checkpoint"
    assert decision.figures["candidate"]["checkpoint"] == model_digest(folder)
    assert models.fetch_checkpoint(store_of(job), f"models:/{name}@champion", tmp_path).is_dir()
    about = folder / "about.json"
    about.write_text(about.read_text().replace("ellipse", "triangl", 1))
    write_checksums(folder, ["about.json"])
    for reference in ("@champion", "/1"):
        with pytest.raises(models.RegistryError, match="is not the one that was measured for its"):
            models.load(f"models:/{name}{reference}", store_of(job))


@pytest.mark.ray
def test_versions_are_promoted_and_rolled_back_after_a_training(trained):
    """The training's own gate has measured the first version on the cluster."""
    job, result, _ = trained
    job, client = derive(JobConfig, job, ["cluster.workers=0"]), store_of(job).client
    first = history.settle(client, "shapes").decisions[0]
    assert (first.action, first.version, first.aliases) == ("promoted", 1, {"champion": 1})
    assert first.figures["candidate"]["AP"] == pytest.approx(result.metrics["AP"], abs=1e-9)
    assert first.commit == git_state()[0]
    assert result.decision == first
    decision = promote(job, "shapes", 2)
    assert decision.action == "promoted", decision.reasons
    assert decision.figures["gain"] == {"ap": 0, "low": 0, "high": 0}
    assert "+0.0000 (95 % interval +0.0000 to +0.0000, within the noise)" in decision.reasons[1]
    assert history.settle(client, "shapes").aliases == {"champion": 2, "previous": 1}
    kept = json.loads(client.get_model_version("shapes", "2").tags.popitem()[1])
    assert kept["figures"] == decision.figures
    gate.rollback(store_of(job), "shapes", "worse in the field")
    assert history.settle(client, "shapes").aliases == {"champion": 1, "previous": 2}
    assert [version.name for version in models.list_versions(store_of(job))] == ["shapes", "shapes"]
