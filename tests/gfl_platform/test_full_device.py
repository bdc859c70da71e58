"""No space left on the device, in the middle of a checkpoint: a real device, a small one."""

import subprocess

import pytest
import torch

from gfl.checkpoint import load_checkpoint, read_about, require_whole
from gfl_platform import training
from gfl_platform.cluster import JobFailedError
from gfl_platform.config import load_job
from gfl_platform.status import read_status

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


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


def test_a_checkpoint_that_finds_no_space_leaves_the_one_before_whole(trained, tiny_file, device):
    root, make_room = device
    job = load_job(tiny_file, [f"storage.root={root}"])
    with pytest.raises(
        JobFailedError, match="no space left on the device for a checkpoint"
    ) as told:
        training.train(job, "full", resume=False, watch=print)
    assert "the one before is whole: free some space and go on with --resume" in str(told.value)
    assert "\n" not in str(told.value)
    (kept,) = (root / "runs" / "full" / "ray").glob("checkpoint_2*")  # nothing is half there
    require_whole(kept)
    assert read_about(kept).epoch == 1
    assert read_status(root / "runs" / "full")["state"] == "failed"
    make_room()
    result = training.train(job, "full", resume=True, watch=print)
    undisturbed = trained[1]
    assert result.metrics == undisturbed.metrics
    weights, others = (
        load_checkpoint(each.checkpoint)[0].state_dict() for each in (result, undisturbed)
    )
    for key, value in weights.items():
        assert torch.equal(value, others[key]), key
