"""Where and how a job runs, and the rooms that the code is laid out in."""

import hashlib
import json
from itertools import product
from pathlib import Path

import boto3
import pytest
import torch
import yaml

from gfl.config.loader import (
    JOB_SECTIONS,
    ConfigError,
    derive,
    flatten,
    load_config,
    reproducible,
)
from gfl.config.schema import Config
from gfl.files import write_atomically
from gfl.model.detector import Detector
from gfl_platform.config import JobConfig, load_job
from gfl_platform.registry import models
from gfl_platform.registry.models import Version
from gfl_platform.storage.files import StorageError
from gfl_platform.storage.s3 import S3Error
from gfl_platform.storage.storage import Storage
from gfl_platform.training import sources
from gfl_platform.training.sources import fetch_model, fetch_sources, fetch_weights
from tests.support.tracking import store_of

ROOT = Path(__file__).parents[2]


def test_the_sections_that_gfl_skips_are_those_of_the_job():
    assert set(JobConfig.model_fields) - set(Config.model_fields) == JOB_SECTIONS


def test_a_job_is_a_configuration_and_more():
    overrides = ["cluster.workers=3", "loss.qfl.beta=1.5"]
    job = load_job("configs/demo.yaml", overrides)
    assert job.cluster.workers == 3
    assert reproducible(job) == load_config("configs/demo.yaml", overrides)
    assert type(reproducible(job)) is Config


SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("table_*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_point_of_a_published_sweep_is_a_configuration(path):
    job = load_job(path)
    space, values = job.sweep.space, flatten(job.model_dump(mode="json", exclude={"sweep"}))
    points = list(product(*(keys.values for keys in space.values())))
    configurations = {
        derive(Config, reproducible(job), [f"{key}={json.dumps(value)}" for key, value in
                                           zip(space, point, strict=True)]).model_dump_json()
        for point in points
    }  # fmt: skip
    assert len(configurations) == len(points)
    assert tuple(values[key] for key in space) in points
    published = [tuple(row.at[key] for key in space) for row in job.sweep.published.rows]
    assert sorted(published) == sorted(points)


@pytest.mark.parametrize("path", [p for p in SWEEPS if "demo" not in p.stem], ids=lambda p: p.stem)
def test_the_small_twin_of_a_sweep_tries_the_same(path):
    job, twin = load_job(path), load_job(path.with_stem(f"{path.stem}_demo"))
    for section in ("space", "published"):
        assert getattr(twin.sweep, section) == getattr(job.sweep, section)
    assert (twin.model.edges, twin.model.quality) == (job.model.edges, job.model.quality)
    assert (twin.model.reg_max, twin.model.bin_width) == (job.model.reg_max, job.model.bin_width)
    assert (twin.cluster.workers, job.cluster.workers) == (1, 8)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster.wrokers=2", r"cluster\.wrokers: unknown key; did you mean 'workers'\?"),
        ("cluster.workers=-1", r"cluster\.workers: got -1"),
        ("cluster.workers=[0, 2]", r"cluster\.workers: got \[0, 2\]"),
        ("cluster.workers=[2, 1]", r"cluster\.workers: got \[2, 1\]: expected a number .* or \["),
        ("cluster.workers=[true, 2]", r"cluster\.workers: got \[True, 2\]"),
        (
            "{cluster: {workers: [1, 2]}, model: {backbone: {sync_norm: true}}}",
            r"cluster\.workers: \[1, 2\]: BatchNorm cannot be synchronised",
        ),
        (
            "{cluster: {workers: [1, 2]}, sweep: {space: {seed: {grid: [1]}}}}",
            r"cluster\.workers: \[1, 2\]: trials of a sweep have a fixed number",
        ),
        ("run.name=a/b", r"run\.name: got 'a/b'"),
        ("run.name=..", r"run\.name: got '\.\.'"),
        ("registry.name=gfl.v2", r"registry\.name: got 'gfl\.v2'"),
        ("registry={name: a, alias: Latest}", "alias 'Latest' means a version"),
        ("registry={name: a, alias: v3}", "alias 'v3' means a version"),
        ("registry.alias=champion", r"'champion' of which model\? set registry\.name"),
    ],
)
def test_a_mistake_in_a_section_of_the_job_is_named(override, message):
    words = yaml.safe_load(override) if override.startswith("{") else {}
    overrides = [f"{key}={json.dumps(value)}" for key, value in words.items()] or [override]
    with pytest.raises(ConfigError, match=message):
        load_job("configs/demo.yaml", overrides)


def test_workers_are_a_number_or_the_least_and_the_most():
    assert load_job("configs/demo.yaml", ["cluster.workers=[1,2]"]).cluster.workers == (1, 2)
    assert load_job("configs/demo.yaml", ["cluster.workers=null"]).cluster.workers is None


def test_the_tracking_store_is_chosen_by_configuration_environment_and_default(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    plain = load_job("configs/demo.yaml", ["storage.root=/somewhere"])
    assert store_of(plain).uri == "sqlite:////somewhere/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking")
    assert store_of(plain).uri == "http://tracking"
    chosen = load_job("configs/demo.yaml", ["tracking.uri=http://chosen"])
    assert store_of(chosen).uri == "http://chosen"


def test_run_folders_are_new_or_resumed(tmp_path):
    job = load_job("configs/demo.yaml", [f"storage.root={tmp_path}"])
    storage = Storage(job.storage)
    folder = storage.open_run_folder("one", resume=False)
    assert storage.open_run_folder("one", resume=True) == folder == tmp_path / "runs" / "one"
    with pytest.raises(StorageError, match="exists"):
        storage.open_run_folder("one", resume=False)
    with pytest.raises(StorageError, match="start it without --resume"):
        storage.open_run_folder("zzz", resume=True)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "old")
    with pytest.raises(TypeError):
        write_atomically(path, 3)
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new"


@pytest.fixture
def job(tmp_path):
    where = [f"storage.root={tmp_path}/outputs", f"storage.cache={tmp_path}/cache"]
    return load_job(ROOT / "configs" / "demo.yaml", where)


def test_weights_come_from_a_path_or_from_torchvision(job, tmp_path, monkeypatch):
    assert fetch_weights(store_of(job), "some/file.pth") == Path("some/file.pth")
    with pytest.raises(StorageError, match="torchvision has no such model"):
        fetch_weights(store_of(job), "torchvision://resnet9000")
    for location in ("ftp://x", "http://x/best.pth"):
        with pytest.raises(StorageError, match=rf"{location}: expected a file, s3://.*not http://"):
            fetch_weights(store_of(job), location)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"cannot be downloaded .* put the file at"):
        fetch_weights(store_of(job), "torchvision://resnet18")
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    cached = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    cached.write_bytes(b"damaged")
    with pytest.raises(StorageError, match=r"cannot be downloaded"):
        fetch_weights(store_of(job), "torchvision://resnet18")
    monkeypatch.setattr(sources, "_published_digits", lambda path: sha256(b"cached")[:8])
    cached.write_bytes(b"cached")
    assert fetch_weights(store_of(job), "torchvision://resnet18").read_bytes() == b"cached"


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def web(monkeypatch, tmp_path):
    """Contents by URL, in place of the web, beside a file of the same name in torch's folder."""
    contents = {}
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "best.pth").write_bytes(b"somebody else's")
    monkeypatch.setattr(sources, "_download", lambda url, path: path.write_bytes(contents[url]))
    return contents


def test_weights_of_two_addresses_are_not_one_because_their_files_are_called_alike(job, web):
    web |= {"https://a.org/best.pth": b"a", "https://b.org/best.pth?version=2": b"b"}
    for _ in range(2):
        for address, content in web.items():
            path = fetch_weights(store_of(job), address)
            assert (path.name, path.read_bytes()) == ("best.pth", content)
    web.clear()
    assert fetch_weights(store_of(job), "https://a.org/best.pth").read_bytes() == b"a"


def test_weights_with_a_checksum_are_those_or_none(job, web, tmp_path):
    web["https://a.org/best.pth"] = b"right"
    right, wrong = (f"https://a.org/best.pth#sha256={sha256(c)}" for c in (b"right", b"wrong"))
    for _ in range(2):
        with pytest.raises(StorageError, match=r"has the SHA-256 .*, not .*; correct the checksum"):
            fetch_weights(store_of(job), wrong)
        assert not list((tmp_path / "outputs").rglob("best.pth"))
    assert fetch_weights(store_of(job), right).read_bytes() == b"right"
    with pytest.raises(StorageError, match=r"best.pth: its SHA-256 is .*, not "):
        fetch_weights(store_of(job), wrong)
    (tmp_path / "mine.pth").write_bytes(b"right")
    mine = f"{tmp_path}/mine.pth#sha256="
    assert fetch_weights(store_of(job), mine + sha256(b"right")) == tmp_path / "mine.pth"
    with pytest.raises(StorageError, match=r"mine.pth: its SHA-256 is .*, not abc; correct"):
        fetch_weights(store_of(job), f"{mine}abc")


def test_models_of_two_registries_are_not_one_because_they_are_called_alike(job, monkeypatch):
    """Both have `shapes` version 1; the second registry's is fetched although one is kept."""
    store, versions = store_of(job), [Version("shapes", 1, [], run, 0, {}) for run in "ab"]
    fetched = []

    def fetch_checkpoint(store, model, scratch):
        fetched.append(model)
        (scratch / "checkpoint").mkdir()
        (scratch / "checkpoint" / "about.json").write_text(str(len(fetched)))
        return scratch / "checkpoint"

    monkeypatch.setattr(models, "fetch_checkpoint", fetch_checkpoint)
    for version in (*versions, *versions):
        monkeypatch.setattr(models, "version_of", lambda *_, version=version: version)
        about = fetch_model(store, "models:/shapes@champion") / "about.json"
        assert about.read_text() == str(1 + versions.index(version))
    assert fetched == ["models:/shapes/1"] * 2


@pytest.mark.usefixtures("new_client")
def test_weights_come_from_s3_once(job, monkeypatch):
    from moto.server import ThreadedMotoServer

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        s3 = boto3.client("s3")
        s3.create_bucket(Bucket="models")
        s3.put_object(Bucket="models", Key="a/gfl.pth", Body=b"weights")
        s3.put_object(Bucket="models", Key="c/gfl.pth", Body=b"others")
        path = fetch_weights(store_of(job), "s3://models/a/gfl.pth")
        assert fetch_weights(store_of(job), "s3://models/c/gfl.pth").read_bytes() == b"others"
        assert path.read_bytes() == b"weights"
        with pytest.raises(S3Error, match=r"s3://models/b\.pth: nothing is there"):
            fetch_weights(store_of(job), "s3://models/b.pth")
        assert [file.name for file in path.parent.iterdir()] == ["gfl.pth"]
        s3.put_object(Bucket="models", Key="a/gfl.pth", Body=b"changed")
        assert fetch_weights(store_of(job), "s3://models/a/gfl.pth").read_bytes() == b"changed"
    finally:
        server.stop()


def test_what_stays_random_although_it_is_frozen_is_said_before_training(job, tmp_path, caplog):
    assert fetch_sources(job, store_of(job)) == {"weights": None, "teacher": None}
    assert caplog.text == ""
    frozen = derive(JobConfig, job, ["model.backbone.frozen_stages=1"])
    fetch_sources(frozen, store_of(frozen))
    assert "model.pretrained is null" in caplog.text


def test_weights_that_do_not_fit_are_refused_before_training(job, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)  # on a cluster they may lie on other nodes
    path = tmp_path / "seven.pth"
    torch.save(
        Detector(derive(Config, reproducible(job), ["model.num_classes=7"])).state_dict(), path
    )
    starting = derive(JobConfig, job, [f"model.pretrained={path}"])
    with pytest.raises(ValueError, match=r"num_classes 7, the model has 3.*reset_classifier=true"):
        fetch_sources(starting, store_of(starting))
    reset = derive(JobConfig, starting, ["model.reset_classifier=true"])
    assert fetch_sources(reset, store_of(reset))["weights"] == path


def test_no_file_of_ours_shadows_the_standard_library():
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert not (ROOT / "tests" / "platform").exists()


def test_what_moved_with_the_root_is_found_there(job, tmp_path):
    storage, old = store_of(job).storage, tmp_path / "old disk" / "outputs"
    now = storage.root / "artifacts" / "1" / "config.yaml"
    now.parent.mkdir(parents=True)
    now.touch()
    place = old / "artifacts" / "1" / "config.yaml"
    assert storage.moved(str(place)) == storage.moved(place.as_uri()) == now
    assert storage.moved(str(old / "m-1" / "artifacts")) is None  # not root / "artifacts"
    for other in ("s3://bucket/artifacts/1", "models:/artifacts/1", "", str(now)):
        assert storage.moved(other) is None
