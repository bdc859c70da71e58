"""Benchmarks of a model: latency, throughput and size, measured on one worker and kept in MLflow.

`benchmark` runs in the driver and `benchmark_worker` in the worker; `keep` logs the result.
"""

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
from gfl_platform.cluster import resources
from gfl_platform.cluster.events import ItemsDone, Watcher
from gfl_platform.config import JobConfig
from gfl_platform.evaluation.measure import run_measurement
from gfl_platform.storage.files import read_json
from gfl_platform.storage.storage import Storage
from gfl_platform.tracking.client import Store
from gfl_platform.tracking.metadata import describe
from gfl_platform.tracking.run import RunTracker

FOLDER = "benchmarks"
"""Folder among the artifacts of a run, with a JSON file and a picture for each benchmark."""

PERCENTILES = (50, 90, 99)
"""Percentiles of the latency that are reported."""

SECONDS = 60.0
"""Shortest duration of a measurement, in seconds: machines drift by percents within a minute."""


def benchmark(
    job: JobConfig,
    checkpoint: Path | None,
    variants: Sequence[Variant],
    images: int,
    watch: Watcher,
) -> Benchmark:
    """Measure a checkpoint, or untrained weights, on the images that `job` evaluates on.

    Args:
        job: Configuration of the model, the images and the cluster.
        checkpoint: Folder of the checkpoint; None for untrained weights.
        variants: Ways to run the model, besides the standard one that is always measured.
        images: Largest number of images.
        watch: Shows the progress.

    Raises:
        ValueError: the checkpoint, dataset or cluster cannot be used.
        JobFailedError: the worker stopped.
    """
    storage = Storage(job.storage)
    settings = {
        "config": dump_config(reproducible(job)),
        "checkpoint": checkpoint and storage.shared(checkpoint),
        "cache": storage.cache,
        "variants": [Variant(), *(v for v in variants if v != Variant())],
        "images": images,
    }
    if job.cluster.workers != 0:
        job = job.model_copy(update={"cluster": job.cluster.model_copy(update={"workers": 1})})
    figures: Benchmark = run_measurement(benchmark_worker, settings, job, storage, watch)
    return figures


def benchmark_worker(settings: dict[str, Any]) -> Benchmark:
    """Measure all variants on the device of this worker."""
    config = parse_config(settings["config"], "job")
    device = settings["device"] or resources.worker_device()
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
            settings["events"].tell(ItemsDone("variants measured", number, len(variants)))
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
    """Time predictions that start with reading the image file."""

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
    milliseconds = [1000 * duration for duration in seconds]
    percentiles = np.percentile(milliseconds, PERCENTILES).tolist()
    named = {f"p{p}": value for p, value in zip(PERCENTILES, percentiles, strict=True)}
    return Timing(name, batch * len(seconds) / sum(seconds), named, peak, protocol, milliseconds)


def _untrained(config: Config) -> tuple[Detector, About]:
    """Return a detector with random weights."""
    count = config.model.num_classes
    about = About([f"class {n}" for n in range(count)], list(range(1, count + 1)), 0, 0, {})
    return Detector(config).eval(), about


def _padded(side: int) -> int:
    """Return the length of an image's side after padding to a multiple of 32 pixels."""
    return -(-side // 32) * 32


def keep(store: Store, run_id: str, figures: Benchmark, picture: Path) -> str:
    """Log a benchmark to the model's run; return a sentence that compares it with the last one.

    Args:
        store: The tracking store that has the run.
        run_id: The run that trained the model, or the one that `run_of_benchmarks` returns.
        figures: Result of the benchmark.
        picture: File of the histogram, a PNG.
    """
    client = store.client
    with tempfile.TemporaryDirectory(prefix="gfl-benchmark-") as scratch:
        comparison = _compare(figures, _last(store, run_id, Path(scratch)))
        moment = time.strftime("%Y%m%d-%H%M%S", time.gmtime(figures.time_s))
        file = Path(scratch) / f"{moment}-{figures.standard.hash}.json"
        file.write_text(json.dumps(as_json(figures), indent=1) + "\n")
        client.log_artifact(run_id, str(file), FOLDER)
        picture_copy = file.with_suffix(".png")
        picture_copy.write_bytes(picture.read_bytes())
        client.log_artifact(run_id, str(picture_copy), FOLDER)
    for timing in figures.timings:
        if not timing.unavailable:
            key = timing.name.replace(" ", "_")
            client.log_metric(run_id, f"benchmark.{key}.fps", timing.fps)
            for percentile, value in timing.percentiles_ms.items():
                client.log_metric(run_id, f"benchmark.{key}.{percentile}_ms", value)
            if timing.peak_bytes:
                client.log_metric(run_id, f"benchmark.{key}.peak_MiB", timing.peak_bytes / 2**20)
    client.log_metric(run_id, "benchmark.parameters", figures.parameters)
    client.log_metric(run_id, "benchmark.flops", figures.flops)
    client.set_tag(run_id, "benchmark.protocol", figures.standard.hash)
    return comparison


def as_json(figures: Benchmark) -> dict[str, Any]:
    """Return a benchmark as a JSON object, with the hashes of its protocols."""
    timings = [vars(timing) | {"protocol_hash": timing.hash} for timing in figures.timings]
    return vars(figures) | {"timings": timings}


def run_of_benchmarks(job: JobConfig, store: Store, model: str) -> str:
    """Return the run of the benchmarks of a model that no run of the store trained.

    Args:
        job: Configuration of the benchmark.
        store: The tracking store; the first benchmark of a model makes a run there.
        model: Name of the model, as the user gave it.
    """
    client = store.client
    if experiment := client.get_experiment_by_name(store.experiment):
        for run in client.search_runs([experiment.experiment_id], "tags.kind = 'benchmark'"):
            if run.data.tags.get("model") == model:
                return str(run.info.run_id)
    tags = {"kind": "benchmark", "model": model}
    opened = describe(job, "benchmark", tags)
    with (
        store.storage.scratch_folder() as folder,
        RunTracker(store, folder, opened) as tracker,
    ):
        return tracker.require_run()


def recall_fps(store: Store, run_id: str, protocol: str) -> float | None:
    """Return the FPS of a run's latest benchmark under the protocol of this hash, if any."""
    with tempfile.TemporaryDirectory(prefix="gfl-benchmark-") as scratch:
        figures = _last(store, run_id, Path(scratch), protocol)
    return figures["timings"][0]["fps"] if figures else None


def _last(store: Store, run_id: str, scratch: Path, protocol: str = "") -> dict[str, Any]:
    """Return the latest benchmark of a run as JSON; empty if it has none.

    Args:
        store: The tracking store that has the run.
        run_id: The MLflow run.
        scratch: Folder to download to.
        protocol: Hash of the protocol that the benchmark has to follow; empty for any.
    """
    client = store.client
    names = [entry.path for entry in client.list_artifacts(run_id, FOLDER)]
    files = sorted(name for name in names if name.endswith(f"{protocol}.json"))
    if not files:
        return {}
    return read_json(Path(client.download_artifacts(run_id, files[-1], str(scratch))))


def _compare(figures: Benchmark, last: dict[str, Any]) -> str:
    """Return a sentence that compares a benchmark with the last one, as `_last` returns it."""
    if not last:
        return "the first benchmark of this model"
    before, now = last["timings"][0], figures.standard
    if protocol_changes := differences(before["protocol"], now.protocol):
        return f"does not compare with the last benchmark: {', '.join(protocol_changes)}"
    median = np.median(now.milliseconds) / np.median(before["milliseconds"])
    text = f"median latency {_percent(median)} against the last benchmark, same protocol"
    if yardstick_before := before["protocol"][STATE].get(YARDSTICK):
        machine = now.protocol[STATE][YARDSTICK] / yardstick_before
        model = np.mean(now.milliseconds) / np.mean(before["milliseconds"]) / machine
        text += f"; the machine took {_percent(machine)} for a fixed convolution beside it"
        text += f", which leaves {_percent(model)} of the mean"
    return text


def _percent(ratio: float) -> str:
    """Return a ratio as a signed change in percent."""
    return f"{100 * (ratio - 1):+.1f} %"
