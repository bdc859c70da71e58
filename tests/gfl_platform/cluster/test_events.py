"""Every kind of event survives JSON, the form in which spools and checkpoints keep events."""

import json
from dataclasses import fields

import pytest

from gfl_platform.cluster import events
from gfl_platform.cluster.events import (
    KINDS,
    CheckpointsDiscarded,
    CheckpointStored,
    DataDescribed,
    EpochEvaluated,
    Event,
    StepsDone,
    TrialEnded,
    Unknown,
    WorkerFailed,
    from_json,
    to_json,
)

PLANNED = {"id": "000", "point": {"loss.qfl.beta": 2}, "seed": 0, "stage": "search"}

EXAMPLES = [
    events.Waiting("waiting for 4 GPUs, the cluster has 2"),
    events.WorkersStarted(2, 1),
    DataDescribed({"train.digest": "4f", "train.images": 34}, ["train: 2 boxes are outside"]),
    StepsDone(10, 40, 0.5, 120.0, {"loss": 1 / 3}, repeated=True),
    CheckpointStored(10, {"checkpoint_seconds": 0.8}),
    events.CheckpointSaved(10, 0, "s3://bucket/run/ray/checkpoint_1"),
    EpochEvaluated(40, 2, {"AP": 0.5}, "/run/ray/checkpoint_2", repeated=True),
    events.CheckpointDamaged("weights.safetensors is empty"),
    WorkerFailed(1, "killed", final=False, restarts=2),
    events.ItemsDone("images evaluated", 3, 11),
    events.RunOpened("first", {"user": "a"}, {"seed": "0"}, {"config.yaml": "seed: 0\n"}),
    events.RunReopened(3),
    events.TagsSet({"workers": "2 (CPU)"}),
    events.SpeedMeasured(31.5, {"batch": 1, "device": "a CPU"}),
    events.OutagesCounted(10, {"restarts": 1, "lost_minutes": 0.5}),
    events.FolderWritten("/run/report"),
    CheckpointsDiscarded(),
    events.RunEnded("KILLED"),
    events.TrialStarted(PLANNED),
    events.TrialOutcome("finished", None, {"AP": 0.5}, 9, "/trial/checkpoint_2", {"batch": 1}),
    TrialEnded("failed", "its process was lost", PLANNED),
    Unknown("slow"),
]


def test_there_is_an_example_of_every_kind():
    assert {type(event) for event in EXAMPLES} == set(KINDS.values())
    declared = {kind for kind in Event.__subclasses__() if kind is not events.OfTrial}
    assert declared == set(KINDS.values())
    for event in EXAMPLES:  # in which each attribute is seen to survive
        defaults = {f.name: f.default for f in fields(event) if f.name != "time_ms"}
        unset = [name for name, default in defaults.items() if getattr(event, name) is default]
        assert set(unset) <= {"cause"}


@pytest.mark.parametrize("event", EXAMPLES, ids=events.name_of)
def test_an_event_survives_json(event):
    again = from_json(json.loads(json.dumps(to_json(event))))
    assert again == event
    assert type(again) is type(event)
    assert again.time_ms == event.time_ms > 1.7e12


def test_the_time_does_not_tell_events_apart():
    assert Unknown("x", time_ms=1) == Unknown("x", time_ms=2) != Unknown("y", time_ms=1)


@pytest.mark.parametrize(
    ("record", "event"),
    [
        (
            {"kind": "steps", "step": 2, "total_steps": 9, "epoch": 0.2, "seconds_left": 1.0,
             "metrics": {"loss": 2.5}, "time_ms": 7, "uri": "x", "trial": "000"},
            StepsDone(2, 9, 0.2, 1.0, {"loss": 2.5}),
        ),
        (
            {"kind": "checkpoint", "uri": "x", "metrics": {"AP": 0.5}, "AP": 0.5, "epoch": 1,
             "step": 5, "config_hash": "d1"},
            EpochEvaluated(5, 1, {"AP": 0.5}, "x"),
        ),
        ({"kind": "failure", "rank": 1, "reason": "killed", "final": True},
         WorkerFailed(1, "killed", final=True)),
        ({"kind": "discarded"}, CheckpointsDiscarded()),
        ({"kind": "slow", "rank": 1, "node": "a", "times": 2.0}, Unknown("slow")),
    ],
    ids=["steps", "checkpoint", "failure", "discarded", "slow"],
)  # fmt: skip
def test_what_an_older_version_has_written_is_read(record, event):
    read = from_json(record)
    assert read == event
    assert read.time_ms == record.get("time_ms", pytest.approx(events.now_ms(), abs=9e3))
