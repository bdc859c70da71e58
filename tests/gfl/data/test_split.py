"""Annotations: which boxes and images are kept or dropped, and the errors for mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest

from gfl.config.loader import derive
from gfl.config.schema import DataConfig, SplitConfig
from gfl.data.split import load_splits, read_split
from gfl.errors import DataError


def read(paths, num_classes=1, training=True, **data):
    section = SplitConfig(images=str(paths[0]), annotations=str(paths[1]))
    data = DataConfig(train=section, val=section, **data)
    return read_split(data, "train" if training else "val", num_classes)


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
    assert record.labels.dtype == np.int64


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
        (
            {"annotations": [box(0, 0, 9, 9, bbox=[1, 2, 3])]},
            1,
            r"bbox: got \[1, 2, 3\]; expected \[x, y, width",
        ),
        (
            {"annotations": [box(0, 0, 9, 9, bbox=None)]},
            1,
            r"annotation 1: bbox: got None; expected",
        ),
    ],
)
def test_a_mistake_is_named(coco, arguments, classes, message):
    with pytest.raises(DataError, match=message) as caught:
        read(coco(**arguments), classes)
    assert "\n" not in str(caught.value)


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


def test_classes_of_the_configuration_are_those_of_the_file(coco):
    paths = coco(annotations=[box(0, 0, 9, 9)])
    assert read(paths, classes=("thing",)).classes == ["thing"]
    with pytest.raises(DataError, match=r"class 0 is 'thing', but 'stuff' in data\.classes"):
        read(paths, classes=("stuff",))


def test_a_folder_of_images_that_is_missing_is_named(coco, tmp_path):
    _, file = coco(annotations=[box(0, 0, 9, 9)])
    with pytest.raises(
        DataError, match=r"nowhere: no such folder of images; set data\.train\.images"
    ):
        read((str(tmp_path / "nowhere"), file))


@pytest.mark.real_data
def test_coco128_is_read_as_its_annotations_say(real_data):
    annotations = real_data / "coco128" / "annotations" / "instances.json"
    paths = real_data / "coco128" / "images", annotations
    content = json.loads(annotations.read_text())
    train = read(paths, 80)
    crowds = sum(a["iscrowd"] for a in content["annotations"])
    assert train.dropped["crowd boxes"] == crowds > 0
    kept = sum(len(r.labels) for r in train.records)
    dropped = sum(n for why, n in train.dropped.items() if "boxes" in why)
    assert kept + dropped == len(content["annotations"])
    assert len(read(paths, 80, training=False).records) == 128


def test_a_list_of_images_alone_can_be_read_but_not_be_trained_with(tiny, coco, tmp_path):
    folder, file = coco(annotations=[box(0, 0, 9, 9)])
    content = json.loads(Path(file).read_text())
    del content["annotations"]
    listed = tmp_path / "image_info.json"
    listed.write_text(json.dumps(content))
    assert len(read((folder, str(listed)), training=False).records[0].boxes) == 0
    overrides = [
        f"data.train={{images: {folder}, annotations: {file}}}",
        f"data.val={{images: {folder}, annotations: {listed}}}",
        "model.num_classes=1",
    ]
    with pytest.raises(DataError, match=r"image_info\.json: no annotations"):
        load_splits(derive(type(tiny), tiny, overrides))
