"""One contender at one case in a process of its own, which does what its standard input says.

`run` runs once and answers with the seconds that passed and those of the processor, `count` with
what `counting` counts, `found FILE` keeps the boxes of a prediction, and the end of the input is
answered with the peak of memory.
"""

import argparse
import importlib
import json
import resource
import sys
import time
from pathlib import Path

import torch

from benchmarks.cases import parse
from benchmarks.counting import count


def main() -> None:
    """Serve."""
    cli = argparse.ArgumentParser(description=__doc__)
    cli.add_argument("contender", help="MODULE:FUNCTION")
    cli.add_argument("case")
    cli.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    cli.add_argument("--threads", type=int, default=torch.get_num_threads())
    cli.add_argument("--weights", type=Path)
    arguments = cli.parse_args()
    device = arguments.device
    torch.set_num_threads(arguments.threads)
    module, _, function = arguments.contender.partition(":")
    contender = importlib.import_module(f"benchmarks.{module}")
    case = parse(arguments.case)
    before = _resident()
    work = getattr(contender, function)(case, device, arguments.weights)
    work()
    answer({"ready": True})
    for line in sys.stdin:
        command, _, file = line.strip().partition(" ")
        if command == "run":
            _synchronize(device)
            start, busy = time.perf_counter(), time.process_time()
            work()
            _synchronize(device)
            cpu = time.process_time() - busy
            answer({"seconds": time.perf_counter() - start, "cpu_seconds": cpu})
        elif command == "count":
            # The compiler's code would not run under the eyes of `count`.
            answer({"operations": None} if case.compiled else count(work))
        elif command == "found":
            torch.backends.cudnn.allow_tf32 = False  # which boxes are the best depends on rounding
            torch.save(contender.boxes(work()), file)
            answer({})
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else _peak() - before
    answer({"peak_bytes": peak})


def answer(facts: dict[str, object]) -> None:
    """Write one line of JSON."""
    print(json.dumps(facts), flush=True)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
