"""COCO JSON: the errors for files that are not COCO."""

import hashlib
import json
from pathlib import Path

import pytest

from gfl.data.formats import read_coco
from gfl.errors import DataError

OBJECT = {"bbox": [0, 0, 9, 9]}


def test_a_file_is_returned_with_its_digest(coco):
    path = Path(coco(annotations=[OBJECT])[1])
    content, digest = read_coco(path)
    assert content == json.loads(path.read_text())
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


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
        read_coco(Path(file))


def test_ids_that_are_used_twice_are_named(coco):
    _, file = coco(annotations=[{**OBJECT, "id": 7}, {**OBJECT, "id": 7}])
    with pytest.raises(DataError, match="annotations: id 7 is used 2 times"):
        read_coco(Path(file))


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.json: annotations cannot be read.*data\.train"):
        read_coco(tmp_path / "absent.json")
    with pytest.raises(DataError, match=r"Is a directory\); .* or data\.format"):
        read_coco(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("[]", "expected COCO JSON"), ('{"images": []}', "no list 'categories'"),
     ('{"images": [], "annotations": [], "categories": []}', "lists no image")],
)  # fmt: skip
def test_a_file_that_is_no_coco_json_is_named(coco, text, message):
    _, file = coco(annotations=[OBJECT])
    Path(file).write_text(text)
    with pytest.raises(DataError, match=message):
        read_coco(Path(file))
