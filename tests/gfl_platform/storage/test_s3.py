"""Data and checkpoints on S3, against a real S3 API on loopback."""

import json
import os
import signal
import subprocess
import sys

import boto3
import pytest

from gfl.config.loader import ConfigError
from gfl_platform.cluster.events import CheckpointSaved
from gfl_platform.config import StorageConfig, TrackingConfig, load_job
from gfl_platform.registry.models import fetch_checkpoint
from gfl_platform.storage.cache import LISTING, MANIFEST, Cache
from gfl_platform.storage.files import StorageError
from gfl_platform.storage.s3 import (
    S3Error,
    S3UnavailableError,
    client,
    list_objects,
    patiently,
    remove,
    require_bucket,
    upload,
)
from gfl_platform.storage.storage import Storage
from gfl_platform.tracking.client import Store, TrackingError
from gfl_platform.training import train
from tests.support.tracking import store_of


@pytest.fixture
def bucket(s3):
    """A function that puts objects, by key."""

    def put(**objects):
        for key, content in objects.items():
            boto3.client("s3").put_object(Bucket="gfl", Key=f"set/{key}.txt", Body=content.encode())

    yield put
    remove("s3://gfl/set")


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", 1000)


def next_job(cache):
    """The cache as another job of this process sees it, which lists the bucket again."""
    return Cache(cache.folder, cache.limit)


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_what_is_local_stays_where_it_is(cache, tmp_path):
    assert cache.local(str(tmp_path)) == tmp_path


def test_a_folder_is_copied_once_and_follows_its_original(bucket, cache, monkeypatch):
    bucket(a="one", b="two", c="three")
    folder = cache.local("s3://gfl/set")
    assert contents(folder) == {"a.txt": "one", "b.txt": "two", "c.txt": "three"}
    unchanged = (folder / "a.txt").stat().st_mtime_ns
    bucket(b="deux")
    boto3.client("s3").delete_object(Bucket="gfl", Key="set/c.txt")
    assert contents(cache.local("s3://gfl/set")) == {
        "a.txt": "one",
        "b.txt": "two",
        "c.txt": "three",
    }
    again = next_job(cache)
    assert contents(again.local("s3://gfl/set")) == {"a.txt": "one", "b.txt": "deux"}
    assert (folder / "a.txt").stat().st_mtime_ns == unchanged
    assert cache.local("s3://gfl/set/b.txt").read_text() == "deux"


def test_a_damaged_copy_and_an_interrupted_one_are_mended(bucket, cache):
    bucket(a="one", b="two")
    folder = cache.local("s3://gfl/set")
    (folder / "a.txt").write_text("on")  # another size
    (folder / "b.txt").unlink()
    assert contents(cache.local("s3://gfl/set")) == {"a.txt": "one", "b.txt": "two"}
    assert set(json.loads((folder.parent / MANIFEST).read_text())) == {"a.txt", "b.txt"}


@pytest.mark.parametrize("content", ["", "{", "[]", "\0\0\0", None])
def test_a_damaged_manifest_is_rebuilt_from_the_files(bucket, cache, caplog, content):
    bucket(a="one", b="two")
    folder = cache.local("s3://gfl/set")
    path, unchanged = folder.parent / MANIFEST, (folder / "a.txt").stat().st_mtime_ns
    (folder / "b.txt").write_text("2wo")
    (folder / "gone.txt").write_text("from an earlier job")
    for name in (MANIFEST, LISTING):
        if content is None:
            (folder.parent / name).unlink()
        else:
            (folder.parent / name).write_text(content)
    assert contents(next_job(cache).local("s3://gfl/set")) == {"a.txt": "one", "b.txt": "two"}
    assert (folder / "a.txt").stat().st_mtime_ns == unchanged
    assert set(json.loads(path.read_text())) == {"a.txt", "b.txt"}
    assert caplog.text.count(MANIFEST) == (0 if content is None else 1)


def test_one_process_of_a_node_lists_the_bucket_for_all(bucket, cache, tmp_path):
    bucket(a="one", b="two")
    child = (
        "import sys; from pathlib import Path; from gfl_platform.storage import cache\n"
        "real = cache.list_objects\n"
        "def counted(location):\n"
        f"    Path({str(tmp_path)!r}, 'calls').open('a').write(location + ' ')\n"
        "    return real(location)\n"
        "cache.list_objects = counted\n"
        f"here = cache.Cache(Path({str(cache.folder)!r}), 1000, sys.argv[1])\n"
        "assert len(list(here.local('s3://gfl/set').iterdir())) == 2"
    )

    def start(job, count):
        command = [sys.executable, "-c", child, job]
        processes = [subprocess.Popen(command, env=os.environ) for _ in range(count)]
        assert [process.wait() for process in processes] == [0] * count
        return (tmp_path / "calls").read_text().split()

    assert start("one", 4) == ["s3://gfl/set"]
    assert start("one", 1) == ["s3://gfl/set"]  # A worker that starts later, or again.
    assert start("two", 1) == 2 * ["s3://gfl/set"]


def test_an_object_that_changes_during_a_job_is_read_again(bucket, cache):
    bucket(a="one")
    folder = cache.local("s3://gfl/set")
    bucket(a="uno")
    (folder / "a.txt").unlink()
    with pytest.raises(S3Error, match="changed while it was read; try again"):
        cache.local("s3://gfl/set")
    assert contents(cache.local("s3://gfl/set")) == {"a.txt": "uno"}


def test_a_download_that_is_killed_goes_on_where_it_was(bucket, cache):
    bucket(a="one", b="two")
    child = (
        "import os, signal, sys; from pathlib import Path; from gfl_platform.storage import cache\n"
        "cache.REPORT_SECONDS, cache.DOWNLOADS = 0, 1\n"
        "cache.logger.info = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"cache.Cache(Path({str(cache.folder)!r}), 1000).local('s3://gfl/set')"
    )
    killed = subprocess.run([sys.executable, "-c", child], env=os.environ, check=False)
    assert killed.returncode == -signal.SIGKILL
    (first,) = cache.folder.glob("*/files/a.txt")
    arrived = first.stat().st_mtime_ns
    assert contents(cache.local("s3://gfl/set")) == {"a.txt": "one", "b.txt": "two"}
    assert first.stat().st_mtime_ns == arrived


@pytest.mark.parametrize("name", ["../../../outside", "a/../../../b", "/c", "d\\e"])
def test_a_key_that_leads_out_of_the_copy_is_refused(bucket, cache, name):
    """Such a key wrote, and later deleted, files anywhere on every node that read the folder."""
    bucket(a="one")
    boto3.client("s3").put_object(Bucket="gfl", Key=f"set/{name}", Body=b"hostile")
    with pytest.raises(S3Error, match=r"s3://gfl/set: .*rename it"):
        cache.local("s3://gfl/set")
    files = [path for path in cache.folder.parent.rglob("*") if path.is_file()]
    assert {path.name for path in files} <= {
        "downloading.lock",
        "used.lock",
        "evicting.lock",
        LISTING,
    }


def test_a_location_that_leads_out_of_the_copy_is_refused(bucket, cache):
    boto3.client("s3").put_object(Bucket="gfl", Key="set/..", Body=b"hostile")
    with pytest.raises(S3Error, match="rename it"):
        cache.local("s3://gfl/set/..")


def test_a_key_that_leads_out_of_a_run_is_refused(s3, tmp_path):
    hostile = "runs/hostile/trials/../run.json"
    boto3.client("s3").put_object(Bucket="gfl", Key=f"{tmp_path.name}/{hostile}", Body=b"{}")
    storage = Storage(StorageConfig(root=f"s3://gfl/{tmp_path.name}", cache=str(tmp_path)))
    with pytest.raises(ValueError, match=r"'trials/\.\./run\.json': not a name"):
        storage.find_run_folder("hostile", resume=True)


def test_names_that_begin_alike_are_no_folder(bucket, cache):
    bucket(a="one")
    boto3.client("s3").put_object(Bucket="gfl", Key="settings.txt", Body=b"x")
    boto3.client("s3").put_object(Bucket="gfl", Key="set/")  # as Arrow marks a folder
    assert set(list_objects("s3://gfl/set")) == {"a.txt"}


def test_unused_copies_give_way_and_used_ones_do_not(bucket, cache, tmp_path):
    bucket(a="x" * 400, b="y" * 400, c="z" * 400)
    child = (
        "from gfl_platform.storage.cache import Cache; from pathlib import Path; import sys; "
        f"Cache(Path({str(cache.folder)!r}), 1000).local('s3://gfl/set/a.txt'); "
        "print('there', flush=True); sys.stdin.read()"
    )
    # In another process, which holds its copy while it lives.
    holder = subprocess.Popen(
        [sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ
    )
    assert holder.stdout.readline() == b"there\n"
    other = Cache(cache.folder, 1000)
    subprocess.run(
        [sys.executable, "-c", child.replace("a.txt", "b.txt")],
        check=True,
        stdin=subprocess.DEVNULL,
    )
    other.local("s3://gfl/set/c.txt")  # b gives way: nobody uses it
    names = sorted(path.name for path in cache.folder.glob("*/files/*"))
    assert names == ["a.txt", "c.txt"]
    holder.communicate()


def test_what_does_not_fit_is_said(bucket, cache):
    bucket(a="x" * 2000)
    with pytest.raises(S3Error, match=r"do not fit into storage\.cache_gb"):
        cache.local("s3://gfl/set")


def test_what_does_not_fit_besides_what_is_in_use_is_said(bucket, cache):
    bucket(a="x" * 600, b="y" * 600)
    first = cache.local("s3://gfl/set/a.txt")  # this process keeps it
    with pytest.raises(S3Error, match=r"set/b\.txt: .* raise it, or wait until those have ended"):
        cache.local("s3://gfl/set/b.txt")
    assert first.read_text() == "x" * 600


def test_what_passes_is_tried_again(monkeypatch):
    monkeypatch.setattr("gfl_platform.storage.s3.time.sleep", lambda _: None)
    failures = [S3UnavailableError("503"), S3UnavailableError("refused"), None, S3Error("denied")]

    def fail_or(result):
        if error := failures.pop(0):
            raise error
        return result

    assert patiently(lambda: fail_or("result"), S3UnavailableError) == "result"
    with pytest.raises(S3Error, match="denied"):
        patiently(lambda: fail_or("result"), S3UnavailableError)


def test_a_service_that_is_away_is_no_mistake(s3, new_client, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(S3UnavailableError, match="check AWS_ENDPOINT_URL and the network"):
        require_bucket("s3://gfl/away")


def test_an_upload_that_was_killed_is_completed(bucket, s3, tmp_path):
    (tmp_path / "teacher").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "teacher" / name).write_text(name)
    storage = Storage(StorageConfig(root="s3://gfl/set", cache=str(tmp_path / "cache")))
    location = storage.shared(tmp_path / "teacher")
    whole = list_objects(location)
    assert set(whole) == {"a.txt", "b.txt"}
    boto3.client("s3").delete_object(
        Bucket="gfl", Key=f"{location.removeprefix('s3://gfl/')}/b.txt"
    )
    assert storage.shared(tmp_path / "teacher") == location
    assert list_objects(location) == whole


def test_what_is_not_there_is_named(bucket, cache, new_client, monkeypatch, tmp_path):
    with pytest.raises(S3Error, match="s3://gfl/nothing: nothing is there"):
        cache.local("s3://gfl/nothing")
    with pytest.raises(S3Error, match="s3://nowhere/x: no such bucket"):
        cache.local("s3://nowhere/x")
    with pytest.raises(S3Error, match="expected s3://BUCKET/KEY"):
        cache.local("s3:///x")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # which remembers credentials
    client.cache_clear()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(S3Error, match="no AWS credentials; set AWS_PROFILE"):
        cache.local("s3://gfl/set")


@pytest.fixture
def remote(s3, tiny_file, shapes_folder, tmp_path):
    """A job whose data and storage are on S3."""
    upload(shapes_folder, "s3://gfl/shapes")
    data = [
        f"data.{part}={{images: s3://gfl/shapes/{part}/images, "
        f"annotations: s3://gfl/shapes/{part}/annotations.json}}"
        for part in ("train", "val")
    ]
    return load_job(tiny_file, [*data, f"storage.root=s3://gfl/{tmp_path.name}",
                                f"storage.cache={tmp_path}/cache", "storage.checkpoint_steps=3",
                                "schedule.epochs=1", "cluster.workers=1",
                                f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"])  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_lives_on_s3(remote, tmp_path):
    events = []
    result = train.train(remote, "far", resume=False, watch=events.append)
    saved = [event.step for event in events if isinstance(event, CheckpointSaved)]
    assert saved
    assert all(step % 3 == 0 for step in saved)
    checkpoint = fetch_checkpoint(store_of(remote), f"runs:/{result.run_id}", tmp_path)
    names = {path.name for path in checkpoint.iterdir()}
    assert names >= {"weights.safetensors", "config.yaml", "about.json", "sha256.json"}
    with pytest.raises(StorageError, match=r"run 'far' exists"):
        train.train(remote, "far", resume=False, watch=events.append)
    half = "runs/far/ray/checkpoint_2020-01-01_00-00-00.000000"  # of a worker that was killed
    upload(checkpoint / "about.json", f"{remote.storage.root}/{half}/about.json")
    assert list_objects(f"{remote.storage.root}/{half}")
    again = remote.model_copy(
        update={"storage": remote.storage.model_copy(update={"cache": f"{tmp_path}/elsewhere"})}
    )
    elsewhere = train.train(again, "far", resume=True, watch=events.append)
    assert elsewhere.run_id == result.run_id  # another machine goes on in the same MLflow run
    assert not list_objects(f"{remote.storage.root}/{half}")
    with pytest.raises(ConfigError, match=r"another configuration \(seed 0 -> 1\)"):
        train.train(again.model_copy(update={"seed": 1}), "far", resume=True, watch=print)


@pytest.mark.parametrize("unreachable", ["fail", "spool"])
def test_a_run_on_s3_without_a_tracking_server_is_refused(monkeypatch, tmp_path, unreachable):
    """The only store and registry would have been in the cache of the head, and lost with it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    storage = Storage(StorageConfig(root="s3://gfl/runs", cache=str(tmp_path)))
    store = Store(TrackingConfig(unreachable=unreachable), storage)
    for use in (store.require_ready, store.require_answer, lambda: store.client):
        with pytest.raises(
            TrackingError, match=r"is on S3, .*; set tracking\.uri or MLFLOW"
        ) as error:
            use()
        assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())
    named = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    Store(named, storage).require_ready()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_bucket_that_is_not_there_is_said_before_anything_is_written(tiny_file, s3, tmp_path):
    job = load_job(tiny_file, ["storage.root=s3://nowhere/runs", f"storage.cache={tmp_path}",
                               f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"])  # fmt: skip
    with pytest.raises(S3Error, match="s3://nowhere/runs/runs/x: no such bucket"):
        train.train(job, "x", resume=False, watch=print)
