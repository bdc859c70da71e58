"""A secret that goes in comes out nowhere."""

import logging
import sqlite3
import sys

import pytest

from gfl.config.loader import ConfigError
from gfl_platform.cluster.events import StepsDone, TagsSet, WorkerFailed
from gfl_platform.cluster.submit import SubmissionError, _require_sound
from gfl_platform.config import job_of, load_job
from gfl_platform.redaction import redact
from gfl_platform.tracking.client import TrackingError
from gfl_platform.tracking.metadata import describe
from gfl_platform.tracking.run import RunTracker
from gfl_platform.tracking.status import StatusFile
from jobs.console import cli
from tests.support.tracking import store_of

SECRET = "hunter2-hunter2"


@pytest.mark.parametrize(
    "text",
    [
        "http://u:SECRET@host:5000",
        "http://:SECRET@host",
        "https://SECRET@github.com/a.git",
        "postgresql://u:SECRET@SECRET/x@host/db",
        "no: API request to http://u:SECRET@h/api",
        "https://b.s3.amazonaws.com/best.pth?X-Amz-Signature=SECRET&X-Amz-Date=1",
        "https://h/a?x=1&access_token=SECRET",
        "https://h/a?sig=SECRET",
        "password: SECRET",
        "+  db_password: SECRET",
        "+DB_TOKEN=SECRET",
        '{"api_key": "SECRET"}',
        "client(token='SECRET')",
        "Authorization: Bearer SECRET",
    ],
)
def test_secrets_are_masked(text):
    shown = redact(text.replace("SECRET", SECRET))
    assert SECRET not in shown
    assert "***" in shown


@pytest.mark.parametrize(
    "text",
    [
        "http://h:1 is not a@b",
        "http://host:5000/#/models/x@champion",
        "postgresql+psycopg2://postgres@127.0.0.1:5432/db",
        "models:/shapes@champion",
        "s3://bucket/prefix/epoch=3",
        "page = search(page_token=token)",
        "+    token = page.token",
        '{"kind": "steps", "metrics": {"loss": 1.0}}',
    ],
)
def test_what_is_no_secret_stays(text):
    assert redact(text) == text


def test_values_of_secret_variables_are_masked_and_the_folder_is_not(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    monkeypatch.setenv("PWD", "/home/ada")
    assert redact(f"in /home/ada: {SECRET}") == "in /home/ada: ***"


@pytest.mark.parametrize(
    "word",
    [
        f"data.train.images=s3://key:{SECRET}@bucket/images",
        f"storage.root=s3://key:{SECRET}@bucket",
        f"model.pretrained=https://h/best.pth?X-Amz-Signature={SECRET}",
        f"loss.distillation={{teacher: 'https://u:{SECRET}@h/x'}}",
    ],
)
def test_credentials_in_a_location_are_refused_by_name(tiny_file, word):
    with pytest.raises(ConfigError, match="AWS_SECRET_ACCESS_KEY") as error:
        load_job(tiny_file, [word])
    assert word.split("=")[0] in str(error.value)
    assert SECRET not in str(error.value)
    if word.startswith("storage"):
        with pytest.raises(ConfigError, match="credentials in a location"):
            job_of([word])


def test_a_submitted_command_holds_no_credentials(tmp_path):
    word = f"tracking.uri=http://u:{SECRET}@h"
    with pytest.raises(SubmissionError, match="MLFLOW_TRACKING_PASSWORD") as error:
        _require_sound(tmp_path, [], [word])
    assert SECRET not in str(error.value)


def test_a_secret_reaches_no_file_of_a_run_and_no_message(
    tiny_file, tmp_path, monkeypatch, caplog, capsys
):
    """MLflow's database is a file, so that everything that MLflow was told is seen, too."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    monkeypatch.setenv("GFL_GIT_COMMIT", "abc")
    monkeypatch.setenv("GFL_GIT_DIFF", f"+x = '{SECRET}'\n")
    url = f"https://u:{SECRET}@host/x?token={SECRET}"
    job = load_job(tiny_file, [f"storage.root={tmp_path}"])
    dead = load_job(
        tiny_file, [f"storage.root={tmp_path}", f"tracking.uri=http://u:{SECRET}@[::1]:9"]
    )
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError) as error:
        store_of(dead).require_answer()
    opened = describe(dead, "one", {"from": url})
    with (
        RunTracker(store_of(job), tmp_path, opened) as tracker,
        StatusFile(tmp_path, workers=1, nodes=1) as status,
    ):
        for event in (
            StepsDone(1, 2, 0.5, 1.0, {"loss": 1.0}),
            TagsSet({"weights": url}),
            WorkerFailed(0, f"no answer from {url}", final=False),
        ):
            tracker.handle(event)
            status.handle(event)
        status.handle(WorkerFailed(0, f"no answer from {url}", final=False))
        tracker.flush()
    monkeypatch.setattr(sys, "argv", ["job"])

    line = logging.makeLogRecord({"msg": "reading %s", "args": (url,)})
    assert cli._without_secrets(line)

    def job_with_error(_):
        raise ValueError(f"{url}: no answer")

    with pytest.raises(SystemExit):
        cli.run(job_with_error, cli.parse(cli.parser("", "")))
    outputs = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"run.json", "status.json", "spool.db", "mlflow.db", "config.yaml", "git.diff"} <= {
        path.name for path in outputs
    }
    for path in outputs:
        assert SECRET.encode() not in path.read_bytes(), path
    out, err = capsys.readouterr()
    assert "no answer" in err
    assert "reading https" in line.getMessage()
    assert SECRET not in f"{line.getMessage()} {out} {err} {error.value} {caplog.text}"
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("SELECT count(*) FROM tags WHERE value LIKE '%***%'").fetchone()[0]
