"""Step times, waiting for images and the use of devices, measured on every worker."""

import time
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist

from gfl.train.metrics import StepMeter
from tests.support.processes import run_workers

STEPS = 4


def train(rank, seconds_to_load, seconds_to_compute):
    """Return the metrics of `STEPS` steps, at whose ends the workers wait for each other."""
    meter = StepMeter(torch.device("cpu"))

    def load():
        for _ in range(STEPS):
            time.sleep(seconds_to_load[rank])
            yield torch.zeros(1)

    for batch in meter.timed(load()):
        time.sleep(seconds_to_compute[rank])
        dist.all_reduce(batch)
        meter.end_step()
    return meter.metrics()


def train_twice(rank):
    """Return the metrics with a slow network on worker 1, and those with a slow loader there."""
    return train(rank, (0, 0), (0.01, 0.2)), train(rank, (0, 0.2), (0.01, 0.01))


def test_a_slow_loader_is_seen_in_the_waiting_of_its_worker_alone():
    first, second = run_workers(2, train_twice)
    assert first == second  # all workers report the same
    slow_network, slow_loader = first
    for metrics in first:
        assert 200 < metrics["step_ms_p50"] <= metrics["step_ms_p99"]
        shares = [metrics[f"worker{rank}.data_wait_share"] for rank in range(2)]
        assert metrics["data_wait_share"] == pytest.approx(sum(shares) / 2)
        assert metrics["worker1.memory_gib"] > 0.01
        assert "worker0.gpu" not in metrics
    assert slow_network["worker1.data_wait_share"] < 0.5 < slow_loader["worker1.data_wait_share"]
    assert slow_loader["worker0.data_wait_share"] < 0.5


def test_the_package_that_asks_a_gpu_how_busy_it_is_is_installed():
    assert find_spec("pynvml")
