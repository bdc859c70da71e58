"""`jobs.benchmark` as its users call it."""

import argparse
import itertools
import json
import sys
import time

import pytest
from PIL import Image

from gfl.checkpoint.files import About
from gfl.checkpoint.snapshot import take_snapshot
from gfl.config.loader import derive
from gfl.evaluation.protocol import STATE, YARDSTICK, Benchmark, Timing, Variant
from gfl.model.detector import Detector
from gfl_platform.config import JobConfig, load_job
from gfl_platform.evaluation import benchmark as benchmark_room
from gfl_platform.registry import models
from tests.support.tracking import store_of


def words(**given):
    defaults = {"images": 5, "precision": "float32", "batches": "", "no_channels_last": False}
    return argparse.Namespace(**(defaults | {"compile": False} | given))


def test_variants_are_what_the_command_line_asks_for():
    from jobs.benchmark import parse_variants

    found = parse_variants(words(precision="float32,bfloat16", batches="8"))
    assert found == [
        Variant(), Variant(batch=8), Variant("bfloat16"), Variant("bfloat16", batch=8)
    ]  # fmt: skip
    for wrong, message in (
        ({"precision": "int4"}, "--precision int4: expected some of float32,bfloat16,float16"),
        ({"batches": "8,x"}, "--batches x: expected whole numbers"),
        ({"images": 0}, "--images 0: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_variants(words(**wrong))


@pytest.fixture
def measured(monkeypatch):
    """Let nothing be measured: an image takes a millisecond, and each time a fifth longer."""
    slower = itertools.count()

    def benchmark(*_):
        factor = 1.2 ** next(slower)
        percentiles = {"p50": 1.0, "p90": 1.0, "p99": 1.0}
        protocol = {"images": 1, "device": "none", "threads": 1, "torch": "0"}
        protocol |= {STATE: {YARDSTICK: 5.0 * factor}}
        timing = Timing("float32", 1000.0, percentiles, 0, protocol, [factor])
        return Benchmark([timing], 1, 1, (64, 64), time.time())

    monkeypatch.setattr(benchmark_room, "benchmark", benchmark)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.mark.usefixtures("measured")
def test_benchmarks_of_a_folder_go_to_a_run_with_its_configuration(
    tiny, tmp_path, monkeypatch, capsys
):
    from jobs import benchmark

    config = derive(type(tiny), tiny, ["seed=7"])
    about = About(["rectangle", "ellipse", "triangle"], [1, 2, 3], 0, 0, {})
    (folder := tmp_path / "checkpoint").mkdir()
    take_snapshot(Detector(config), config, about, {}).write(folder)
    root = f"storage.root={tmp_path}/outputs"
    monkeypatch.setattr(sys, "argv", ["benchmark", str(folder), root])
    for _ in range(2):
        benchmark.main()
    said = " ".join(capsys.readouterr().out.split())
    assert "median latency +20.0 % against the last benchmark, same protocol" in said
    assert "took +20.0 % for a fixed convolution beside it, which leaves +0.0 % of the mean" in said
    client = store_of(JobConfig(storage={"root": f"{tmp_path}/outputs"})).client
    (run,) = client.search_runs([client.get_experiment_by_name("gfl").experiment_id])
    assert run.data.params["seed"] == "7"


@pytest.mark.usefixtures("measured")
def test_an_alias_that_moves_meanwhile_changes_nothing(tmp_path, monkeypatch):
    from jobs import benchmark

    asked = []

    def answer(name, with_what):
        def instead(_, model, *more):
            asked.append((name, model))
            return with_what

        monkeypatch.setattr(models, name, instead)

    answer("resolve", "models:/m/1")
    answer("fetch_checkpoint", None)
    answer("run_of", "run")
    monkeypatch.setattr(benchmark_room, "keep", lambda *_: "kept")
    monkeypatch.setattr(
        sys, "argv", ["benchmark", "models:/m@champion", f"storage.root={tmp_path}"]
    )
    benchmark.main()
    assert asked == [
        ("resolve", "models:/m@champion"),
        ("fetch_checkpoint", "models:/m/1"),
        ("run_of", "models:/m/1"),
    ]


def test_a_deleted_experiment_is_said_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    from jobs import benchmark

    root = f"storage.root={tmp_path}"
    store = store_of(load_job("configs/demo.yaml", [root]))
    store.client.delete_experiment(store.find_experiment())
    monkeypatch.setattr(sys, "argv", ["benchmark", "configs/demo.yaml", root])
    monkeypatch.setattr(benchmark_room, "benchmark", lambda *_: pytest.fail("it was measured"))
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "the experiment 'gfl' is deleted in sqlite" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_is_benchmarked_twice_and_compared(trained, tmp_path, monkeypatch, capsys):
    from jobs import benchmark

    job, result, _ = trained

    def run(*more):
        arguments = ["benchmark", "models:/shapes@champion", f"storage.root={job.storage.root}"]
        monkeypatch.setattr(sys, "argv", [*arguments, "--images", "6", *more])
        benchmark.main()
        return capsys.readouterr().out

    out = run("--batches", "4", "--out", str(tmp_path / "b.json"))
    assert "the first benchmark of this model" in out
    assert "float32-batch4" in out
    assert "end to end" in out
    found = json.loads((tmp_path / "b.json").read_text())
    assert len(found["timings"][0]["milliseconds"]) == 6
    assert set(found["timings"][0]["percentiles_ms"]) == {"p50", "p90", "p99"}
    assert "against the last benchmark, same protocol" in run()
    assert "does not compare with the last benchmark: postprocess" in run("postprocess.nms_iou=0.5")
    client = store_of(job).client
    kept = [entry.path for entry in client.list_artifacts(result.run_id, "benchmarks")]
    pictures = [path for path in kept if path.endswith(".png")]
    assert len(pictures) == 3
    path = client.download_artifacts(result.run_id, pictures[0], str(tmp_path))
    assert Image.open(path).width > 500
    assert client.get_run(result.run_id).data.metrics["benchmark.float32.fps"] > 0
