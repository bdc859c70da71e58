"""Annotations: what is kept, what is dropped, and what is said of mistakes."""

import json
from pathlib import Path

import pytest
import torch

from gfl.config import SplitConfig
from gfl.configfile import derive
from gfl.data import load_splits
from gfl.data.coco import DataError, read_coco


def read(paths, num_classes=1, training=True):
    return read_coco(
        SplitConfig(images=paths[0], annotations=paths[1]), num_classes, training=training
    )


def box(x, y, w, h, **more):
    return {"bbox": [x, y, w, h], "area": w * h, **more}


def test_boxes_become_corners_and_ids_become_labels(coco):
    categories = [{"id": 9, "name": "late"}, {"id": 3, "name": "early"}]
    paths = coco(annotations=[box(1, 2, 10, 20, category_id=9)], categories=categories)
    split = read(paths, num_classes=2)
    assert split.classes == ["early", "late"]
    assert split.category_ids == [3, 9]
    (record,) = split.records
    assert record.boxes.tolist() == [[1, 2, 11, 22]]
    assert record.labels.tolist() == [1]
    assert record.size == (48, 64)


def test_what_cannot_be_learned_is_dropped_and_counted(coco, caplog):
    caplog.set_level("INFO")
    paths = coco(
        annotations=[
            box(1, 1, 10, 10),
            box(1, 1, 10, 10, iscrowd=1),
            box(1, 1, 0.5, 10),
            box(1, 1, 10, 0),
            box(1, 1, 10, 10, area=0),
            box(70, 1, 10, 10),
            box(-20, 1, 10, 10),
            box(float("nan"), 1, 10, 10),
        ]
    )
    split = read(paths)
    assert len(split.records[0].boxes) == 1
    assert split.dropped == {
        "crowd boxes": 1, "degenerate boxes": 3, "boxes outside of their image": 2,
        "boxes with NaN or infinity": 1,
    }  # fmt: skip
    assert "3 degenerate boxes" in caplog.text


def images(*sizes):
    return [
        {"id": number, "file_name": f"{number}.jpg", "width": w, "height": h}
        for number, (w, h) in enumerate(sizes, start=1)
    ]


def test_images_without_objects_are_evaluated_but_not_trained_on(coco):
    paths = coco(
        images((64, 64), (64, 64), (31, 64)), [box(0, 0, 9, 9), box(0, 0, 9, 9, image_id=3)]
    )
    assert [r.image_id for r in read(paths).records] == [1]
    assert [r.image_id for r in read(paths, training=False).records] == [1, 2, 3]


def test_an_image_of_crowds_alone_is_trained_on_as_background(coco):
    record = read(coco(annotations=[box(0, 0, 9, 9, iscrowd=1)])).records[0]
    assert record.boxes.shape == (0, 4)
    assert record.labels.dtype == torch.long


@pytest.mark.parametrize(
    ("arguments", "classes", "message"),
    [
        (
            {"annotations": [box(0, 0, 9, 9, image_id=77)]},
            1,
            "belongs to image 77, which is not listed",
        ),
        ({"annotations": [box(0, 0, 9, 9, category_id=5)]}, 1, r"has category 5, but .* \[1\]"),
        ({"annotations": [box(0, 0, 9, 9)]}, 80, "has 1 categories, but model.num_classes is 80"),
        ({"annotations": [box(0, 0, 9, 9)], "files": []}, 1, r"a\.jpg: annotated image is missing"),
        ({}, 1, "no image to train on"),
        ({"annotations": [box(0, 0, 9, 9, bbox=[1, 2, 3])]}, 1, r"bbox: expected \[x, y, width"),
        ({"annotations": [box(0, 0, 9, 9, bbox=None)]}, 1, r"annotation 1: bbox: .* got None"),
        (
            {"annotations": [box(0, 0, 9, 9, id=7), box(0, 0, 9, 9, id=7)]},
            1,
            "id 7 is used 2 times",
        ),
    ],
)
def test_a_mistake_is_named(coco, arguments, classes, message):
    with pytest.raises(DataError, match=message) as caught:
        read(coco(**arguments), classes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ("images", "height"),
        ("annotations", "bbox"),
        ("annotations", "image_id"),
        ("categories", "id"),
    ],
)
def test_an_entry_that_lacks_a_field_is_named(coco, section, field):
    folder, file = coco(annotations=[box(0, 0, 9, 9)])
    content = json.loads(Path(file).read_text())
    del content[section][0][field]
    Path(file).write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"{section}: .* has no '{field}'; add it"):
        read((folder, file))


def test_an_area_that_is_absent_or_null_is_no_mistake(coco):
    paths = coco(annotations=[box(0, 0, 9, 9, area=None), {"bbox": [1, 1, 9, 9]}])
    assert len(read(paths).records[0].boxes) == 2


def test_training_and_evaluation_have_the_same_classes(tiny, coco, tmp_path):
    folder, file = coco(annotations=[box(0, 0, 9, 9)])
    other = tmp_path / "other.json"
    other.write_text(Path(file).read_text().replace("thing", "stuff"))
    overrides = [
        f"data.train={{images: {folder}, annotations: {file}}}",
        f"data.val={{images: {folder}, annotations: {other}}}",
        "model.num_classes=1",
    ]
    with pytest.raises(DataError, match=r"other\.json: class 0 is 'stuff', but 'thing' in"):
        load_splits(derive(type(tiny), tiny, overrides))


def test_paths_that_are_missing_are_named(coco, tmp_path):
    folder, file = coco(annotations=[box(0, 0, 9, 9)])
    with pytest.raises(DataError, match=r"absent\.json: annotations cannot be read.*data\.train"):
        read((folder, str(tmp_path / "absent.json")))
    with pytest.raises(
        DataError, match=r"nowhere: no such folder of images; set data\.train\.images"
    ):
        read((str(tmp_path / "nowhere"), file))


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("[]", "expected COCO JSON"), ('{"images": []}', "no list 'annotations'"),
     ('{"images": [], "annotations": [], "categories": []}', "lists no image")],
)  # fmt: skip
def test_a_file_that_is_no_coco_json_is_named(coco, text, message):
    folder, file = coco(annotations=[box(0, 0, 9, 9)])
    Path(file).write_text(text)
    with pytest.raises(DataError, match=message):
        read((folder, file))


@pytest.mark.real_data
def test_coco128_is_read_as_its_annotations_say(real_data):
    annotations = real_data / "coco128" / "annotations" / "instances.json"
    split = SplitConfig(images=str(real_data / "coco128" / "images"), annotations=str(annotations))
    content = json.loads(annotations.read_text())
    train = read_coco(split, 80, training=True)
    crowds = sum(a["iscrowd"] for a in content["annotations"])
    assert train.dropped["crowd boxes"] == crowds > 0
    kept = sum(len(r.labels) for r in train.records)
    dropped = sum(n for why, n in train.dropped.items() if "boxes" in why)
    assert kept + dropped == len(content["annotations"])
    assert len(read_coco(split, 80, training=False).records) == 128
