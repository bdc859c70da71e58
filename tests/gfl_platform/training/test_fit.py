"""What a training leaves behind."""

from types import SimpleNamespace

from ray.train import Checkpoint

from gfl_platform.cluster import launch
from gfl_platform.cluster.resources import Workers
from gfl_platform.config import load_job
from gfl_platform.storage.storage import RunFolder, Storage
from gfl_platform.training import fit


def test_the_latest_checkpoint_stays_with_the_best(tiny_file, tmp_path, monkeypatch):
    """Ray goes on from the latest, which may rank below all that it keeps for their AP."""
    best, half, latest = (tmp_path / "run" / "ray" / f"checkpoint_{n}" for n in (1, 2, 3))
    for folder in (best, half, latest, best.with_name("another")):
        folder.mkdir(parents=True)
    result = SimpleNamespace(
        checkpoint=Checkpoint(latest),
        best_checkpoints=[(Checkpoint(best), {"AP": 0.6, "metrics": {"AP": 0.6}})],
        return_value={"epochs": 3, "fps": 9.0, "protocol": {"batch": 1}},
    )
    monkeypatch.setattr(launch, "run_workers", lambda *_, **__: result)
    job = load_job(tiny_file, [f"storage.root={tmp_path}"])
    folder = RunFolder(Storage(job.storage), tmp_path / "run")
    sources = {"weights": None, "teacher": None}
    training = fit.Training(job, sources, Workers(1, 1, False, 1), folder)
    trained = fit.run(training, None)
    assert trained == fit.FitResult(str(best), {"AP": 0.6}, 9.0, {"batch": 1}, 3)
    assert {path.name for path in best.parent.iterdir()} == {"another", best.name, latest.name}
