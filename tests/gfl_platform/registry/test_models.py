"""The registry with more in it than MLflow gives at once."""

from gfl_platform.config import JobConfig
from gfl_platform.registry import models
from gfl_platform.tracking.client import connect

MORE_THAN_A_PAGE = 101


def test_models_and_checkpoints_beyond_the_first_page_are_found(tmp_path, monkeypatch):
    from mlflow.entities import Metric

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    job = JobConfig(storage={"root": str(tmp_path)})
    client = connect(job)
    experiment = client.create_experiment("e", artifact_location=f"file://{tmp_path}/artifacts")
    run_id = client.create_run(experiment).info.run_id
    (best := tmp_path / "best").mkdir()
    for number in range(MORE_THAN_A_PAGE):
        client.create_registered_model(f"m{number:03}")
        made = client.create_logged_model(experiment, source_run_id=run_id, tags={"uri": str(best)})
        if number == 0:
            ap = Metric("AP", 0.5, 0, 0, model_id=made.model_id)
            client.log_batch(run_id, metrics=[ap])
    assert len(models._names(client)) == MORE_THAN_A_PAGE
    for way in (f"runs:/{run_id}", run_id):
        assert models.fetch_checkpoint(job, way, tmp_path) == best
        assert models.run_of(job, way) == run_id
