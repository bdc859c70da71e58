"""YOLO: which contents of a text file are valid, and the errors for mistakes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gfl.config.loader import derive
from gfl.data.split import load_splits
from gfl.errors import DataError
from tests.support.annotation_writers import CLASSES, PICTURES, SIZES, read, write


@pytest.fixture
def yolo(tmp_path):
    return write(tmp_path / "yolo", "yolo", PICTURES)


def test_yolo_files_that_are_absent_or_empty_mean_no_objects(yolo):
    folder = Path(yolo.annotations)
    (folder / "c.txt").unlink()
    (folder / "a.txt").write_text("\n  \n")
    split = read(yolo, "yolo", "val")
    assert [len(record.labels) for record in split.records] == [0, 1, 0]
    assert read(yolo, "yolo").dropped == {"images without annotations": 2}


def test_yolo_boxes_are_shares_of_the_upright_image(yolo):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", SIZES[0]).save(Path(yolo.images) / "a.jpg", exif=exif)
    record = read(yolo, "yolo").records[0]
    assert record.size == (64, 48)
    assert record.boxes[1].tolist() == [0, 0, 48, 64]


def test_shares_beyond_1_by_rounding_are_taken(yolo):
    (Path(yolo.annotations) / "a.txt").write_bytes(b"\xef\xbb\xbf1.0 0.5 0.5 1.0004 1\r\n")
    record = read(yolo, "yolo").records[0]
    assert record.labels.tolist() == [1]
    np.testing.assert_allclose(record.boxes[0], [0, 0, 64, 48], atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("annotations/classes.txt", "cat\ndog\nhot dog\n\n"),
        ("annotations/data.yaml", "names: [cat, dog, hot dog]\n"),
        ("data.yaml", "nc: 3\nnames: {0: cat, 1: dog, 2: hot dog}\n"),
        ("../data.yaml", "names: {2: hot dog, 0: cat, 1: dog}\n"),
    ],
)
def test_yolo_class_names_lie_with_the_annotations(yolo, place, text, monkeypatch):
    folder = Path(yolo.annotations).parent
    (folder / place).write_text(text)
    assert read(yolo, "yolo", classes=None).classes == list(CLASSES)
    assert read(yolo, "yolo", classes=("x", "y", "z")).classes == ["x", "y", "z"]
    monkeypatch.chdir(yolo.annotations)
    assert read(yolo.model_copy(update={"annotations": "."}), "yolo", classes=None)


def test_yolo_class_names_of_one_set_serve_the_other(yolo):
    assert read(yolo, "yolo", classes=None, known=list(CLASSES)).classes == list(CLASSES)


def test_yolo_sets_that_name_classes_otherwise_are_refused(tiny, tmp_path):
    train = write(tmp_path / "train", "yolo", PICTURES)
    val = write(tmp_path / "val", "yolo", PICTURES)
    (tmp_path / "train" / "data.yaml").write_text("names: [cat, dog, hot dog]")
    (tmp_path / "val" / "data.yaml").write_text("names: [dog, cat, hot dog]")
    overrides = [
        "data.format=yolo", f"data.train={train.model_dump_json()}",
        f"data.val={val.model_dump_json()}", "model.num_classes=3",
    ]  # fmt: skip
    with pytest.raises(DataError, match="class 0 is 'dog', but 'cat' in"):
        load_splits(derive(type(tiny), tiny, overrides))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.2", r"got '0 0\.5 0\.5 0\.2'; expected 'class cx cy w h', five numbers"),
        ("0 0.5 0.5 0.2 wide", "expected 'class cx cy w h', five numbers; correct it"),
        ("0 .1 .1 .2 .1 .2 .2", "has 7 numbers, as polygons .* expected 'class cx cy w h'"),
        ("3 0.5 0.5 0.2 0.2", r"class 3, but classes are 0\.\.2 \(cat, dog, hot dog\)"),
        ("-1 0.5 0.5 0.2 0.2", "class -1, but classes are"),
        ("0.5 0.5 0.5 0.2 0.2", r"class 0\.5, but classes are"),
        ("0 32 0.5 0.2 0.2", r"expected cx cy w h within 0\.\.1; divide them by the image's"),
        ("0 0.5 0.5 1.002 0.2", r"expected cx cy w h within 0\.\.1"),
        ("0 0.5 -0.002 0.2 0.2", r"expected cx cy w h within 0\.\.1"),
        ("0 0.5 nan 0.2 0.2", r"expected cx cy w h within 0\.\.1"),
    ],
)
def test_a_mistake_in_a_yolo_file_is_named(yolo, line, message):
    (Path(yolo.annotations) / "b.txt").write_text(f"1 0.5 0.5 0.2 0.2\n\n{line}\n")
    with pytest.raises(DataError, match=rf"b\.txt: line 3: .*{message}") as caught:
        read(yolo, "yolo")
    assert "\n" not in str(caught.value)


def test_a_yolo_file_that_is_no_text_is_named(yolo):
    (Path(yolo.annotations) / "b.txt").write_bytes(b"\xff\xfe0")
    with pytest.raises(DataError, match=r"b\.txt: not UTF-8 text"):
        read(yolo, "yolo")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [cat", "not valid YAML"),
        ("nc: 3", "names: expected a list of texts, .* got None"),
        ("- cat", "names: expected a list"),
        ("names: [cat, no]", r"got \['cat', False\]"),
        ("names: {1: cat, 2: dog}", r"got \{1: 'cat', 2: 'dog'\}; .* set data\.classes"),
    ],
)
def test_a_mistake_in_the_names_of_classes_is_named(yolo, text, message):
    (Path(yolo.annotations) / "data.yaml").write_text(text)
    with pytest.raises(DataError, match=rf"data\.yaml: .*{message}"):
        read(yolo, "yolo", classes=None)


def test_yolo_classes_without_names_are_an_error(yolo):
    with pytest.raises(DataError, match=r"class names are unknown; set data\.classes=\[\.\.\.\]"):
        read(yolo, "yolo", classes=None)


def test_a_folder_with_names_of_classes_alone_has_no_annotations(yolo):
    for file in Path(yolo.annotations).iterdir():
        file.unlink()
    (Path(yolo.annotations) / "classes.txt").write_text("\n".join(CLASSES))
    with pytest.raises(DataError, match=r"annotations: no \.txt file for any image"):
        read(yolo, "yolo", classes=None)
