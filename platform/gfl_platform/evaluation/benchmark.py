"""Benchmarks of a model on a worker of the cluster: latency, throughput, size; kept in MLflow."""

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gfl.checkpoint.files import About
from gfl.checkpoint.snapshot import load_checkpoint
from gfl.config.loader import dump_config, parse_config, reproducible
from gfl.config.schema import Config
from gfl.data.split import read_split
from gfl.data.synthetic import render_shapes
from gfl.evaluation.protocol import (
    STATE,
    WARM_UP,
    YARDSTICK,
    Benchmark,
    Timing,
    Variant,
    differences,
)
from gfl.evaluation.speed import (
    UnavailableError,
    count_flops,
    count_parameters,
    measure_latency,
    peak_memory,
    repeated,
)
from gfl.inference.predictor import Model
from gfl.model.detector import Detector
from gfl_platform.cluster import launch, resources
from gfl_platform.cluster.event_queue import pumped
from gfl_platform.cluster.events import VariantsMeasured, Watcher
from gfl_platform.config import JobConfig
from gfl_platform.storage.files import read_json
from gfl_platform.storage.storage import Storage
from gfl_platform.tracking.client import Store
from gfl_platform.tracking.metadata import describe
from gfl_platform.tracking.run import RunTracker

PERCENTILES = (50, 90, 99)

SECONDS = 60.0
"""How long it goes over few images at least: machines drift by percents in a minute."""


def benchmark_worker(settings: dict[str, Any]) -> Benchmark:
    """Measure on this worker's device."""
    config = parse_config(settings["config"], "job")
    device = resources.worker_device()
    cache, checkpoint = settings["cache"], settings["checkpoint"]
    config = cache.localized(config)
    detector, about = (
        load_checkpoint(cache.local(checkpoint), config) if checkpoint else _untrained(config)
    )
    render_shapes(config)
    split = read_split(config.data, "val", config.model.num_classes, about.classes)
    timings: list[Timing] = []
    variants = settings["variants"]
    for number, variant in enumerate(variants, start=1):
        try:
            with peak_memory(device) as peak:
                seconds, protocol = measure_latency(
                    detector, split, config, device, variant, settings["images"], SECONDS
                )
        except UnavailableError as error:
            if not timings:  # what all others are compared with
                raise
            timings.append(Timing(variant.name, 0, {}, 0, {}, [], str(error)))
            continue
        finally:
            settings["events"].tell(VariantsMeasured(number, len(variants)))
        timings.append(_timing(variant.name, seconds, variant.batch, peak["bytes"], protocol))
    model = Model(detector, about, device)
    paths = [record.path for record in split.records[: settings["images"]]]
    timings.append(_end_to_end(model, paths, settings["images"], timings[0]))
    height, width = config.data.short_side, config.data.long_side
    return Benchmark(
        timings=timings,
        parameters=count_parameters(detector),
        flops=count_flops(detector, _padded(height), _padded(width)),
        size=(_padded(height), _padded(width)),
        time_s=time.time(),
    )


def _end_to_end(model: Model, paths: Sequence[Path], images: int, standard: Timing) -> Timing:
    """Time predictions from the image file on."""

    def measure() -> list[float]:
        seconds = []
        for path in paths:
            start = time.perf_counter()
            model.predict(path)  # brings the boxes to the host, hence waits for the device
            seconds.append(time.perf_counter() - start)
        return seconds

    for path in paths[:WARM_UP]:
        model.predict(path)
    seconds = repeated(measure, images, SECONDS)
    return _timing("end to end", seconds, 1, 0, standard.protocol | {"from": "file", STATE: {}})


def _timing(
    name: str, seconds: Sequence[float], batch: int, peak: int, protocol: dict[str, Any]
) -> Timing:
    milliseconds = [1000 * each for each in seconds]
    percentiles = np.percentile(milliseconds, PERCENTILES).tolist()
    named = {f"p{p}": value for p, value in zip(PERCENTILES, percentiles, strict=True)}
    return Timing(name, batch * len(seconds) / sum(seconds), named, peak, protocol, milliseconds)


def _untrained(config: Config) -> tuple[Detector, About]:
    """Return a detector of random weights."""
    count = config.model.num_classes
    about = About([f"class {n}" for n in range(count)], list(range(1, count + 1)), 0, 0, {})
    return Detector(config).eval(), about


def _padded(side: int) -> int:
    return -(-side // 32) * 32


FOLDER = "benchmarks"
"""Among the artifacts of a run: a JSON file for each benchmark, and its picture."""


def benchmark(
    job: JobConfig,
    checkpoint: Path | None,
    variants: Sequence[Variant],
    images: int,
    watch: Watcher,
) -> Benchmark:
    """Measure a checkpoint, or untrained weights, on the images that `job` evaluates on.

    Raises:
        ValueError: a checkpoint, dataset or cluster that cannot be used.
        JobFailedError: the worker stopped.
    """
    resources.connect()
    alone = job.model_copy(update={"cluster": job.cluster.model_copy(update={"workers": 1})})
    workers, storage = resources.allot(alone), Storage(job.storage)
    with storage.scratch_folder() as scratch, pumped(watch) as events:
        settings = {
            "config": dump_config(reproducible(job)),
            "checkpoint": checkpoint and storage.shared(checkpoint),
            "cache": storage.cache,
            "variants": [Variant(), *(v for v in variants if v != Variant())],
            "images": images,
        }
        result = launch.run_workers(
            benchmark_worker, settings, workers, events, **storage.ray_options(scratch)
        )
    found: Benchmark = result.return_value
    return found


def keep(store: Store, run_id: str, found: Benchmark, picture: Path) -> str:
    """Log a benchmark to the model's run; return what compares it with the last.

    Args:
        store: Where the run is.
        run_id: The run that trained the model, or what `run_of_benchmarks` returns.
        found: What was measured.
        picture: The histogram.
    """
    client = store.client
    with tempfile.TemporaryDirectory(prefix="gfl-benchmark-") as scratch:
        said = _compare(found, _last(store, run_id, Path(scratch)))
        when = time.strftime("%Y%m%d-%H%M%S", time.localtime(found.time_s))
        name = f"{when}-{found.standard.hash}"
        path = Path(scratch) / f"{name}.json"
        path.write_text(json.dumps(as_json(found), indent=1) + "\n")
        client.log_artifact(run_id, str(path), FOLDER)
        drawn = path.with_suffix(".png")
        drawn.write_bytes(picture.read_bytes())
        client.log_artifact(run_id, str(drawn), FOLDER)
    for timing in found.timings:
        if not timing.unavailable:
            key = timing.name.replace(" ", "_")
            client.log_metric(run_id, f"benchmark.{key}.fps", timing.fps)
            for percentile, value in timing.percentiles_ms.items():
                client.log_metric(run_id, f"benchmark.{key}.{percentile}_ms", value)
            if timing.peak_bytes:
                client.log_metric(run_id, f"benchmark.{key}.peak_MiB", timing.peak_bytes / 2**20)
    client.log_metric(run_id, "benchmark.parameters", found.parameters)
    client.log_metric(run_id, "benchmark.flops", found.flops)
    client.set_tag(run_id, "benchmark.protocol", found.standard.hash)
    return said


def as_json(found: Benchmark) -> dict[str, Any]:
    """Return a benchmark as it is kept, the protocols with their hashes."""
    timings = [vars(timing) | {"protocol_hash": timing.hash} for timing in found.timings]
    return vars(found) | {"timings": timings}


def run_of_benchmarks(job: JobConfig, store: Store, model: str) -> str:
    """Return the run of the benchmarks of a model that no run of the store trained.

    Args:
        job: Configuration of the benchmark.
        store: Where the run is; a new one is made for the first benchmark.
        model: The model, as the user calls it.
    """
    client = store.client
    if experiment := client.get_experiment_by_name(store.experiment):
        for run in client.search_runs([experiment.experiment_id], "tags.kind = 'benchmark'"):
            if run.data.tags.get("model") == model:
                return str(run.info.run_id)
    tags = {"kind": "benchmark", "model": model}
    opened = describe(job, "benchmark", tags)
    with (
        tempfile.TemporaryDirectory(prefix="gfl-benchmark-") as folder,
        RunTracker(store, Path(folder), opened) as tracker,
    ):
        return tracker.require_run()


def recall_fps(store: Store, run_id: str, protocol: str) -> float | None:
    """Return the FPS of a run's latest benchmark under the protocol of this hash, if any."""
    with tempfile.TemporaryDirectory(prefix="gfl-benchmark-") as scratch:
        found = _last(store, run_id, Path(scratch), protocol)
    return found["timings"][0]["fps"] if found else None


def _last(store: Store, run_id: str, scratch: Path, protocol: str = "") -> dict[str, Any]:
    """Return the run's latest benchmark, maybe of one protocol; empty if it has none."""
    client = store.client
    names = [entry.path for entry in client.list_artifacts(run_id, FOLDER)]
    kept = sorted(name for name in names if name.endswith(f"{protocol}.json"))
    return (
        read_json(Path(client.download_artifacts(run_id, kept[-1], str(scratch)))) if kept else {}
    )


def _compare(found: Benchmark, last: dict[str, Any]) -> str:
    if not last:
        return "the first benchmark of this model"
    before, now = last["timings"][0], found.standard
    differing = differences(before["protocol"], now.protocol)
    if differing:
        return f"does not compare with the last benchmark: {', '.join(differing)}"
    median = np.median(now.milliseconds) / np.median(before["milliseconds"])
    said = f"median latency {_percent(median)} against the last benchmark, same protocol"
    if earlier := before["protocol"][STATE].get(YARDSTICK):
        machine = now.protocol[STATE][YARDSTICK] / earlier
        left = np.mean(now.milliseconds) / np.mean(before["milliseconds"]) / machine
        said += f"; the machine took {_percent(machine)} for a fixed convolution beside it"
        said += f", which leaves {_percent(left)} of the mean"
    return said


def _percent(ratio: Any) -> str:
    return f"{100 * (ratio - 1):+.1f} %"
