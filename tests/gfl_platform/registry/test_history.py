"""The promotion history on real databases: two who decide at once, crashes, aliases moved by hand.

The command that follows a crash finishes it; a process is killed in earnest in
`test_what_a_kill_interrupted_is_finished`.
"""

import json
import subprocess
import sys
import time

import pytest

from gfl_platform.provenance import acting_user, git_state
from gfl_platform.registry import history
from gfl_platform.registry.history import Decision, HistoryError, read_history, record, settle

PROMOTER = """
import sys
from mlflow import MlflowClient
from gfl_platform.registry.history import Decision, record, settle
uri, *versions = sys.argv[1:]
client = MlflowClient(uri, uri)
for version in map(int, versions):
    record(client, "m", Decision("promoted", version, settle(client, "m").aliases, ["a test"]))
"""


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.chaos)])
def database(request, tmp_path):
    """The URI of a database that holds a model `m` of four versions."""
    from mlflow import MlflowClient

    sqlite = f"sqlite:///{tmp_path}/mlflow.db"
    uri = sqlite if request.param == "sqlite" else request.getfixturevalue("postgres")
    client = MlflowClient(uri, uri)
    client.create_registered_model("m")
    for version in range(4):
        client.create_model_version("m", f"file://{tmp_path}/{version}")
    yield uri
    for model in client.search_registered_models():
        client.delete_registered_model(model.name)


@pytest.fixture
def client(database):
    from mlflow import MlflowClient

    return MlflowClient(database, database)


def promotion(version, **before):
    return Decision("promoted", version, before, ["a test"])


def interrupt(client, monkeypatch, decision, moved=()):
    """Record a decision as a process does that dies once the aliases `moved` have moved."""

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(history, "_apply", crash)
        with pytest.raises(KeyboardInterrupt):
            record(client, "m", decision)
    for alias in moved:
        client.set_registered_model_alias("m", alias, str(decision.aliases[alias]))


def test_a_decision_says_what_who_when_and_on_which_code(client):
    before = time.time_ns() // 1_000_000
    figures = {"candidate": {"AP": 0.5}}
    recorded = record(client, "m", Decision("promoted", 1, {}, ["AP 0.5."], figures))
    assert recorded.number == 1
    assert recorded.applied
    assert recorded.aliases == {"champion": 1}
    assert recorded.user == acting_user()
    assert recorded.commit == git_state()[0]
    assert before <= recorded.time_ms <= time.time_ns() // 1_000_000
    past = read_history(client, "m")
    assert (past.decisions, past.aliases) == ([recorded], {"champion": 1})
    (tag,) = client.get_model_version("m", "1").tags.values()
    assert json.loads(tag)["figures"] == figures


def test_a_refusal_is_kept_and_moves_nothing(client):
    record(client, "m", promotion(1))
    refused = record(client, "m", Decision("refused", 2, {"champion": 1}, ["slow"]))
    past = settle(client, "m")
    assert past.aliases == {"champion": 1}
    assert [decision.action for decision in past.decisions] == ["promoted", "refused"]
    assert past.decisions[-1] == refused
    assert past.latest_move.version == 1
    assert past.moved_by_hand == []


def test_the_order_is_that_of_writing_even_when_a_clock_lags(client, monkeypatch):
    monkeypatch.setattr(history, "time", FrozenTime)
    for version in (3, 1, 2):
        record(client, "m", promotion(version, **settle(client, "m").aliases))
    decisions = settle(client, "m").decisions
    assert [decision.version for decision in decisions] == [3, 1, 2]
    assert [decision.number for decision in decisions] == [1, 2, 3]
    assert decisions[-1].aliases == {"champion": 2, "previous": 1}


class FrozenTime:
    """A clock that stands still."""

    sleep = time.sleep

    @staticmethod
    def time_ns():
        return 1_700_000_000_000_000_000


def test_of_two_who_promote_at_once_the_history_shows_both(database, client):
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROMOTER, database, *versions], stderr=subprocess.PIPE, text=True
        )
        for versions in ("1212", "3434")
    ]
    for process in both:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    past = settle(client, "m")
    versions = [decision.version for decision in past.decisions]
    assert len(versions) == 8
    assert [version for version in versions if version in (1, 2)] == [1, 2, 1, 2]
    assert [version for version in versions if version in (3, 4)] == [3, 4, 3, 4]
    assert all(decision.applied for decision in past.decisions)
    assert past.aliases == past.latest_move.aliases
    assert past.moved_by_hand == []


def test_of_two_promotions_in_one_instant_the_later_holds(client, monkeypatch):
    record(client, "m", promotion(1))
    interrupt(client, monkeypatch, promotion(2, champion=1))  # a process that goes on below
    (slow,) = (decision for decision in read_history(client, "m").decisions if not decision.applied)
    record(client, "m", promotion(3, champion=1))
    history._apply(client, "m", slow)
    past = settle(client, "m")
    assert past.aliases == {"champion": 3, "previous": 1}
    assert [decision.version for decision in past.decisions] == [1, 2, 3]


def test_what_a_crash_interrupted_is_finished(client, monkeypatch):
    interrupt(client, monkeypatch, promotion(1))
    assert read_history(client, "m").aliases == {}
    past = settle(client, "m")
    assert past.aliases == {"champion": 1}
    assert past.moved_by_hand == []
    interrupt(client, monkeypatch, promotion(2, champion=1), moved=["previous"])
    past = settle(client, "m")
    assert past.aliases == {"champion": 2, "previous": 1}
    assert all(decision.applied for decision in past.decisions)
    assert len(past.decisions) == 2


def test_what_a_kill_interrupted_is_finished(database, client):
    process = subprocess.Popen([sys.executable, "-c", PROMOTER, database, *"1234" * 100])
    while len(read_history(client, "m").decisions) < 5:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()  # wherever it is
    process.wait()
    past = settle(client, "m")
    assert past.latest_move.applied
    assert past.aliases == past.latest_move.aliases
    assert past.decisions[-1] == past.latest_move


def test_an_alias_moved_by_hand_is_respected_and_shown(client):
    record(client, "m", promotion(1))
    client.set_registered_model_alias("m", "champion", "4")
    for _ in range(2):
        past = settle(client, "m")
        assert past.champion == 4
        assert past.moved_by_hand == ["champion was version 1 and is version 4, by no decision."]
    refused = record(client, "m", Decision("refused", 2, past.aliases, ["slow"]))
    assert refused.reasons == [*past.moved_by_hand, "slow"]
    assert settle(client, "m").moved_by_hand == []  # the refusal says it
    client.delete_registered_model_alias("m", "champion")
    past = settle(client, "m")
    assert past.aliases == {}
    assert past.moved_by_hand == ["champion was version 1 and is nothing, by no decision."]


def test_an_alias_moved_by_hand_after_a_crash_is_respected(client, monkeypatch):
    record(client, "m", promotion(1))
    interrupt(client, monkeypatch, promotion(2, champion=1))
    client.set_registered_model_alias("m", "champion", "4")
    for champion in (4, 1):  # the second is where it was before the crash
        client.set_registered_model_alias("m", "champion", str(champion))
        past = settle(client, "m")
        assert past.champion == champion
        assert past.moved_by_hand[0] == f"champion was version 2 and is version {champion}, by " + (
            "no decision."
        )


def test_a_tag_that_is_no_decision_is_passed_over(client, caplog):
    record(client, "m", promotion(1))
    for name, text in (("a", "{}"), ("b", "no JSON")):
        client.set_model_version_tag("m", "2", f"{history.DECISION}{name}", text)
    client.set_model_version_tag("m", "2", "mine", "no JSON")
    record(client, "m", promotion(3, champion=1))
    assert [decision.version for decision in settle(client, "m").decisions] == [1, 3]
    assert "m version 2: tag gfl.decision.a is no decision" in caplog.text
    assert "gfl.decision.b" in caplog.text
    assert "mine" not in caplog.text


def test_the_longest_decision_fits_into_a_tag(client):
    reasons = [f"{number} " + "\N{SNOWMAN}" * 5000 for number in range(1000)]
    recorded = record(client, "m", Decision("refused", 1, {}, reasons))
    assert recorded.reasons == [reason[:1000] for reason in reasons[:16]]
    assert settle(client, "m").decisions == [recorded]


def test_a_database_that_takes_no_decision_is_an_error(client, monkeypatch):
    monkeypatch.setattr(history, "RETRY_DELAYS_S", (0.0,))

    from mlflow.exceptions import MlflowException

    def fail(*_):
        raise MlflowException("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(client, "set_model_version_tag", fail)
        with pytest.raises(HistoryError, match=r"m: the decision cannot be kept \(the disk is"):
            record(client, "m", promotion(1))
    with pytest.raises(HistoryError, match=r"m: the version is not there any more.*9"):
        record(client, "m", promotion(9))
    assert settle(client, "m").decisions == []
