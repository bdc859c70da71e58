"""What the worker of a benchmark measures; imported by it alone, for it needs torch."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gfl.checkpoint.files import About
from gfl.checkpoint.snapshot import load_checkpoint
from gfl.config.loader import parse_config
from gfl.config.schema import Config
from gfl.data import render_shapes
from gfl.data.split import read_split
from gfl.evaluation.protocol import STATE, WARM_UP
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
from gfl_platform.cluster import launch
from gfl_platform.evaluation.benchmark import Benchmark, Timing

PERCENTILES = (50, 90, 99)

SECONDS = 60.0
"""How long it goes over few images at least: machines drift by percents in a minute."""


def benchmark_worker(settings: dict[str, Any]) -> Benchmark:
    """Measure on this worker's device."""
    config = parse_config(settings["config"], "job")
    device = launch.worker_device()
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
            done = {"kind": "measured", "variants": number, "total": len(variants)}
            settings["events"].tell(done)
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
