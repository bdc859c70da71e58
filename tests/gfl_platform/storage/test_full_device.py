"""Checkpoints that find no space, on a real device that is small, and one that is damaged."""

import subprocess

import pytest
import torch

from gfl.checkpoint.files import WEIGHTS, read_about, require_whole
from gfl.checkpoint.snapshot import load_checkpoint
from gfl_platform.cluster.events import CheckpointDamaged, EpochEvaluated
from gfl_platform.cluster.launch import JobFailedError
from gfl_platform.config import load_job
from gfl_platform.tracking.status import read_status
from gfl_platform.training import train

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.usefixtures("ray_cluster"),
]


@pytest.fixture
def device(tmp_path):
    """A folder on a device that holds one checkpoint and a half, and a function that makes room."""
    folder = tmp_path / "device"
    folder.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=200m", "none", folder)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting is not permitted here: {error}")
    yield folder, lambda: mount("-o", "remount,size=2g", folder)
    subprocess.run(["umount", "--lazy", folder], check=True)


def mount(*words):
    subprocess.run(["mount", *words], check=True, capture_output=True)


def test_neither_a_full_device_nor_a_damaged_checkpoint_changes_a_digit(trained, tiny_file, device):
    root, make_room = device
    job = load_job(tiny_file, [f"storage.root={root}"])
    with pytest.raises(
        JobFailedError, match="no space left on the device for a checkpoint"
    ) as error:
        train.train(job, "full", resume=False, watch=print)
    assert "without deleting checkpoints of this run, then use --resume" in str(error.value)
    assert "\n" not in str(error.value)
    (kept,) = (root / "runs" / "full" / "ray").glob("checkpoint_2*")  # nothing is half there
    require_whole(kept)
    assert read_about(kept).epoch == 1
    assert read_status(root / "runs" / "full")["state"] == "failed"
    make_room()
    result = train.train(job, "full", resume=True, watch=print)
    require_same(result, trained[1])
    latest = max((root / "runs" / "full" / "ray").glob("checkpoint_2*"))
    damage(latest / WEIGHTS)
    events = []
    again = train.train(job, "full", resume=True, watch=events.append)
    (damaged,) = [event for event in events if isinstance(event, CheckpointDamaged)]
    assert str(latest.name) in damaged.reason
    evaluated = [event for event in events if isinstance(event, EpochEvaluated)]
    assert [event.epoch for event in evaluated if not event.repeated] == [3]
    require_same(again, trained[1])


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def require_same(result, undisturbed):
    assert result.metrics == undisturbed.metrics
    weights, others = (
        load_checkpoint(each.checkpoint)[0].state_dict() for each in (result, undisturbed)
    )
    for key, value in weights.items():
        assert torch.equal(value, others[key]), key
