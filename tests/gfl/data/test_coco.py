"""COCO JSON: the errors for files that are not COCO."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from gfl.data import coco as coco_format
from gfl.data.coco import read_coco
from gfl.errors import DataError

OBJECT = {"bbox": [0, 0, 9, 9]}


def read(file):
    return read_coco(Path(file), Path(file).parent / "cache")


def test_a_file_is_returned_with_its_digest(coco):
    path = Path(coco(annotations=[OBJECT])[1])
    annotations = read(path)
    assert annotations.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (annotations.image_ids, annotations.file_names) == ([1], ["a.jpg"])
    assert annotations.objects["bbox"].tolist() == [[0, 0, 9, 9]]


def test_processes_share_what_is_in_a_large_file(coco, monkeypatch):
    """The second reader maps arrays, and needs neither JSON nor polygons."""
    path = Path(coco(annotations=[OBJECT | {"segmentation": [[0, 0, 9, 9]]}] * 3)[1])
    plain = read(path)
    monkeypatch.setattr(coco_format, "LARGE_FILE", 1)
    first = read(path)
    monkeypatch.setattr(coco_format, "_parse_coco", None)
    second = read(path)
    assert isinstance(second.objects, np.memmap)
    for shared in (first, second):
        for name, value in vars(plain).items():
            np.testing.assert_array_equal(getattr(shared, name), value)
    assert isinstance(second.categories[0], tuple)


def test_a_damaged_cache_is_made_again_and_one_that_cannot_be_written_is_done_without(
    coco, monkeypatch, caplog
):
    path = Path(coco(annotations=[OBJECT])[1])
    monkeypatch.setattr(coco_format, "LARGE_FILE", 1)
    whole = read(path)
    (lists,) = path.parent.glob("cache/*/lists.json")
    lists.write_text("[")
    assert read(path).file_names == whole.file_names
    assert read_coco(path, path / "cache").file_names == whole.file_names
    assert "cannot keep annotations as arrays (Not a directory)" in caplog.text


def test_annotations_that_are_wrong_are_refused_each_time(coco, monkeypatch):
    path = coco(annotations=[{**OBJECT, "area": "x"}])[1]
    monkeypatch.setattr(coco_format, "LARGE_FILE", 1)
    for _ in range(2):
        with pytest.raises(DataError, match="area: got 'x'"):
            read(path)


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ("images", "file_name"),
        ("annotations", "bbox"),
        ("annotations", "image_id"),
        ("categories", "id"),
    ],
)
def test_an_entry_that_lacks_a_field_is_named(coco, section, field):
    _, file = coco(annotations=[OBJECT])
    content = json.loads(Path(file).read_text())
    del content[section][0][field]
    Path(file).write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"{section}: .* has no '{field}'; add it"):
        read(file)


def test_ids_that_are_used_twice_are_named(coco):
    _, file = coco(annotations=[{**OBJECT, "id": 7}, {**OBJECT, "id": 7}])
    with pytest.raises(DataError, match="annotations: id 7 is used 2 times"):
        read(file)


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.json: annotations cannot be read.*data\.train"):
        read(tmp_path / "absent.json")
    with pytest.raises(DataError, match=r"Is a directory\); .* or data\.format"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("[]", "expected COCO JSON"), ('{"images": []}', "no list 'categories'"),
     ('{"images": [], "annotations": [], "categories": []}', "lists no image")],
)  # fmt: skip
def test_a_file_that_is_no_coco_json_is_named(coco, text, message):
    _, file = coco(annotations=[OBJECT])
    Path(file).write_text(text)
    with pytest.raises(DataError, match=message):
        read(file)
