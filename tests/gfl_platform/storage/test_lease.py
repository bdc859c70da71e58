"""Two machines over one bucket: one of them has a run, and the other harms nothing."""

import json
import os
import signal
import subprocess
import sys
import time

import boto3
import pytest
from ray.train import Checkpoint

from gfl_platform.config import StorageConfig
from gfl_platform.storage import lease
from gfl_platform.storage.files import StorageError
from gfl_platform.storage.lease import LEASE_FILE, LOST_STATUS, leased
from gfl_platform.storage.s3 import S3UnavailableError, list_objects, read_versioned
from gfl_platform.storage.storage import RunFolder, Storage
from gfl_platform.training.fit import discard_others, inherit_checkpoints
from gfl_platform.training.ray_snapshot import SNAPSHOT_FILE

HOLDER = """
import sys
from gfl_platform.storage import lease
lease.RENEWAL_SECONDS, lease.AGE_SECONDS = 0.2, 1.5
try:
    with lease.leased(sys.argv[1]) as term:
        print("term", term, flush=True)
        sys.stdin.readline()
except ValueError as error:
    print(error, flush=True)
"""


class Holder(subprocess.Popen):
    """Another process that takes the lease of a folder, and keeps it until it is told to end."""

    def __init__(self, folder):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [sys.executable, "-c", HOLDER, folder]
        super().__init__(command, text=True, env=os.environ, **pipes)

    def line(self):
        return self.stdout.readline().strip()


@pytest.fixture
def folder(s3, tmp_path, monkeypatch):
    """A run's folder in the bucket; leases are renewed and grow old in seconds."""
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.2)
    monkeypatch.setattr(lease, "AGE_SECONDS", 1.5)
    return f"s3://gfl/{tmp_path.name}/runs/x"


@pytest.fixture
def holder(folder):
    """Another process that has the lease."""
    process = Holder(folder)
    assert process.line() == "term 1"
    yield process
    process.kill()
    process.communicate()


def record_in(folder):
    return json.loads(read_versioned(f"{folder}/{LEASE_FILE}")[0])


def put(location, content):
    bucket, key = location.removeprefix("s3://").split("/", 1)
    boto3.client("s3").put_object(Bucket=bucket, Key=key, Body=content)


def test_one_of_two_that_begin_at_the_same_moment_has_the_run(folder):
    processes = [Holder(folder), Holder(folder)]
    first, second = sorted(process.line() for process in processes)
    assert "s3://" in first
    assert first.startswith(folder)
    assert second == "term 1"
    for process in processes:
        process.communicate("\n")


def test_a_holder_that_lives_is_named_and_one_that_has_ended_is_followed_at_once(folder, holder):
    with pytest.raises(StorageError, match=rf"in the hands of process {holder.pid} on"):
        leased(folder).__enter__()
    holder.communicate("\n")
    started = time.monotonic()
    with leased(folder) as term:
        assert term == 1
    assert time.monotonic() - started < lease.AGE_SECONDS


def test_the_lease_of_a_killed_holder_is_taken_over_once_it_is_old(folder, holder, caplog):
    holder.kill()
    started = time.monotonic()
    with leased(folder) as term:
        assert term == 2
        assert time.monotonic() - started >= lease.AGE_SECONDS
    assert f"taken over from process {holder.pid}" in caplog.text
    with leased(folder) as term:
        assert term == 2


def test_a_paused_holder_that_wakes_up_ends_at_once(folder, holder):
    os.kill(holder.pid, signal.SIGSTOP)
    with leased(folder) as term:
        assert term == 2
        os.kill(holder.pid, signal.SIGCONT)
        assert holder.wait(20) == LOST_STATUS
        time.sleep(3 * lease.RENEWAL_SECONDS)
        assert record_in(folder)["term"] == 2
        assert str(os.getpid()) in record_in(folder)["holder"]
    assert "another job has taken the run over" in holder.stderr.read()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_a_damaged_lease_ages_like_any_other(folder, content):
    put(f"{folder}/ray-3/{SNAPSHOT_FILE}", b"{}")
    put(f"{folder}/{LEASE_FILE}", content)
    with leased(folder) as term:
        assert term == 4


def test_a_server_that_ignores_conditions_is_told_of_and_not_trusted(s3, folder, caplog):
    with s3.careless(), leased(folder) as term:
        assert term == 1
        assert "ignores conditions of writes" in caplog.text
        assert set(list_objects(folder)) == {"lease-probe"}


def test_a_renewal_whose_answer_was_lost_is_no_loss(folder, monkeypatch):
    """The lease is kept even if no attempt of a request is answered, but only the next request."""
    held, real = lease._Lease(f"{folder}/{LEASE_FILE}"), lease.put_if
    assert held.write(None)

    def lose(*arguments):
        real(*arguments)
        raise S3UnavailableError("no answer")

    monkeypatch.setattr(lease, "put_if", lose)
    with pytest.raises(S3UnavailableError):
        held.write(held.version)
    monkeypatch.setattr(lease, "put_if", lambda *arguments: real(*arguments) and None)
    assert held.write(held.version)
    monkeypatch.setattr(lease, "put_if", real)
    assert held.write(held.version)
    put(held.location, b'{"nonce": "of another"}')
    assert not held.write(held.version)


def test_a_run_that_was_begun_meanwhile_is_not_begun_again(folder, tmp_path):
    """The other job began, and ended, after this one had looked."""
    storage = Storage(StorageConfig(root=folder[: -len("/runs/x")], cache=str(tmp_path)))
    path = storage.open_run_folder("x", resume=False)
    put(f"{folder}/config.yaml", b"seed: 0")
    with pytest.raises(StorageError, match="run 'x' exists"):
        storage.held(path, resume=False).__enter__()
    (path / "config.yaml").write_text("seed: 0\ndata: {moved: there}")
    put(f"{folder}/run.json", b'{"run_id": "1"}')
    with storage.held(path, resume=True) as held:
        assert (held.path / "run.json").read_text() == '{"run_id": "1"}'
        assert "moved" in read_versioned(f"{folder}/config.yaml")[0]


def test_what_an_earlier_holder_deletes_is_not_what_the_new_one_has(folder, tmp_path):
    storage = Storage(StorageConfig(root=folder[: -len("/runs/x")], cache=str(tmp_path)))
    first = RunFolder(storage, storage.root / "runs" / "x")
    names = [SNAPSHOT_FILE, "checkpoint_1/weights", "checkpoint_2/weights"]
    for name in names:
        put(f"{folder}/ray/{name}", name.encode())
    inherit_checkpoints(first)
    second = RunFolder(storage, first.path, term=2)
    inherit_checkpoints(second)
    storage.discard(first.checkpoints / "checkpoint_1")
    put(f"{folder}/ray/{SNAPSHOT_FILE}", b"of a holder that woke up")
    assert set(list_objects(f"{folder}/ray-2")) == set(names)
    assert read_versioned(f"{folder}/ray-2/{SNAPSHOT_FILE}")[0] == SNAPSHOT_FILE
    inherit_checkpoints(second)  # It has them already: its driver was started again.
    assert set(list_objects(f"{folder}/ray-2")) == set(names)
    put(f"{folder}/ray-3/checkpoint_1/weights", b"half a copy, of a holder that was killed")
    fourth = RunFolder(storage, first.path, term=4)
    inherit_checkpoints(fourth)
    assert set(list_objects(f"{folder}/ray-4")) == set(names)
    discard_others(fourth, [Checkpoint("/anywhere/checkpoint_2")])
    assert set(list_objects(folder)) == {f"ray-4/{SNAPSHOT_FILE}", "ray-4/checkpoint_2/weights"}
