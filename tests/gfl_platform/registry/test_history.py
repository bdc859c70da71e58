"""The trail of decisions on real stores: two who decide at once, crashes, hands."""

import subprocess
import sys
import time
from itertools import pairwise

import pytest

from gfl_platform.provenance import acting_user
from gfl_platform.registry import history
from gfl_platform.registry.history import Decision, OvertakenError, append, read_trail, settle

PROMOTER = """
import sys
from mlflow import MlflowClient
from gfl_platform.trail import Decision, OvertakenError, append, settle
uri, *versions = sys.argv[1:]
client = MlflowClient(uri, uri)
for version in map(int, versions):
    while True:
        last = settle(client, "m")
        aliases = {"champion": version} | ({"previous": last.aliases["champion"]} if last else {})
        number = last.number if last else 0
        try:
            append(client, "m", Decision("promoted", version, aliases, number, ["a test"]))
            break
        except OvertakenError:
            pass
    settle(client, "m")
"""


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.chaos)])
def store(request, tmp_path):
    """The URI of a store that holds a model `m` of four versions."""
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
def client(store):
    from mlflow import MlflowClient

    return MlflowClient(store, store)


def promoted(version, last, **aliases):
    return Decision("promoted", version, {"champion": version, **aliases}, last, ["a test"])


def aliases_of(client):
    found = client.get_registered_model("m").aliases
    return {alias: int(version) for alias, version in found.items()}


def test_two_who_promote_at_once_leave_one_order(store, client):
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROMOTER, store, *"1212"[start:], *"34"],
            stderr=subprocess.PIPE, text=True,
        )
        for start in (0, 1)
    ]  # fmt: skip
    for process in both:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    decisions = read_trail(client, "m")
    valid = [decision for decision in decisions if not decision.void]
    assert len(valid) == 11
    assert [d.based_on for d in valid] == [0, *(d.number for d in valid[:-1])]
    for before, after in pairwise(valid):
        assert after.aliases["previous"] == before.aliases["champion"]
    assert aliases_of(client) == valid[-1].aliases
    assert {decision.action for decision in valid} == {"promoted"}


def test_what_a_crash_interrupted_is_finished(client):
    assert settle(client, "m") is None
    first = append(client, "m", promoted(1, 0))  # and a crash before any alias
    assert aliases_of(client) == {}
    assert settle(client, "m").number == first.number
    assert aliases_of(client) == {"champion": 1}
    append(client, "m", promoted(2, first.number, previous=1))
    client.set_registered_model_alias("m", "previous", "1")  # and a crash before the other
    assert settle(client, "m").action == "promoted"
    assert aliases_of(client) == {"champion": 2, "previous": 1}
    assert all(decision.applied for decision in read_trail(client, "m")[1:])
    assert len(read_trail(client, "m")) == 2


def test_what_a_kill_interrupted_is_finished(store, client):
    process = subprocess.Popen([sys.executable, "-c", PROMOTER, store, *"1234" * 100])
    while len(read_trail(client, "m")) < 5:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()  # wherever it is
    process.wait()
    last = settle(client, "m")
    assert last.applied
    assert aliases_of(client) == last.aliases
    decisions = read_trail(client, "m")
    assert decisions[-1] == last
    assert {decision.action for decision in decisions} == {"promoted"}


def test_a_decision_that_another_got_ahead_of_is_void(client):
    append(client, "m", promoted(1, 0))
    with pytest.raises(OvertakenError):
        append(client, "m", promoted(2, 0))
    assert [decision.void for decision in read_trail(client, "m")] == [False, True]
    assert settle(client, "m").version == 1
    append(client, "m", promoted(3, 1, previous=1))  # a void one is nobody's base
    assert settle(client, "m").version == 3


def test_what_a_hand_moves_is_written_down(client, monkeypatch):
    monkeypatch.setattr(history, "SECOND_LOOK_S", 0.01)
    append(client, "m", promoted(1, 0))
    settle(client, "m")
    client.set_registered_model_alias("m", "champion", "4")
    noted = settle(client, "m")
    assert (noted.action, noted.version, noted.aliases) == ("moved by hand", 4, {"champion": 4})
    assert noted.user == f"unknown, noticed by {acting_user()}"
    assert noted.reasons == ["champion was version 1 and is version 4, by no decision."]
    client.delete_registered_model_alias("m", "champion")
    noted = settle(client, "m")
    assert (noted.version, noted.aliases) == (None, {})
    assert aliases_of(client) == {}
    assert settle(client, "m") == noted
    assert len(read_trail(client, "m")) == 3


def test_a_slow_promoter_does_not_undo_a_later_promotion(client, monkeypatch):
    """One is overtaken before its first write, another between its look and its writes."""
    first = append(client, "m", promoted(1, 0))
    settle(client, "m")
    append(client, "m", promoted(2, 1, previous=1))
    settle(client, "m")
    history._move(client, "m", {}, first)
    assert aliases_of(client) == {"champion": 2, "previous": 1}
    client.delete_registered_model_alias("m", "previous")
    client.set_registered_model_alias("m", "champion", "1")
    assert settle(client, "m").number == 2
    assert aliases_of(client) == {"champion": 2, "previous": 1}
    assert len(read_trail(client, "m")) == 2
    monkeypatch.setattr(history, "LATE_S", 0)  # later it is somebody's will
    monkeypatch.setattr(history, "SECOND_LOOK_S", 0.01)
    client.delete_registered_model_alias("m", "previous")
    client.set_registered_model_alias("m", "champion", "1")
    assert settle(client, "m").action == "moved by hand"


def test_what_is_no_decision_is_passed_over(client, caplog):
    for number in (1, 2):
        append(client, "m", promoted(number, number - 1))
        settle(client, "m")
    client.create_model_version("m-decisions", "file:///somebody's")
    client.delete_model_version_tag("m-decisions", "2", "decision")
    append(client, "m", promoted(3, 2))
    assert [(d.number, d.void) for d in read_trail(client, "m")] == [(1, False), (4, False)]
    assert "m-decisions version 2: is no decision; passed over" in caplog.text
    assert "m-decisions version 3: is no decision; passed over" in caplog.text


def test_a_model_that_has_the_trails_name_is_left_alone(client):
    client.create_registered_model("m-decisions")
    with pytest.raises(history.TrailError, match="m-decisions: is a model of its own"):
        append(client, "m", promoted(1, 0))
