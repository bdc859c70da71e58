"""What a training that continues must find again: data, classes, shards, code and packages."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from gfl.checkpoint.files import WEIGHTS
from gfl.config.loader import ConfigError, derive
from gfl.data.split import load_splits
from gfl_platform.config import load_job
from gfl_platform.tracking.metadata import require_same
from gfl_platform.training import conditions, train
from gfl_platform.training.conditions import (
    CONDITIONS_FILE,
    ChangedError,
    find_conditions,
    require_same_conditions,
)


def found(splits, shards=2, teacher=None, device="cpu", commit="1"):
    return find_conditions(splits, shards, teacher, device, commit)


def find_changes(checkpoint, now):
    """Return the changes, which the refusal names, too."""
    changes = require_same_conditions(checkpoint, now, "first", accept_changes=True)
    if changes:
        with pytest.raises(ChangedError, match="run 'first' would not go on") as caught:
            require_same_conditions(checkpoint, now, "first", accept_changes=False)
        assert f"({'; '.join(changes)}); undo these changes" in str(caught.value)
    else:
        assert require_same_conditions(checkpoint, now, "first", accept_changes=False) == []
    return changes


@pytest.fixture
def splits(tiny):
    return load_splits(tiny)


@pytest.fixture
def checkpoint(splits, tmp_path):
    """A checkpoint of a training on `splits`."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / CONDITIONS_FILE).write_text(json.dumps(found(splits)))
    return folder


def test_the_same_conditions_are_no_change(checkpoint, splits):
    assert find_changes(checkpoint, found(splits)) == []


def moved(config, tmp_path):
    """Return `config` with its data at another place."""
    places = {}
    for part in ("train", "val"):
        images = Path(getattr(config.data, part).images)
        shutil.copytree(images.parent, tmp_path / "moved" / part)
        places[part] = tmp_path / "moved" / part
    return derive(
        type(config),
        config,
        [
            f"data.{part}={{images: {place}/images, annotations: {place}/annotations.json}}"
            for part, place in places.items()
        ],
    )


def test_data_that_moved_is_no_change(checkpoint, tiny, tmp_path):
    elsewhere = moved(tiny, tmp_path)
    require_same(tmp_path / "config.yaml", tiny, "run")
    require_same(tmp_path / "config.yaml", elsewhere, "run", train.LOCATIONS)
    assert find_changes(checkpoint, found(load_splits(elsewhere))) == []
    other = derive(type(tiny), elsewhere, ["data.batch=4"])
    with pytest.raises(ConfigError, match=r"another configuration \(data\.batch 8 -> 4\)"):
        require_same(tmp_path / "config.yaml", other, "run", train.LOCATIONS)


def test_images_that_went_are_told_with_both_numbers(checkpoint, tiny, tmp_path):
    elsewhere = moved(tiny, tmp_path)
    file = Path(elsewhere.data.train.annotations)
    content = json.loads(file.read_text())
    kept = {image["id"] for image in content["images"][:20]}
    for key, id_ in (("images", "id"), ("annotations", "image_id")):
        content[key] = [entry for entry in content[key] if entry[id_] in kept]
    file.write_text(json.dumps(content))
    (change,) = find_changes(checkpoint, found(load_splits(elsewhere)))
    assert change.startswith("data.train: 34 images (")
    assert "-> 19 images (" in change


def test_categories_in_another_order_are_told(checkpoint, splits):
    train_split, val = splits
    swapped = replace(train_split, classes=["ellipse", "rectangle", "triangle"])
    assert find_changes(checkpoint, found((swapped, val))) == [
        "class 0: rectangle (category 1) -> ellipse (category 1)",
        "class 1: ellipse (category 2) -> rectangle (category 2)",
    ]


def test_what_makes_the_numbers_is_compared(checkpoint, splits, tmp_path, monkeypatch):
    (tmp_path / WEIGHTS).write_text("a teacher")
    assert find_changes(checkpoint, found(splits, shards=1)) == ["workers (shards): 2 -> 1"]
    assert find_changes(checkpoint, found(splits, device="cuda")) == ["device: cpu -> cuda"]
    (change,) = find_changes(checkpoint, found(splits, teacher=tmp_path))
    assert change.startswith("teacher: none -> ")
    with monkeypatch.context() as patch:
        patch.setattr(conditions, "version", lambda package: f"{package} of tomorrow")
        changes = find_changes(checkpoint, found(splits))
    assert [change.split(":")[0] for change in changes] == list(conditions.PACKAGES)


def test_compiled_code_is_not_resumed_without_a_word(tiny_file, tmp_path):
    job = load_job(tiny_file, ["optim.compile=true", f"storage.root={tmp_path}"])
    with pytest.raises(ConfigError, match=r"optim\.compile: .* with --accept-changes"):
        train.train(job, "compiled", resume=True, watch=[].append)


def test_a_commit_is_told_only_with_other_code(checkpoint, splits, monkeypatch):
    assert find_changes(checkpoint, found(splits, commit="2")) == []
    monkeypatch.setattr(conditions, "code_digest", lambda _: "f" * 64)
    code, commit = find_changes(checkpoint, found(splits, commit="2"))
    assert code.startswith("code of gfl: ")
    assert code.endswith(f" -> {'f' * 12}")
    assert commit == "git.commit: 1 -> 2"
