"""Measure how fast a model is, and how large: `python -m jobs.benchmark MODEL [key=value ...]`."""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from gfl.evaluation.protocol import PRECISIONS, Variant
from jobs.console.cli import console, parse, parser, run


def parse_variants(arguments: argparse.Namespace) -> list[Variant]:
    """Return the variants that the command line names, without repetitions.

    Raises:
        ValueError: a precision or a batch size that does not exist.
    """
    if arguments.images is not None and arguments.images < 1:
        raise ValueError(f"--images {arguments.images}: expected at least 1")
    variants = []
    for word in arguments.precision.split(","):
        precisions = [precision for precision in PRECISIONS if precision == word]
        if not precisions:
            raise ValueError(f"--precision {word}: expected some of {','.join(PRECISIONS)}")
        plain = Variant(precisions[0])
        variants.append(plain)
        if arguments.no_channels_last:
            variants.append(replace(plain, channels_last=False))
        if arguments.compile:
            variants.append(replace(plain, compiled=True))
        for size in filter(None, arguments.batches.split(",")):
            if not size.isdigit() or int(size) < 1:
                raise ValueError(f"--batches {size}: expected whole numbers, such as 8,32")
            variants.append(replace(plain, batch=int(size)))
    return list(dict.fromkeys(variants))


EXAMPLE = "python -m jobs.benchmark models:/gfl-demo@champion --precision bfloat16 --batches 8,32"


def main() -> None:
    """Run the command line."""
    cli = parser("Measure FPS, latency, throughput, FLOPs and memory under a protocol.", EXAMPLE)
    cli.add_argument("model", help="YAML file (untrained), checkpoint folder, models:/..., runs:/")
    cli.add_argument(
        "--images", type=int, help="most images to measure (default: 2000, as in the gate)"
    )
    cli.add_argument(
        "--precision", default="float32", help="comma-separated: float32,bfloat16,float16"
    )
    cli.add_argument("--batches", default="", help="batch sizes for throughput, such as 8,32")
    cli.add_argument("--no-channels-last", action="store_true", help="also measure channels first")
    cli.add_argument("--compile", action="store_true", help="also measure the compiled network")
    cli.add_argument("--out", type=Path, metavar="FILE", help="write all figures as JSON")
    run(benchmark, parse(cli))


def benchmark(arguments: argparse.Namespace) -> None:
    """Measure a model, show the figures, and keep them in MLflow."""
    from gfl.checkpoint.files import read_config
    from gfl.config.loader import derive
    from gfl.evaluation.protocol import IMAGES
    from gfl.files import write_atomically
    from gfl_platform.config import JobConfig, job_of, load_job
    from gfl_platform.evaluation import benchmark
    from gfl_platform.registry import models
    from gfl_platform.storage.storage import Storage
    from gfl_platform.tracking.client import Store
    from jobs.console.progress import Progress
    from jobs.console.tables import draw_latencies, show_benchmark

    variants = parse_variants(arguments)
    source, given = arguments.model, arguments.overrides
    untrained = source.endswith((".yaml", ".yml"))
    where = load_job(source, given) if untrained else job_of(given)
    store = Store(where.tracking, Storage(where.storage))
    store.require_ready()
    with store.storage.scratch_folder() as scratch, Progress() as progress:
        model = models.resolve(store, source)  # an alias may move during the measurement
        checkpoint = None if untrained else models.fetch_checkpoint(store, model, scratch)
        job = derive(JobConfig, read_config(checkpoint), given) if checkpoint else where
        images = arguments.images or IMAGES
        figures = benchmark.benchmark(job, checkpoint, variants, images, progress.show)
    if arguments.out:
        write_atomically(arguments.out, json.dumps(benchmark.as_json(figures), indent=1) + "\n")
    show_benchmark(source, figures)
    run_id = models.run_of(store, model) or benchmark.run_of_benchmarks(job, store, source)
    with tempfile.TemporaryDirectory(prefix="gfl-benchmark-") as folder:
        picture = Path(folder) / "latency.png"
        draw_latencies(figures, picture)
        comparison = benchmark.keep(store, run_id, figures, picture)
    if untrained:
        comparison += "; untrained weights detect little, so post-processing is faster than later"
    console.print(comparison, soft_wrap=True)


if __name__ == "__main__":
    main()
