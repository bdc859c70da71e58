"""Frames per second and latency under a recorded protocol.

The standard variant is GFocal's: one image at a time, post-processing included, loading excluded,
the device synchronised, after five warm-up passes.
"""

import gc
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from gfl.config.schema import Config
from gfl.data.dataset import Batch, DetectionDataset, collate
from gfl.data.split import Split, digest_images
from gfl.evaluation.protocol import IMAGES, STATE, WARM_UP, YARDSTICK, Variant
from gfl.model.detector import Detector, folded, place

CLOCKS = ("clocks.sm", "pstate")
"""nvidia-smi's names of a GPU's state that changes by itself."""


class UnavailableError(ValueError):
    """A variant that this device or installation cannot run; the message names it and why."""


def measure_fps(
    detector: Detector, split: Split, config: Config, device: torch.device, images: int = IMAGES
) -> tuple[float, dict[str, Any]]:
    """Return frames per second over the first `images` images of `split`, and the protocol."""
    seconds, protocol = measure_latency(detector, split, config, device, Variant(), images)
    return len(seconds) / sum(seconds), protocol


def measure_latency(
    detector: Detector,
    split: Split,
    config: Config,
    device: torch.device,
    variant: Variant,
    images: int,
    at_least_s: float = 0,
) -> tuple[list[float], dict[str, Any]]:
    """Return the seconds of every forward pass with its post-processing, and the protocol.

    Args:
        detector: The detector, on `device`; it does not change.
        split: The set, whose first images are measured.
        config: The configuration, for the scaling of images and the selection of detections.
        device: Device of the detector.
        variant: The way to run the detector.
        images: Largest number of images; a last batch that is not full is left out.
        at_least_s: Smallest measured time in seconds. The images are measured again until it or
            the number `images` is reached.

    Raises:
        UnavailableError: The variant cannot run here.
    """
    dataset = DetectionDataset(split, config, training=False)
    count = min(images, len(dataset)) // variant.batch * variant.batch
    if count == 0:
        raise UnavailableError(
            f"{variant.name}: a batch of {variant.batch} needs as many images, got "
            f"{min(images, len(dataset))}; use smaller batches or more images"
        )

    def batches() -> Iterator[Batch]:
        for first in range(0, count, variant.batch):
            samples = [dataset[0, image] for image in range(first, first + variant.batch)]
            batch = collate(samples).to(device)
            if not variant.channels_last:
                batch = replace(batch, pixels=batch.pixels.contiguous())
            yield batch

    yardstick = _Yardstick(device)
    with _prepared(detector, variant, device) as run:
        _time(run, islice(batches(), WARM_UP), yardstick)
        if variant.compiled:  # compiles for the image sizes that the warm-up did not contain
            _time(run, batches(), yardstick)
        yardstick.seconds.clear()
        enough = images // variant.batch
        seconds = repeated(lambda: _time(run, batches(), yardstick), enough, at_least_s)
    protocol = record(split, config, device, variant, count)
    if yardstick.seconds:
        protocol[STATE][YARDSTICK] = 1000 * statistics.fmean(yardstick.seconds)
    return seconds, protocol


def record(
    split: Split, config: Config, device: torch.device, variant: Variant, images: int
) -> dict[str, Any]:
    """Return the protocol of a measurement of `images` images of `split` on `device`."""
    on_gpu = device.type == "cuda"
    tiles = config.data.tiles
    return {
        **({"tiles": tiles.model_dump()} if tiles else {}),
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "driver": _nvidia_smi("driver_version", device) if on_gpu else platform.release(),
        "power": _power(device),
        "cuda": torch.version.cuda if on_gpu else None,
        "cudnn": _cudnn() if on_gpu else None,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),  # a plain `str`, which can be read without torch
        "precision": variant.precision,
        "channels_last": variant.channels_last,
        "compiled": variant.compiled,
        "batch": variant.batch,
        "warm_up": WARM_UP,
        "images": images,
        "annotations": split.digest,
        "pictures": digest_images(split),
        "short_side": config.data.short_side,
        "long_side": config.data.long_side,
        "postprocess": config.postprocess.model_dump(mode="json"),
        STATE: {query: _nvidia_smi(query, device) for query in CLOCKS} if on_gpu else {},
    }


def _cudnn() -> dict[str, Any]:
    """Return the settings that decide how a GPU computes convolutions."""
    cudnn = torch.backends.cudnn
    precision = cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return {
        "version": cudnn.version(),
        "float32": os.environ.get("NVIDIA_TF32_OVERRIDE", "") + precision,
        "benchmark": cudnn.benchmark,
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"cpu: {names[0] if names else platform.machine()}"


def _power(device: torch.device) -> str:
    """Return what limits the clock rate: a GPU's power limit, or a CPU's frequency governor."""
    if device.type == "cuda":
        return _nvidia_smi("power.limit", device)
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return governor.read_text().strip() if governor.exists() else "unknown"


def _nvidia_smi(query: str, device: torch.device) -> str:
    uuid = torch.cuda.get_device_properties(device).uuid
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def repeated(measure: Callable[[], list[float]], enough: int, at_least_s: float) -> list[float]:
    """Return the seconds from calls of `measure`, repeated until they suffice.

    Args:
        measure: Returns the seconds of several passes; called at least once.
        enough: Number of passes that suffices.
        at_least_s: Total time in seconds that suffices.
    """
    seconds = measure()
    while len(seconds) < enough and sum(seconds) < at_least_s:
        seconds += measure()
    return seconds


def count_parameters(detector: Detector) -> int:
    """Return the number of parameters, frozen ones included."""
    return sum(parameter.numel() for parameter in detector.parameters())


def count_flops(detector: Detector, height: int, width: int) -> int:
    """Return the floating-point operations of the network for one image of `height` x `width` px.

    A multiply-add counts as two. A deformable convolution counts as a plain one, without the
    sampling at its offsets. Post-processing does not count.
    """
    device = detector.pixel_mean.device
    deformable = {torch.ops.torchvision.deform_conv2d: _deformable_flops}
    counting = FlopCounterMode(display=False, custom_mapping=deformable)
    with counting as counter, torch.no_grad():
        detector.eval()(torch.zeros(1, 3, height, width, device=device))
    return int(counter.get_total_flops())


def _deformable_flops(
    _: torch.Size, weight: torch.Size, *others: Any, out_shape: torch.Size, **__: Any
) -> int:
    """Return the operations of a plain convolution, weight (C_out, C_in, height, width)."""
    return 2 * out_shape.numel() * weight[1:].numel()


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, int]]:
    """Yield a mapping that holds the peak memory under `bytes` after the block.

    On a GPU it is the allocated memory, on a CPU the resident memory of the whole process. Outside
    Linux, a process cannot reset its peak, so an earlier peak counts, too.
    """
    peak = {"bytes": 0}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak["bytes"] = torch.cuda.max_memory_allocated(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    yield peak
    peak["bytes"] = peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Return the largest memory that this process has occupied, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@contextmanager
def _prepared(detector: Detector, variant: Variant, device: torch.device) -> Iterator[Detector]:
    """Yield a copy of the detector in the form that `variant` describes."""
    detector = place(folded(detector), device)
    if not variant.channels_last:
        detector.to(memory_format=torch.contiguous_format)
    if variant.compiled:
        detector.compile(dynamic=True)
    dtype = getattr(torch, variant.precision)
    enabled = variant.precision != "float32"
    detector.requires_grad_(enabled)  # autocast caches copies of trainable weights only
    was_deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = False  # a training in the same process may have set it
    try:
        with torch.autocast(device.type, dtype, enabled=enabled), torch.no_grad():
            yield detector
    except (RuntimeError, OSError) as error:  # no compiler, no such kernel, or not enough memory
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnavailableError(f"{variant.name}: cannot run here ({reason})") from error
    finally:
        torch.backends.cudnn.deterministic = was_deterministic


class _Yardstick:
    """A convolution of 0.3 GFLOPs, timed after every pass on a CPU to measure the machine itself.

    The speed of a shared machine changes by tens of percents within minutes, and a model's time
    changes in proportion. Divided by the time of this convolution, a difference between two models
    is due to the models. Means are compared: medians of short times miss the bursts in which
    another process has the processor.

    Attributes:
        device: Device of the measurement.
        seconds: Measured times; empty on a GPU, where only the launch would be timed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []
        self._maps = torch.ones(1, 256, 16, 16)
        self._weight = torch.ones(256, 256, 3, 3)

    def measure(self) -> None:
        if self.device.type != "cpu":
            return
        with torch.autocast("cpu", enabled=False):
            start = time.perf_counter()
            torch.conv2d(self._maps, self._weight, padding=1)
        self.seconds.append(time.perf_counter() - start)


def _time(detector: Detector, batches: Iterable[Batch], yardstick: _Yardstick) -> list[float]:
    device = yardstick.device
    seconds = []
    collecting = gc.isenabled()
    gc.disable()  # a collection would delay one image
    try:
        for batch in batches:
            sizes = batch.targets.sizes
            _synchronize(device)
            start = time.perf_counter()
            detector.predict(detector.normalize(batch.pixels, sizes), sizes, batch.original_sizes)
            _synchronize(device)
            seconds.append(time.perf_counter() - start)
            yardstick.measure()
    finally:
        if collecting:
            gc.enable()
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
