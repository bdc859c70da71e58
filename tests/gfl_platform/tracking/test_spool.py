"""What waits for MLflow outlives the process, keeps its order, and is bounded."""

import shutil
import sqlite3

from gfl_platform.cluster.events import CheckpointDamaged, StepsDone
from gfl_platform.tracking.run import over_workers
from gfl_platform.tracking.spool import SPOOL_FILE, Spool, backlog


def steps(number):
    return StepsDone(number, 99, number / 10, 0.0, {"loss": 1 / 3}, time_ms=123)


def test_events_outlive_the_process_in_their_order(tmp_path):
    spool = Spool(tmp_path / SPOOL_FILE)
    for number in range(5):
        spool.add(steps(number))
    spool.close()
    again = Spool(tmp_path / SPOOL_FILE)
    events = again.first(3)
    assert list(events.values()) == [steps(0), steps(1), steps(2)]
    again.remove(max(events))
    assert backlog(tmp_path) == len(again) == 2
    assert [event.step for event in again.first(9).values()] == [3, 4]


def test_a_run_without_a_spool_has_no_backlog(tmp_path):
    assert backlog(tmp_path) == 0
    assert not (tmp_path / SPOOL_FILE).exists()


def test_numbers_rise_and_outlive_the_process(tmp_path):
    spool = Spool(tmp_path / SPOOL_FILE)
    assert [spool.raise_to("step", n) for n in (3, 3, 2, 4)] == [True, False, False, True]
    assert [spool.count("restarts"), spool.count("restarts")] == [1, 2]
    spool.close()
    again = Spool(tmp_path / SPOOL_FILE)
    assert not again.raise_to("step", 4)
    assert again.count("restarts") == 3


def test_a_full_spool_drops_the_oldest_steps_and_says_so(tmp_path, caplog):
    path, limit = tmp_path / SPOOL_FILE, 100_000
    spool = Spool(path, limit)
    spool.add(CheckpointDamaged("half"))
    with spool.transaction():  # One wait for the disk.
        for number in range(2000):
            spool.add(steps(number))
    kept = list(spool.first(9999).values())
    assert path.stat().st_size < limit + 10_000
    assert kept[0] == CheckpointDamaged("half")
    assert 300 < len(kept) < 1000
    assert [event.step for event in kept[1:]] == list(range(2000 - len(kept) + 1, 2000))
    assert "reports of steps were dropped" in caplog.text


def test_the_backlog_of_a_driver_that_was_killed_while_writing_can_be_counted(tmp_path):
    path = tmp_path / "live" / SPOOL_FILE
    path.parent.mkdir()
    spool = Spool(path)
    spool.add(steps(1))
    writing = sqlite3.connect(path, isolation_level=None)
    writing.execute("PRAGMA cache_size = 1")  # so that pages reach the file before the end
    writing.execute("BEGIN IMMEDIATE")
    for number in range(200):
        writing.execute("INSERT INTO events (kind, event) VALUES ('x', ?)", (f"{number:1000}",))
    killed = tmp_path / "killed"
    shutil.copytree(path.parent, killed)
    assert (killed / f"{SPOOL_FILE}-journal").stat().st_size > 0
    assert backlog(killed) == 1


def test_gauges_of_many_workers_take_as_much_space_as_those_of_two(tmp_path):
    def metrics(workers):
        gauges = {f"worker{rank}.memory_gib": float(rank) for rank in range(workers)}
        return {"loss": 0.5} | gauges | {f"worker{rank}.gpu": 0.9 for rank in range(workers)}

    assert over_workers(metrics(64)).keys() == over_workers(metrics(2)).keys()
    assert over_workers({"loss": 0.5, "worker0.gpu": 0.25, "worker1.gpu": 0.75}) == {
        "loss": 0.5,
        "workers.gpu.min": 0.25,
        "workers.gpu.mean": 0.5,
        "workers.gpu.max": 0.75,
    }
