"""What a store does not take now waits in its order; what it refuses for good is kept."""

import contextlib
import shlex

import mlflow.cli
import pytest
import sqlalchemy
from click.testing import CliRunner
from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_TAG_VAL_LENGTH

from gfl_platform.cluster.events import (
    DataDescribed,
    EpochEvaluated,
    FolderWritten,
    RunOpened,
    StepsDone,
    TagsSet,
)
from gfl_platform.config import load_job
from gfl_platform.registry import models
from gfl_platform.tracking.client import TrackingError
from gfl_platform.tracking.delivery import capped
from gfl_platform.tracking.metadata import IDENTITY, RUN_FILE, describe
from gfl_platform.tracking.run import RunTracker, settle
from gfl_platform.tracking.spool import SPOOL_FILE, Spool, backlog, refusals
from gfl_platform.tracking.status import STATUS_FILE, StatusFile, read_status
from tests.support import servers
from tests.support.tracking import history, store_of


def steps(number):
    return StepsDone(number, 999, number / 10, 0.0, {"loss": 1 / number})


def spooling(job):
    """Return a job whose training may begin while the store does not answer."""
    return job.model_copy(
        update={"tracking": job.tracking.model_copy(update={"unreachable": "spool"})}
    )


@pytest.fixture
def job(tiny_file, tmp_path):
    return load_job(tiny_file, [f"storage.root={tmp_path}"])


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    return folder


def logged_steps(job, run_id):
    return [point.step for point in history(store_of(job).client, run_id, "loss")]


def test_a_deleted_experiment_is_an_error_before_a_run_and_its_advice_works(job, folder):
    store = store_of(job)
    store.client.delete_experiment(store.find_experiment())
    with pytest.raises(TrackingError, match="the experiment 'gfl' is deleted in sqlite") as error:
        store.require_ready()
    with pytest.raises(TrackingError, match=r"set tracking\.experiment to another name"):
        store_of(spooling(job)).require_ready()
    command = str(error.value).split("(")[1].split(")")[0]
    setting, program, *words = shlex.split(command)
    assert program == "mlflow"
    environment = dict([setting.split("=", 1)])
    assert CliRunner().invoke(mlflow.cli.cli, words, env=environment).exit_code == 0
    store.require_ready()


def test_nothing_is_dropped_while_the_experiment_is_deleted(job, folder, caplog):
    store = store_of(job)
    identifier = store.find_experiment()
    store.client.delete_experiment(identifier)
    with RunTracker(store, folder, describe(job, "one")) as tracker:
        for number in range(1, 4):
            tracker.handle(steps(number))
            tracker.flush()
    assert caplog.text.count("'gfl' is deleted") == 1
    assert backlog(folder) == 5
    with pytest.raises(TrackingError, match="'gfl' is deleted"):
        tracker.require_run()
    store.client.restore_experiment(identifier)
    settle(store, folder)
    assert backlog(folder) == 0
    (run,) = store.client.search_runs([identifier])
    assert logged_steps(job, run.info.run_id) == [1, 2, 3]
    assert run.info.status == "FINISHED"


def test_a_deleted_run_is_said_once_and_takes_everything_when_it_is_restored(job, folder, caplog):
    store = store_of(job)
    tracker = RunTracker(store, folder, describe(job, "one"))
    store.client.delete_run(tracker.run_id)
    for number in range(1, 4):
        tracker.handle(steps(number))
        tracker.flush()
    assert caplog.text.count("is deleted in") == 1
    assert f"mlflow runs restore --run-id {tracker.run_id}" in caplog.text
    assert (backlog(folder), refusals(folder)) == (3, [])
    store.client.restore_run(tracker.run_id)
    tracker.close("FINISHED")
    assert logged_steps(job, tracker.run_id) == [1, 2, 3]


def test_a_refused_event_is_kept_shown_and_tried_again_and_holds_up_nothing(job, folder, caplog):
    bad = StepsDone(2, 999, 0.2, 0.0, {"a\tb": 1.0})
    with RunTracker(store_of(job), folder, describe(job, "one")) as tracker:
        tracker._spool.add(steps(1))
        tracker._spool.add(bad)
        tracker._spool.add(steps(3))
        tracker.handle(FolderWritten(str(folder / "report")))
    assert backlog(folder) == 0
    assert logged_steps(job, tracker.run_id) == [1, 3]
    assert [reason.split(":")[0] for reason in refusals(folder)] == ["steps", "folder"]
    row = read_status(folder)["refused by MLflow"]
    assert row.startswith("2 events, the last one folder: ")
    assert "report is gone; --deliver tries them again" in row
    assert caplog.text.count("not logged: ") == 2
    (folder / "report").mkdir()
    (folder / "report" / "index.html").write_text("figures")
    settle(store_of(job), folder)
    assert [reason.split(":")[0] for reason in refusals(folder)] == ["steps"]
    (file,) = store_of(job).client.list_artifacts(tracker.run_id, "report")
    assert file.path == "report/index.html"
    assert "probe" not in store_of(job).client.get_run(tracker.run_id).data.tags


def test_an_event_that_makes_no_sense_here_is_kept_and_holds_up_nothing(job, folder):
    with RunTracker(store_of(job), folder, describe(job, "one")) as tracker:
        texts = ('{"kind": "of tomorrow", "x": 1}', '{"kind": "steps"}', "[]", "{", b"\xff")
        for text in texts:
            tracker._spool._db.execute("INSERT INTO events (event) VALUES (?)", (text,))
        tracker.handle(DataDescribed(["no mapping"], []))
        tracker.handle(steps(1))
    assert backlog(folder) == 0
    assert len(refusals(folder)) == len(texts) + 1
    assert logged_steps(job, tracker.run_id) == [1]


@pytest.mark.parametrize("longest", [MAX_PARAM_VAL_LENGTH, MAX_TAG_VAL_LENGTH])
def test_values_are_capped_to_what_every_store_takes(longest):
    values = {"fits": "x" * longest, "long": "x" * (longest + 1), "odd": "a\0b\ud800c"}
    short = capped(values, longest)
    assert short["fits"] == values["fits"]
    assert (len(short["long"]), short["long"][-2:]) == (longest, "x…")
    assert short["odd"] == "a\ufffdb?c"


@pytest.mark.chaos
@pytest.mark.parametrize("retries", [0, 2])
def test_a_lost_answer_doubles_nothing(tiny_file, folder, tmp_path, monkeypatch, retries):
    """Whether MLflow's client asks again by itself, or only the spool does."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(retries))
    server = servers.MLflow(tmp_path)
    server.start()
    front = servers.LosesAnswers(server)
    job = load_job(tiny_file, [f"tracking.uri={front.uri}", f"storage.root={tmp_path}"])
    store = store_of(spooling(job))
    front.paths |= {"/runs/create", "/logged-models", "/log-batch"}
    with RunTracker(store, folder, describe(job, "one"), may_be_away=True) as tracker:
        tracker.handle(steps(1))
        tracker.handle(EpochEvaluated(4, 1, {"AP": 0.5}, "s3://b/epoch-1"))
        for _ in range(3):
            tracker.flush()
    try:
        assert not front.paths
        experiment = store.find_experiment()
        (run,) = store.client.search_runs([experiment])
        assert (run.info.run_id, run.info.status) == (tracker.run_id, "FINISHED")
        assert logged_steps(job, tracker.run_id) == [1]
        (model,) = store.client.search_logged_models([experiment])
        assert model.tags["uri"] == "s3://b/epoch-1"
        assert [point.value for point in history(store.client, tracker.run_id, "AP")] == [0.5]
        checkpoint = tmp_path / "checkpoint"
        checkpoint.mkdir()
        (checkpoint / "about.json").write_text("{}")
        front.paths.add("/model-versions/create")
        facts = {"AP": 0.5}
        with contextlib.suppress(Exception if not retries else ()):
            models.register_once(store, "m", checkpoint, tracker.run_id, facts)
        models.register_once(store, "m", checkpoint, tracker.run_id, facts)
        assert not front.paths
        assert len(store.client.search_model_versions("name = 'm'")) == 1
    finally:
        front.stop()
        server.stop()


@pytest.mark.parametrize("content", ["", '{"run_id": '], ids=["empty", "truncated"])
def test_a_damaged_run_file_is_rebuilt(job, folder, caplog, content):
    with RunTracker(store_of(job), folder, describe(job, "one")) as tracker:
        tracker.handle(steps(1))
    (folder / RUN_FILE).write_text(content)
    assert read_status(folder)["MLflow run"] == "none yet"
    with RunTracker(store_of(job), folder, describe(job, "one")) as again:
        again.handle(steps(2))
    assert again.run_id == tracker.run_id
    assert logged_steps(job, again.run_id) == [1, 2]
    assert caplog.text.count("it is rebuilt from") == 1
    (aside,) = folder.glob(f"{RUN_FILE}.damaged-*")
    assert aside.read_text() == content


def test_a_damaged_run_file_that_cannot_be_rebuilt_is_named_and_the_advice_works(job, folder):
    with RunTracker(store_of(job), folder, describe(job, "one")) as tracker:
        tracker.handle(steps(1))
    (folder / RUN_FILE).write_text("")
    (folder / SPOOL_FILE).unlink()
    with pytest.raises(TrackingError, match=r"run\.json is damaged .* write {\"run_id\": \"ID\"}"):
        RunTracker(store_of(job), folder, describe(job, "one"))
    (folder / RUN_FILE).write_text(f'{{"run_id": "{tracker.run_id}"}}')
    with RunTracker(store_of(job), folder, describe(job, "one")) as again:
        again.handle(steps(2))
    assert logged_steps(job, tracker.run_id) == [1, 2]


@pytest.mark.parametrize("content", ["", "garbage"])
def test_a_damaged_status_file_is_written_anew(folder, caplog, content):
    (folder / STATUS_FILE).write_text(content)
    assert read_status(folder)["state"] == "not started"
    with StatusFile(folder, workers=1, nodes=1):
        assert read_status(folder)["state"] == "starting"
    assert "status.json is damaged" in caplog.text


@pytest.fixture(scope="module")
def database(postgres):
    """A function that runs a statement in PostgreSQL, beside MLflow."""
    engine = sqlalchemy.create_engine(postgres, isolation_level="AUTOCOMMIT")

    def run(statement):
        with engine.connect() as connection:
            return connection.execute(sqlalchemy.text(statement))

    yield run
    engine.dispose()


OTHERS = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE pid != pg_backend_pid() AND datname = 'postgres'"
)


@contextlib.contextmanager
def read_only(database):
    database("ALTER DATABASE postgres SET default_transaction_read_only = on")
    database(OTHERS)
    yield
    # The server itself is read-only for this connection, too.
    database("SET default_transaction_read_only = off; "
             "ALTER DATABASE postgres SET default_transaction_read_only = off")  # fmt: skip
    database(OTHERS)


@contextlib.contextmanager
def exhausted_pool(engines):
    with contextlib.ExitStack() as stack:
        for engine in engines:
            with contextlib.suppress(sqlalchemy.exc.TimeoutError):
                while True:
                    stack.enter_context(engine.connect())
        yield


@pytest.fixture
def engines(monkeypatch):
    """The engines that MLflow makes, each with a small pool of connections."""
    engines, create = [], sqlalchemy.create_engine

    def create_small(uri, **options):
        if "connect_args" in options:  # The check whether the database answers.
            return create(uri, **options)
        engines.append(create(uri, **options, pool_size=3, max_overflow=0, pool_timeout=0.2))
        return engines[-1]

    monkeypatch.setattr(sqlalchemy, "create_engine", create_small)
    return engines


@pytest.mark.chaos
@pytest.mark.parametrize("fault", ["read-only", "pool", "killed"])
def test_a_database_that_takes_nothing_for_a_while_loses_nothing(
    tiny_file, postgres, database, engines, folder, tmp_path, fault, caplog
):
    uri = f"{postgres}?application_name={fault}"
    words = [f"tracking.uri={uri}", f"tracking.experiment={fault}", f"storage.root={tmp_path}"]
    job = load_job(tiny_file, words)
    tracker = RunTracker(store_of(job), folder, describe(job, fault))
    tracker.handle(steps(1))
    tracker.flush()
    assert backlog(folder) == 0
    if fault == "killed":
        for number in range(2, 10):
            database(OTHERS)
            tracker.handle(steps(number))
            tracker.flush()
    else:
        context = read_only(database) if fault == "read-only" else exhausted_pool(engines)
        with context:
            for number in range(2, 10):
                tracker.handle(steps(number))
            tracker.flush()
            assert backlog(folder) == 8
            assert "events wait" in caplog.text
    tracker.close("FINISHED")
    assert (backlog(folder), refusals(folder)) == (0, [])
    assert logged_steps(job, tracker.run_id) == list(range(1, 10))


@pytest.mark.chaos
def test_a_run_is_opened_with_values_that_are_too_long(tiny_file, postgres, folder, tmp_path):
    words = [f"tracking.uri={postgres}", "tracking.experiment=long", f"storage.root={tmp_path}"]
    job = load_job(tiny_file, words)
    long = {"git.changed": "x" * 9000, "odd": "\0", IDENTITY: "i" * 32}
    opened = RunOpened("long", long, {"key": "y" * 9000}, {"a.txt": "z"})
    with RunTracker(store_of(job), folder, opened) as tracker:
        tracker.handle(TagsSet({"note": "x" * 20_000}))
        tracker.handle(steps(1))
    assert (backlog(folder), refusals(folder)) == (0, [])
    run = store_of(job).client.get_run(tracker.run_id)
    lengths = [len(run.data.tags["git.changed"]), len(run.data.tags["note"])]
    assert lengths == [MAX_TAG_VAL_LENGTH] * 2
    assert len(run.data.params["key"]) == MAX_PARAM_VAL_LENGTH


@pytest.mark.parametrize(
    "content", [b"", b"nonsense " * 1000, None], ids=["empty", "garbage", "truncated"]
)
def test_a_damaged_spool_is_put_aside_and_the_run_goes_on(job, folder, caplog, content):
    with RunTracker(store_of(job), folder, describe(job, "one")) as tracker:
        tracker.handle(steps(1))
        tracker.handle(steps(2))
    path = folder / SPOOL_FILE
    damaged = path.read_bytes()[:5000] if content is None else content
    path.write_bytes(damaged)
    assert "unknown" in read_status(folder)["waits for MLflow"] or not content
    with RunTracker(store_of(job), folder, describe(job, "one")) as again:
        again.handle(steps(2))
        again.handle(steps(3))
    assert again.run_id == tracker.run_id
    assert logged_steps(job, again.run_id) == [1, 2, 3]
    (aside,) = folder.glob(f"{SPOOL_FILE}.damaged-*")
    assert aside.read_bytes() == damaged
    (warning,) = [record for record in caplog.records if "damaged" in record.getMessage()]
    assert str(path) in warning.getMessage()
    assert backlog(folder) == 0


@pytest.mark.parametrize("has_answered", [True, False])
def test_a_spool_that_is_damaged_while_a_run_writes_does_not_end_it(
    job, folder, caplog, monkeypatch, has_answered
):
    store = store_of(job)
    with monkeypatch.context() as patch:
        if not has_answered:
            patch.setattr(type(store), "client", property(lambda _: 1 / 0))
        tracker = RunTracker(store, folder, describe(job, "one"))
        tracker.handle(steps(1))
        tracker.flush()
        with (folder / SPOOL_FILE).open("r+b") as file:
            file.write(b"garbage " * 2000)
        tracker.handle(steps(2))
    tracker.close("FINISHED")
    assert logged_steps(job, tracker.run_id)[-1] == 2
    assert store.client.get_run(tracker.run_id).info.status == "FINISHED"
    assert caplog.text.count("is damaged") == 1
    assert "Traceback" not in caplog.text


def test_a_status_beside_a_run_that_writes_never_fails(job, folder):
    spool = Spool(folder / SPOOL_FILE)
    with spool.transaction():
        spool.add(steps(1))
        assert read_status(folder)["waits for MLflow"] == "0 events"
    assert read_status(folder)["waits for MLflow"] == "1 events"
