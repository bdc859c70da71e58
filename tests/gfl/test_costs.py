"""What a step and a start cost, in counts: times jitter, these do not.

Bounds are a little above what it takes today. Host waits are counted in `test_detector.py`, graphs
and recompilations of a compiled step in `test_recipe.py`.
"""

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
from gfl.ops import winograd
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


def test_commands_and_packages_import_nothing_heavy_before_they_need_it():
    """One process imports all commands and prints a help: it would name the first to blame."""
    imports = ["import gfl", "import gfl_platform", *(f"import jobs.{path.stem}" for path in JOBS)]
    script = f"""if True:
        import sys
        def require(allowed, statement):
            heavy = {HEAVY!r} & sys.modules.keys()
            assert heavy <= allowed, f"{{statement}}: {{heavy}}"
        for statement in {imports!r}:
            exec(statement)
            require(set(), statement)
        sys.argv = ["train", "--help"]
        try:
            jobs.train.main()
        except SystemExit as end:
            assert not end.code
        require(set(), "--help")
        from gfl import load_config
        require({{"numpy"}}, "load_config")
        print("all imported")
    """
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "example: python -m jobs.train" in run.stdout
    assert run.stdout.endswith("all imported\n")
