"""Who waits for whom: measured on every worker, told by all of them alike."""

import copy
import time

import torch
import torch.distributed as dist
from tests_support import run_workers

from gfl.train.metrics import SLOW_REPORTS, STEP_TIMES, Pace, of_all

STEPS = 2


class Sleeper(torch.nn.Module):
    """A network that takes its time."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, images):
        time.sleep(self.seconds)
        return images


def _train(rank, seconds_to_load, seconds_to_compute):
    """Return what `rank` hears in six reports; the workers wait for each other in every step."""
    network = Sleeper(seconds_to_compute[rank])
    pace = Pace(network, torch.device("cpu"))

    def load():
        while True:
            time.sleep(seconds_to_load[rank])
            yield torch.zeros(1)

    heard = []
    for number, batch in enumerate(pace.fetched(load()), start=1):
        dist.all_reduce(network(batch))
        pace.note_step()
        if number % STEPS == 0:
            figures = pace.figures()
            heard.append((of_all(figures), pace.stragglers(figures)))
            pace.restart()
        if len(heard) == 2 * SLOW_REPORTS:
            break
    return heard


def _train_twice(rank):
    """Once with a worker whose network is slow, once with one whose loader is."""
    return _train(rank, (0, 0), (0.01, 0.2)), _train(rank, (0, 0.2), (0.01, 0.01))


def test_a_slow_network_and_a_slow_loader_are_told_from_waiting_for_them():
    first, second = run_workers(2, _train_twice)
    assert first == second
    for heard, loader_is_slow in zip(first, (False, True), strict=True):
        named = [stragglers for _, stragglers in heard]
        assert [len(each) for each in named] == [0] * (SLOW_REPORTS - 1) + [1] + [0] * SLOW_REPORTS
        assert named[SLOW_REPORTS - 1][1] > 2
        metrics, _ = heard[-1]
        slow, fast = metrics["worker1.own_ms"], metrics["worker0.own_ms"]
        assert fast < slow / 2  # although both take as long for a step
        assert 200 < slow < metrics["step_ms_p99"] + 1
        assert (metrics["worker1.data_wait_share"] > 0.5) == loader_is_slow
        assert metrics["worker0.data_wait_share"] < 0.5


def test_what_costs_less_than_a_tenth_of_a_step_names_nobody():
    pace = Pace(Sleeper(0), torch.device("cpu"))
    pace._slow = [0, 0]
    worker = dict.fromkeys(STEP_TIMES, 100.0) | {"shares": 1.0}
    for _ in range(2 * SLOW_REPORTS):
        assert pace.stragglers([worker | {"own_ms": 1.0}, worker | {"own_ms": 10.0}]) == {}


def test_a_gpu_can_be_asked_how_busy_it_is():
    assert torch.cuda._HAS_PYNVML


class Moment:
    """Of a GPU: it can neither be copied nor pickled."""

    def __deepcopy__(self, _):
        raise TypeError("cannot pickle 'Event' object")


def test_a_network_is_copied_without_its_times(monkeypatch):
    monkeypatch.setattr(Pace, "_now", lambda _: Moment())
    network = Sleeper(0)
    pace = Pace(network, torch.device("cpu"))
    network(torch.zeros(1))
    copy.deepcopy(network).eval()(torch.zeros(1))
    assert len(pace._forward) == 2
