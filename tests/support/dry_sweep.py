"""A sweep whose trainings are a formula: `python -m tests.support.dry_sweep CONFIG key=value`."""

import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from ray import cloudpickle

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # where trials run this is no module


def dry_training(job: Any, folder: Any, _workers: Any, events: Any) -> Any:
    """Stand in for a training: AP is a formula of beta, reg_max, seed and epoch.

    Beta 0.5 diverges and beta 3 is refused. What is done is kept in `folder`, as by checkpoints.
    """
    from ray import tune

    from gfl_platform.cluster.events import EpochEvaluated, TrialOutcome
    from gfl_platform.cluster.launch import DivergedError

    beta, bins = job.loss.qfl.beta, job.model.reg_max
    if beta == 0.5:
        raise DivergedError("step 3: NaN or infinity")
    if beta == 3:
        raise ValueError("3 is no good")
    done = folder.path / "epochs"
    for epoch in range(1, job.schedule.epochs + 1):
        ap = (1 - 0.1 * abs(beta - 2) - 0.01 * abs(bins - 8)) * epoch / (epoch + 1)
        ap += 0.001 * job.seed
        metrics = {"AP": ap, "AP50": ap, "AP75": ap, "APs": 0.0}
        if done.exists() and epoch <= int(done.read_text()):
            continue
        time.sleep(float(os.environ.get("DRY_EPOCH_S", "0.05")))
        done.write_text(str(epoch))
        events.tell(EpochEvaluated(10 * epoch, epoch, metrics, str(folder.path / "ray")))
        tune.report({**metrics, "epoch": epoch})
    figures = {**metrics, "fps": 10.0 + bins, "latency_ms": 1000 / (10 + bins)}
    return TrialOutcome("finished", figures=figures, epochs=job.schedule.epochs)


def _memory(name: str) -> float:
    """Return an entry of this process's status in MiB: `VmRSS` is now, `VmHWM` the most ever."""
    entry = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert entry
    return int(entry[1]) / 1024


def main() -> None:
    """Run the sweep; print the states of its trials, and the MiB that the trials cost the driver.

    They are the most that this process had, beyond what it had when the first trial ended. All
    libraries that the driver needs are loaded by then.
    """
    import optuna.importance  # noqa: F401
    import scipy.stats  # noqa: F401
    import sklearn.ensemble  # noqa: F401

    from gfl_platform.cluster.events import TrialEnded
    from gfl_platform.config import load_job
    from gfl_platform.sweeps.analysis import report  # noqa: F401
    from gfl_platform.sweeps.run import run_sweep

    baseline: list[float] = []

    def watch(trial: Any, event: Any) -> None:
        if isinstance(event, TrialEnded) and not baseline:
            baseline.append(_memory("VmRSS"))

    job = load_job(sys.argv[1], sys.argv[2:])
    results = run_sweep(job, "dry", resume=False, watch=watch, train=dry_training)
    sys.stdout.write(f"{len(results.trials)} { ({t.state for t in results.trials}) }\n")
    sys.stdout.write(f"{_memory('VmHWM') - baseline[0]:.0f}\n")


if __name__ == "__main__":
    main()
