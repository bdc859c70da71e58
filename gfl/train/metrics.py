"""How fast every worker trains and what holds it up, measured without making the host wait.

Times are the device's: on a GPU events are recorded and read when the host waits for it anyway.
"""

import math
import resource
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from gfl.data.dataset import Batch
from gfl.distributed import world_size
from gfl.model.detector import Detector

OWN, SHARES = "own_ms", "shares"
STEP_TIMES = ("step_ms_p50", "step_ms_p90", "step_ms_p99")
USE = ("cpu", "memory_gib", "gpu", "gpu_memory_gib")
FIGURES = (*STEP_TIMES, "data_wait_share", OWN, SHARES, *USE)
"""Of a worker since the last report: percentiles of its steps; the part of the time in which its
host waited for images; what a share of a batch takes for that and for the network's forward passes,
where it waits for no other worker; its shares of a step; processor cores used, loaders apart; the
most memory it has held; the part of the time in which its GPU was busy, if the driver says; the
GPU's most memory."""

SLOW = 1.3
"""Times the median worker's `own_ms`: a straggler, if that costs a tenth of a step, too."""

SLOW_REPORTS = 3
"""In a row, before a straggler is named."""


class Pace:
    """Times the steps between two reports on this worker, and compares the workers."""

    def __init__(self, detector: Detector, device: torch.device, *, forward: bool = True) -> None:
        """Start the clock.

        Args:
            detector: In training.
            device: Where.
            forward: Whether forward passes can be timed: not those in a compiled graph.
        """
        self._device = device
        self._slow: list[int] = [0] * world_size()
        # A function, which copies of the detector share: a GPU's events cannot be copied.
        mark = lambda network, *_: self._mark_forward(network)  # noqa: E731
        hooks = (detector.register_forward_pre_hook, detector.register_forward_hook)
        self._hooks = [hook(mark) for hook in hooks] if forward else []
        self.restart()

    def restart(self) -> None:
        """Forget what was measured."""
        self._steps, self._forward = [self._now()], list[Any]()
        self._waited, self._shares, self._used = 0.0, 0, time.process_time()
        self._started = time.perf_counter()

    def fetched(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Give `batches`, and measure how long the host waits for each."""
        waiting = iter(batches)
        while True:
            started = time.perf_counter()
            batch = next(waiting, None)
            if batch is None:
                return
            self._waited += time.perf_counter() - started
            self._shares += 1
            yield batch

    def note_step(self) -> None:
        """Note the end of a step."""
        self._steps.append(self._now())

    def figures(self) -> list[dict[str, float]]:
        """Return the `FIGURES` of every worker that it could measure.

        To be called on all workers, when the device has done all steps.
        """
        mine = torch.tensor(self._measure(), dtype=torch.double, device=self._device)
        rows = [mine]
        if (workers := world_size()) > 1:
            rows = [torch.empty_like(mine) for _ in range(workers)]
            dist.all_gather(rows, mine)
        return [
            {name: value for name, value in zip(FIGURES, row, strict=True) if not math.isnan(value)}
            for row in torch.stack(rows).tolist()
        ]

    def stragglers(self, figures: list[dict[str, float]]) -> dict[int, float]:
        """Return workers that now have been slow for `SLOW_REPORTS`, and how many times slower."""
        own = [worker[OWN] for worker in figures]
        usual = statistics.median_low(own)
        named = {}
        for rank, milliseconds in enumerate(own):
            costs = (milliseconds - usual) * figures[rank][SHARES]
            slow = milliseconds > SLOW * usual and costs > 0.1 * figures[rank][STEP_TIMES[0]]
            self._slow[rank] = self._slow[rank] + 1 if slow else 0
            if self._slow[rank] == SLOW_REPORTS:
                named[rank] = milliseconds / max(usual, 1e-9)
        return named

    def end(self) -> None:
        """Leave the detector as it was."""
        for hook in self._hooks:
            hook.remove()

    def _measure(self) -> list[float]:
        passed = time.perf_counter() - self._started
        steps = [self._ms(*pair) for pair in zip(self._steps, self._steps[1:], strict=False)]
        marks = iter(self._forward)
        forward = sum(self._ms(*pair) for pair in zip(marks, marks, strict=True))
        times = torch.tensor(steps, dtype=torch.double)
        percentiles = torch.quantile(times, torch.tensor([0.5, 0.9, 0.99], dtype=torch.double))
        own = (1000 * self._waited + forward) / self._shares
        cores = (time.process_time() - self._used) / passed
        shares = self._shares / len(steps)
        return [*percentiles.tolist(), self._waited / passed, own, shares, cores, *self._usage()]

    def _usage(self) -> tuple[float, float, float]:
        """Return GiB of the host's memory, the share of the GPU's time, GiB of its memory."""
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        memory *= 1 if sys.platform == "darwin" else 1024
        if self._device.type != "cuda":
            return memory / 2**30, math.nan, math.nan
        try:
            busy = torch.cuda.utilization(self._device) / 100
        except Exception:  # what the driver does not tell: a gauge must not end a training
            busy = math.nan
        return memory / 2**30, busy, torch.cuda.max_memory_allocated(self._device) / 2**30

    def _mark_forward(self, detector: torch.nn.Module) -> None:
        if detector.training:
            self._forward.append(self._now())

    def _now(self) -> Any:
        """Return this moment on the device."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _ms(self, start: Any, end: Any) -> float:
        if self._device.type != "cuda":
            return 1000 * float(end - start)
        return float(start.elapsed_time(end))


def of_all(figures: list[dict[str, float]]) -> dict[str, float]:
    """Return what is logged: a step's times on the slowest worker, waiting, and each worker's own.

    Args:
        figures: What `Pace.figures` returned.
    """
    logged = {name: max(worker[name] for worker in figures) for name in STEP_TIMES}
    logged["data_wait_share"] = statistics.fmean(worker["data_wait_share"] for worker in figures)
    for rank, worker in enumerate(figures):
        own = {name: value for name, value in worker.items() if name not in STEP_TIMES}
        logged |= {f"worker{rank}.{name}": value for name, value in own.items()}
    return logged
