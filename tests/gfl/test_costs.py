"""What a step and a start cost, in counts: times jitter, these do not.

Bounds are a little above what it takes today. Host waits are counted in `test_detector.py`, graphs
and recompilations of a compiled step in `test_recipe.py`.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gfl
from benchmarks.cases import parse
from benchmarks.counting import count
from benchmarks.ours import losses_of
from gfl.config.loader import derive
from gfl.data.dataset import collate
from gfl.data.split import load_splits
from gfl.ops import allocator, winograd
from gfl.train.trainer import Trainer

JOBS = sorted((Path(__file__).parents[2] / "jobs").glob("[!_]*.py"))
HEAVY = {
    "torch", "torchvision", "ray", "mlflow", "pandas", "matplotlib", "scipy", "hotcoco", "boto3",
    "optuna", "sklearn", "numpy", "pycocotools",
}  # fmt: skip


@pytest.fixture(scope="module")
def losses():
    """Counts of the losses of two images of 256 x 320 px, by the objects of each."""
    detector = gfl.Detector(gfl.load_config("configs/gfl_r50_1x.yaml"))
    found = {}
    for objects in (10, 100):
        work = losses_of(parse(f"loss-2x256x320-{objects}"), detector, torch.device("cpu"))
        work()
        found[objects] = count(work)
    return found


def test_losses_and_their_gradients_take_few_operations(losses):
    assert losses[10]["operations"] <= 580
    assert losses[10]["kernels"] <= 400
    assert losses[10]["bytes"] <= 30e6


def test_a_hundred_objects_cost_no_more_operations_than_ten(losses):
    for what in ("operations", "kernels"):
        assert losses[100][what] == losses[10][what]


def test_a_location_costs_little_memory():
    """Boxes cost by the objects: a larger image adds to the scores' loss and copies alone."""
    detector = gfl.Detector(gfl.load_config("configs/gfl_r50_1x.yaml"))
    low, high = (
        count(losses_of(parse(f"loss-1x{height}x320-3"), detector, torch.device("cpu")))["bytes"]
        for height in (256, 512)
    )
    more = sum(40 * 32 // 4**level for level in range(5))
    assert (high - low) / more <= 7000  # for 80 + 68 logits of 4 bytes


def test_a_step_of_the_trainer_takes_few_operations(tiny):
    config = derive(type(tiny), tiny, [])
    trainer = Trainer(config, load_splits(config)[0], torch.device("cpu"))
    trainer.parallel.train()
    batch = collate([trainer.dataset[key] for key in trainer.batches.keys(0)])
    trainer.train_step(batch)  # the first makes the optimizer's state
    found = count(lambda: trainer.train_step(batch))
    assert found["waits"] == 0
    assert found["operations"] <= 1700


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
@pytest.mark.parametrize(
    ("before", "environment"), [("allocator.keep_freed_memory()", {}), ("", allocator.KEEPING)]
)
def test_freed_memory_is_taken_again(before, environment):
    """In threads, too; huge pages would hide it."""
    script = f"""if True:
        import ctypes, resource, threading, torch
        from gfl.ops import allocator
        ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE
        def faults():
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        def train():
            for _ in range(20):  # aligned blocks fit only once they have grown together
                before = faults()
                maps = [torch.ones(5 * 2**20) for _ in range(4)]
                del maps
            print(faults() - before)
        {before}
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
    """
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(run.stdout) < 4 * 5 * 2**10 / 10  # of the pages that they take


def test_winograds_algorithm_takes_the_levels_together():
    sizes = [(32 >> level, 40 >> level) for level in range(5)]
    images = [torch.randn(2, 128, *size, requires_grad=True) for size in sizes]
    weight = torch.randn(128, 128, 3, 3, requires_grad=True)

    def step():
        found = winograd.convolution(images, weight, None)
        torch.stack([one.sum() for one in found]).sum().backward()

    step()
    found = count(step)
    assert found["waits"] == 0
    assert found["operations"] <= 560
    assert found["kernels"] <= 180


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [
        ("import gfl", set()),
        ("import gfl_platform", set()),
        ("from gfl import load_config", {"numpy"}),
        *((f"import jobs.{path.stem}", set()) for path in JOBS),
    ],
)
def test_starts_import_what_they_need_alone(statement, allowed):
    names = f"import sys; {statement}; print(*({HEAVY!r} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", names], capture_output=True, text=True, check=True)
    assert set(run.stdout.split()) <= allowed


def test_help_needs_no_torch():
    names = "import sys; from jobs import train; sys.argv = ['train', '--help']; train.main()"
    script = f"import atexit, sys; atexit.register(lambda: print({HEAVY!r} & sys.modules.keys()));"
    run = subprocess.run([sys.executable, "-c", script + names], capture_output=True, text=True)
    assert run.returncode == 0
    assert run.stdout.endswith("set()\n")
