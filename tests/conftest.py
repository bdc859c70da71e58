"""Fixtures that several rooms share: configurations, tiny data, one Ray cluster for the session."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from gfl.config.loader import load_config
from gfl.config.schema import Config
from gfl.data import synthetic
from tests.support import servers

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(items):
    """Make one group of the tests on the session's cluster, and one of each other file.

    With `pytest -n 2 --dist loadgroup` only one worker starts a cluster. Its tests come first, as
    they take longest.

    Raises:
        UsageError: a test needs the cluster, but is marked as a unit test.
    """
    for item in items:
        costly = any(item.get_closest_marker(name) for name in ("ray", "chaos", "slow"))
        on_cluster = "ray_cluster" in item.fixturenames
        if on_cluster and not costly:
            raise pytest.UsageError(f"{item.nodeid} needs the cluster: mark it with `ray`")
        on_cluster = on_cluster or bool(item.get_closest_marker("ray"))
        item.add_marker(pytest.mark.xdist_group("ray" if on_cluster else item.path.stem))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group").args != ("ray",))


@pytest.fixture(scope="session")
def golden():
    """The folder of the reference implementation's numbers."""
    return GOLDEN


@pytest.fixture(scope="session")
def real_data():
    """The folder of real images and evaluation cases."""
    folder = os.environ.get("GFL_TEST_DATA")
    if not folder:
        pytest.skip("GFL_TEST_DATA does not name the folder of real data (coco128, coco_eval)")
    return Path(folder)


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory):
    """A small set of rendered shapes: 36 images to train on, 11 to evaluate."""
    folder = tmp_path_factory.mktemp("shapes")
    synthetic.render(folder / "train", count=36, size=64, seed=0)
    synthetic.render(folder / "val", count=11, size=64, seed=1)
    return folder


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory, shapes_folder):
    """A configuration file that trains three epochs of that set in seconds."""
    path = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    train, val = shapes_folder / "train", shapes_folder / "val"
    path.write_text(
        f"""
base: {ROOT / "configs" / "demo.yaml"}
model: {{channels: 32, tower_convs: 1, reg_max: 8}}
data:
  shapes: null
  train: {{images: {train}/images, annotations: {train}/annotations.json}}
  val: {{images: {val}/images, annotations: {val}/annotations.json}}
  short_side: 64
  long_side: 64
  batch: 8
  val_batch: 3
schedule: {{epochs: 3}}
tracking: {{every_steps: 2}}
"""
    )
    return path


@pytest.fixture(scope="session")
def tiny(tiny_file) -> Config:
    """The configuration in that file."""
    return load_config(tiny_file)


@pytest.fixture
def coco(tmp_path):
    """Return a function that writes a COCO set and returns its (images, annotations)."""

    def write(images=None, annotations=(), categories=None, files=None):
        from PIL import Image

        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        images = images or [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 48}]
        for image in images if files is None else files:
            Image.new("RGB", (image["width"], image["height"])).save(folder / image["file_name"])
        complete = [
            {"id": number, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 100.0, **a}
            for number, a in enumerate(annotations, start=1)
        ]
        content = {
            "images": images,
            "annotations": complete,
            "categories": categories or [{"id": 1, "name": "thing"}],
        }
        path = tmp_path / "annotations.json"
        path.write_text(json.dumps(content))
        return str(folder), str(path)

    return write


@pytest.fixture(scope="session")
def ray_cluster(s3):
    """A local Ray cluster of two CPUs, which jobs in other processes find through RAY_ADDRESS.

    Its processes know the S3 API of the tests.
    """
    import ray

    from gfl_platform.cluster import resources

    torch.set_num_threads(1)
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    resources.connect()
    os.environ.pop("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", None)  # jobs on other clusters need it
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    yield os.environ["RAY_ADDRESS"]
    del os.environ["RAY_ADDRESS"]
    ray.shutdown()


@pytest.fixture(scope="session")
def trained(ray_cluster, tiny_file, tmp_path_factory):
    """A finished training called `first`: its job, its result and all its events.

    Its model is `shapes`, in two versions; the first has passed the gate and is `champion`.
    """
    from gfl_platform.config import load_job
    from gfl_platform.registry import models
    from gfl_platform.training import train
    from tests.support.tracking import store_of

    root, events = tmp_path_factory.mktemp("outputs"), []
    register = "registry={name: shapes, alias: champion}"
    job = load_job(tiny_file, [f"storage.root={root}", register])
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        result = train.train(job, "first", resume=False, watch=events.append)
        figures = {"AP": result.metrics["AP"], "fps": result.fps, "data": "d", "protocol": "p"}
        models.register(store_of(job), "shapes", result.checkpoint, result.run_id, figures)
    return job, result, events


@pytest.fixture(scope="session")
def postgres():
    """The URI of an empty PostgreSQL database."""
    if servers.PostgreSQL.tools is None:
        pytest.skip("PostgreSQL's initdb is not installed")
    database = servers.PostgreSQL()
    database.start()
    yield database.uri
    database.remove()


@pytest.fixture(scope="session")
def s3(tmp_path_factory):
    """An S3 API on loopback that the environment names, with a bucket called `gfl`."""
    import boto3

    from gfl_platform.storage.s3 import client

    server = servers.S3(tmp_path_factory.mktemp("s3"))
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (servers.KEYS | {"AWS_ENDPOINT_URL": server.uri}).items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="gfl")
        client.cache_clear()  # One of a test before would use another endpoint.
        yield server
    server.stop()
    client.cache_clear()


@pytest.fixture
def new_client():
    """The process's client of S3 reads the environment again, in this test and after it."""
    from gfl_platform.storage.s3 import client

    client.cache_clear()
    yield
    client.cache_clear()
