"""How long training steps take, how long they wait for images, and what each worker uses.

Step times are the device's: on a GPU, events are recorded in its stream and read at a report, when
the host waits for the device anyway. Measuring never makes the host wait.
"""

import math
import statistics
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from gfl.data.dataset import Batch
from gfl.distributed import world_size
from gfl.evaluation.speed import peak_resident_bytes

STEP_TIMES = ("step_ms_p50", "step_ms_p90", "step_ms_p99")
"""Percentiles of the time of a step, in milliseconds."""

GAUGES = ("data_wait_share", "memory_gib", "gpu", "gpu_memory_gib")
"""What is logged for each worker: the share of the time (0 to 1) in which its host waited for
images, the peak memory of its process in GiB, the share of the time in which its GPU was busy, and
the peak memory of that GPU in GiB."""


class StepMeter:
    """Measures the steps of this worker between two reports."""

    def __init__(self, device: torch.device) -> None:
        """Start the clock for steps that run on `device`."""
        self._device = device
        self.restart()

    def restart(self) -> None:
        """Forget all measurements and start the clock anew."""
        self._marks = [self._now()]
        self._waited = 0.0
        self._started = time.perf_counter()

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield `batches`, and measure how long the host waits for each of them."""
        iterator = iter(batches)
        while True:
            started = time.perf_counter()
            batch = next(iterator, None)
            if batch is None:
                return
            self._waited += time.perf_counter() - started
            yield batch

    def end_step(self) -> None:
        """Mark the end of a step."""
        self._marks.append(self._now())

    def metrics(self) -> dict[str, float]:
        """Return `STEP_TIMES` of the slowest worker, the mean wait, and `GAUGES` of each worker.

        All workers must call it together, after the device has finished all steps. What a device
        cannot measure is left out.
        """
        own = torch.tensor(self._measure(), dtype=torch.double, device=self._device)
        rows = [own]
        if (workers := world_size()) > 1:
            rows = [torch.empty_like(own) for _ in range(workers)]
            dist.all_gather(rows, own)
        names = (*STEP_TIMES, *GAUGES)
        measured = [dict(zip(names, row, strict=True)) for row in torch.stack(rows).tolist()]
        metrics = {name: max(worker[name] for worker in measured) for name in STEP_TIMES}
        metrics["data_wait_share"] = statistics.fmean(w["data_wait_share"] for w in measured)
        for rank, worker in enumerate(measured):
            gauges = {f"worker{rank}.{name}": worker[name] for name in GAUGES}
            metrics |= {name: value for name, value in gauges.items() if not math.isnan(value)}
        return metrics

    def _measure(self) -> list[float]:
        """Return `STEP_TIMES` and `GAUGES` of this worker; NaN where it cannot be measured."""
        pairs = zip(self._marks[:-1], self._marks[1:], strict=True)
        times = torch.tensor([self._ms(*pair) for pair in pairs], dtype=torch.double)
        percentiles = torch.quantile(times, torch.tensor([0.5, 0.9, 0.99], dtype=torch.double))
        waited = self._waited / (time.perf_counter() - self._started)
        memory = peak_resident_bytes() / 2**30
        return [*percentiles.tolist(), waited, memory, *self._gpu_use()]

    def _gpu_use(self) -> tuple[float, float]:
        """Return the busy share of the GPU's time and the peak of its memory in GiB."""
        if self._device.type != "cuda":
            return math.nan, math.nan
        try:
            busy = torch.cuda.utilization(self._device) / 100
        except Exception:  # some drivers do not report it, and a gauge must not end a training
            busy = math.nan
        return busy, torch.cuda.max_memory_allocated(self._device) / 2**30

    def _now(self) -> Any:
        """Return this moment on the device: seconds, or an event in the GPU's stream."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _ms(self, start: Any, end: Any) -> float:
        """Return the milliseconds between two moments of `_now`."""
        if self._device.type != "cuda":
            return 1000 * float(end - start)
        return float(start.elapsed_time(end))
