"""Lookup with more in the registry than MLflow gives at once, and interrupted registrations."""

from pathlib import Path

from gfl_platform.config import JobConfig
from gfl_platform.registry import models
from tests.support.tracking import store_of

MORE_THAN_A_PAGE = 101


def test_models_and_checkpoints_beyond_the_first_page_are_found(tmp_path, monkeypatch):
    from mlflow.entities import Metric

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    job = JobConfig(storage={"root": str(tmp_path)})
    client = store_of(job).client
    experiment = client.create_experiment("e", artifact_location=f"file://{tmp_path}/artifacts")
    run_id = client.create_run(experiment).info.run_id
    (best := tmp_path / "best").mkdir()
    for number in range(MORE_THAN_A_PAGE):
        client.create_registered_model(f"m{number:03}")
        logged = client.create_logged_model(
            experiment, source_run_id=run_id, tags={"uri": str(best)}
        )
        if number == 0:
            ap = Metric("AP", 0.5, 0, 0, model_id=logged.model_id)
            client.log_batch(run_id, metrics=[ap])
    client.create_registered_model("m000-decisions", tags={"gfl.decisions_of": "m000"})
    assert len(models._names(client)) == MORE_THAN_A_PAGE
    for way in (f"runs:/{run_id}", run_id):
        assert models.fetch_checkpoint(store_of(job), way, tmp_path) == best
        assert models.run_of(store_of(job), way) == run_id


def test_a_registration_that_was_interrupted_before_its_tags_is_finished(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    job = JobConfig(storage={"root": str(tmp_path)})
    client = store_of(job).client
    experiment = client.create_experiment("e", artifact_location=f"file://{tmp_path}/artifacts")
    run_id = client.create_run(experiment).info.run_id
    client.create_registered_model("m")
    client.create_model_version("m", "file:///absent", run_id)
    facts = {"AP": 1.0, "fps": 30.0}
    for _ in range(2):
        assert models.register_once(store_of(job), "m", Path("unread"), run_id, facts) == 1
    assert models.find(store_of(job), "m", "1").tags == {"AP": "1", "fps": "30"}
