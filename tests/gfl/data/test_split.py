"""Annotations: which boxes and images are kept or dropped, and the errors for mistakes."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch

from gfl.config.loader import derive
from gfl.config.schema import Config, DataConfig, SplitConfig
from gfl.data.split import load_splits, read_split
from gfl.errors import DataError
from gfl.evaluation.coco_eval import evaluate_split
from gfl.structures import Predictions, coco_records, coco_rows


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
            box(1, 1, 10, 10, ignore=1),
            box(70, 1, 10, 10),
            box(-20, 1, 10, 10),
        ]
    )
    split = read(paths)
    assert len(split.records[0].boxes) == 1
    assert split.dropped == {
        "crowd boxes": 1, "boxes under 1 px wide or high": 2, "boxes outside of their image": 2,
        "boxes with ignore: 1": 1,
    }  # fmt: skip
    assert "2 boxes under 1 px wide or high" in caplog.text


def test_an_evaluation_leaves_out_what_average_precision_ignores(coco):
    annotations = [box(1, 1, 9, 9), box(5, 5, 9, 9, iscrowd=1), box(9, 9, 9, 9, ignore=1),
                   box(1, 1, 0.5, 9), box(40, 20, 9, 9, difficult=1)]  # fmt: skip
    split = read(coco(annotations=annotations), training=False)
    assert split.dropped == {"crowd boxes": 1, "boxes with ignore: 1": 1, "difficult boxes": 1}
    (record,) = split.records
    assert len(record.boxes) == 2
    rows = np.array([[0, 1, 1, 9, 9, 0.9, 0], [0, 9, 9, 9, 9, 0.8, 0], [0, 1, 1, 0.5, 9, 0.7, 0]])
    for official in (False, True):
        assert evaluate_split(split, rows, Config(), official=official).metrics["AP"] == 1.0


def test_a_training_set_without_a_box_is_refused(coco):
    paths = coco(annotations=[box(1, 1, 9, 9, ignore=1), box(1, 1, 0, 9)])
    with pytest.raises(
        DataError,
        match=r"no box to train on \(left out: 1 boxes under 1 px .*, 1 boxes with ignore",
    ):
        read(paths)


def test_the_area_of_a_box_is_that_of_the_box_where_none_is_annotated(coco):
    paths = coco(annotations=[box(0, 0, 9, 9, area=0), box(9, 9, 9, 9, area=None)])
    assert len(read(paths).records[0].boxes) == 2
    split = read(paths, training=False)
    rows = np.array([[0, 0, 0, 9, 9, 0.9, 0], [0, 9, 9, 9, 9, 0.8, 0]], dtype=float)
    metrics = evaluate_split(split, rows, Config()).metrics
    assert (metrics["APs"], metrics["APm"]) == (1.0, -1.0)


@pytest.mark.parametrize(
    "ids",
    [(9007199254740993, 9007199254740992), ("img_10", "img_9"), (-(2**63), 2**63 - 1)],
    ids=["above 2**53", "texts", "the ends of int64"],
)
def test_ids_of_any_kind_survive_evaluation_and_results(coco, ids):
    content = [{"id": name, "file_name": f"{n}.jpg", "width": 64, "height": 48}
               for n, name in enumerate(ids)]  # fmt: skip
    categories = [{"id": name, "name": str(name)} for name in sorted(ids)]
    annotations = [box(n, 1, 20, 20, image_id=name, category_id=name) for n, name in enumerate(ids)]
    split = read(coco(content, annotations, categories), num_classes=2, training=False)
    assert split.image_ids == list(ids)
    rows = np.concatenate(
        [
            coco_rows(
                Predictions(
                    torch.tensor(record.boxes), torch.tensor([0.9]), torch.tensor(record.labels),
                    torch.zeros(1, 4), torch.zeros(1, 4, 1),
                ),
                number,
            )
            for record, number in zip(split.records, split.numbers, strict=True)
        ]
    )  # fmt: skip
    for official in (False, True):
        assert evaluate_split(split, rows, Config(), official=official).metrics[
            "AP"
        ] == pytest.approx(1)
    records = coco_records(rows, sorted(split.image_ids), split.category_ids)
    assert [(r["image_id"], r["category_id"]) for r in records] == [(name, name) for name in ids]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("images", "width", "128"), r"image 1: width: got '128'; expected a whole number of px"),
        (("images", "height", -3), r"image 1: height: got -3; expected a whole number of px"),
        (("images", "file_name", 7), r"image 1: file_name: got 7; expected the name of a file"),
        (("images", "id", 1.5), r"image 1.5: id: got 1.5; expected a whole number of 64 bits"),
        (("images", "id", 2**63), r"id: got 9223372036854775808; expected a whole number of 64"),
        (("annotations", "image_id", "1"), r"image '1', .* '1' is a text, the listed id a number"),
        (("annotations", "category_id", "1"), r"category '1', .* is a text, the listed id a num"),
        (("annotations", "bbox", [1, 2, "3", 4]), r"annotation 1: bbox: got \[1, 2, '3', 4\]"),
        (("annotations", "bbox", [1, 2, float("nan"), 4]), r"annotation 1: bbox: got \[1, 2, nan"),
        (("annotations", "bbox", [60, 60, -50, -50]), r"bbox: got \[60, 60, -50, -50\]; expected"),
        (("annotations", "bbox", [0, 0, 1, 10**400]), r"annotation 1: bbox: got \[0, 0, 1, 1000"),
        (("annotations", "bbox", [0, 0, 1e300, 9]), r"annotation 1: bbox: got \[0, 0, 1e\+300"),
        (("annotations", "difficult", "no"), r"annotation 1: difficult: got 'no'; expected 0 or 1"),
        (("annotations", "area", "9"), r"annotation 1: area: got '9'; expected a number of px"),
        (("annotations", "iscrowd", "no"), r"annotation 1: iscrowd: got 'no'; expected 0 or 1"),
        (("annotations", "ignore", 2), r"annotation 1: ignore: got 2; expected 0 or 1"),
        (("categories", "name", None), r"category 1: name: got None; expected a name"),
        (("categories", "id", [1]), r"category \[1\]: id: got \[1\]; expected a whole number"),
        (("images", "file_name", "../a.jpg"), r"'../a.jpg' leads out of .*images; expected a name"),
        (("images", "file_name", "/etc/passwd"), r"'/etc/passwd' leads out of"),
        (
            ("images", "file_name", "A.JPG"),
            r"A\.JPG: .* 'a.jpg' is there: the names differ in case",
        ),
        (("images", "file_name", "a.png"), r"a\.png: .* missing; 'a.jpg' is there; correct the na"),
        (("images", "file_name", "b.png"), r"b\.png: .* missing; add the image or remove its anno"),
    ],
)
def test_every_field_is_checked_for_type_and_range(coco, change, message):
    paths = coco(annotations=[box(0, 0, 9, 9)])
    section, field, value = change
    content = json.loads(Path(paths[1]).read_text())
    content[section][0][field] = value
    Path(paths[1]).write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        read(paths)
    assert "\n" not in str(caught.value)


def test_all_faults_are_told_in_one_run(coco):
    annotations = [box(0, 0, 9, 9, bbox=None) for _ in range(12)]
    with pytest.raises(DataError, match=r"annotation 1: .*annotation 10: .*; and 2 more$"):
        read(coco(annotations=annotations))
    with pytest.raises(DataError, match=r"annotation 1 belongs to image 7.*annotation 2 has cat"):
        read(coco(annotations=[box(0, 0, 9, 9, image_id=7), box(0, 0, 9, 9, category_id=5)]))


@pytest.mark.parametrize("size", [None, 0])
def test_a_size_that_a_tool_did_not_write_is_the_images(coco, size):
    paths = coco(annotations=[box(0, 0, 9, 9)])
    content = json.loads(Path(paths[1]).read_text())
    content["images"][0].update(width=size, height=size)
    Path(paths[1]).write_text(json.dumps(content))
    assert read(paths).records[0].size == (48, 64)
    del content["images"][0]["width"]
    Path(paths[1]).write_text(json.dumps(content))
    assert read(paths).records[0].size == (48, 64)


def test_names_of_files_are_found_as_other_systems_write_them(coco, tmp_path):
    (tmp_path / "images" / "sub").mkdir(parents=True)
    files = ["sub/a.jpg", unicodedata.normalize("NFD", "café.jpg")]
    names = ["sub\\a.jpg", unicodedata.normalize("NFC", "café.jpg")]
    sizes = {"width": 64, "height": 48}
    listed = [{"id": n, "file_name": name, **sizes} for n, name in enumerate(names, start=1)]
    present = [{"file_name": name, **sizes} for name in files]
    paths = coco(listed, [box(0, 0, 9, 9), box(0, 0, 9, 9, image_id=2)], files=present)
    assert [record.path.is_file() for record in read(paths).records] == [True, True]


def test_a_category_without_boxes_that_the_model_does_not_know_is_left_out(coco, caplog):
    caplog.set_level("INFO")
    categories = [{"id": 0, "name": "things"}, {"id": 1, "name": "thing"}]
    paths = coco(annotations=[box(0, 0, 9, 9)], categories=categories)
    section = SplitConfig(images=paths[0], annotations=paths[1])
    data = DataConfig(train=section, val=section)
    split = read_split(data, "val", 1, ["thing"])
    assert (split.classes, split.category_ids) == (["thing"], [1])
    assert "categories without boxes are left out: things" in caplog.text
    assert read(paths, classes=("thing",)).classes == ["thing"]
    with pytest.raises(
        DataError,
        match=r"remove a category without boxes \(their number of boxes: "
        r"'things' 0, 'thing' 1\), or set model\.num_classes=2",
    ):
        read(paths)


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
    paths = coco(
        images((64, 64), (64, 64)),
        [box(0, 0, 9, 9, iscrowd=1), box(0, 0, 9, 9, image_id=2)],
    )
    record = read(paths).records[0]
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
        ({}, 1, r"no box to train on \(left out: 1 images without annotations\)"),
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
    with pytest.raises(DataError, match=r"image_info\.json: no box to evaluate on .no annotations"):
        load_splits(derive(type(tiny), tiny, overrides))
