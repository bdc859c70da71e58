"""VOC: which contents of an XML file are valid, and the errors for mistakes."""

from pathlib import Path

import pytest

from gfl.config.loader import derive
from gfl.data.split import load_splits
from gfl.errors import DataError
from tests.support.annotation_writers import CLASSES, PICTURES, read, voc_object, write
from tests.support.detections import average_precision


@pytest.fixture
def voc(tmp_path):
    return write(tmp_path / "voc", "voc", PICTURES)


def edit(section, name, old, new):
    """Replace `old`, which is there, in an annotation file."""
    file = Path(section.annotations) / name
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def test_voc_counts_pixels_from_1_and_takes_fractions(voc):
    edit(voc, "a.xml", "<xmin>5</xmin>", "<xmin>5.5</xmin>")
    assert read(voc, "voc").records[0].boxes[0].tolist() == [4.5, 6, 40, 30]
    edit(voc, "a.xml", "<xmax>40</xmax>", "<xmax>5.5</xmax>")
    assert read(voc, "voc").records[0].boxes[0].tolist() == [4.5, 6, 5.5, 30]


@pytest.mark.parametrize(
    "name", ["a", "JPEGImages/a.jpg", "C:\\photos\\a.jpg", "/x/a", " a.jpg\n", "", "renamed.jpg"]
)
def test_the_image_of_a_voc_file_is_found(voc, name):
    edit(voc, "a.xml", "<filename>a.jpg</filename>", f"<filename>{name}</filename>")
    assert [r.path.name for r in read(voc, "voc", "val").records] == ["a.jpg", "b.jpg", "c.jpg"]
    edit(voc, "a.xml", f"<filename>{name}</filename>", "")
    assert [r.path.name for r in read(voc, "voc", "val").records] == ["a.jpg", "b.jpg", "c.jpg"]


def test_a_voc_file_may_be_called_otherwise_than_its_image(voc):
    folder = Path(voc.annotations)
    (folder / "a.xml").rename(folder / "z.xml")
    assert [r.path.name for r in read(voc, "voc", "val").records] == ["b.jpg", "c.jpg", "a.jpg"]


def test_the_size_of_a_voc_image_is_the_annotated_one_else_its_own(voc):
    edit(voc, "a.xml", "<width>64</width>", "<width>60</width>")
    assert read(voc, "voc").records[0].size == (48, 60)
    edit(voc, "a.xml", "<width>60</width>", "<width>0</width>")
    assert read(voc, "voc").records[0].size == (48, 64)
    edit(voc, "b.xml", "<size><width>40</width><height>90</height><depth>3</depth></size>", "")
    assert read(voc, "voc").records[1].size == (90, 40)


def test_difficult_objects_are_not_trained_on_and_do_not_count(voc):
    text = voc_object("dog", (50, 0, 60, 40), difficult=1)
    text += voc_object("dog", (4, 6, 40, 30), difficult=0)
    edit(voc, "a.xml", "</annotation>", f"{text}</annotation>")
    train = read(voc, "voc")
    assert train.records[0].labels.tolist() == [0, 2, 1]
    assert train.dropped["difficult boxes"] == 1
    split = read(voc, "voc", "val")
    dogs = [(1, [4, 6, 36, 24]), (2, [10, 20, 29, 60])]
    detections = [
        {"image_id": image, "category_id": 2, "score": 0.5, "bbox": box} for image, box in dogs
    ]
    on_difficult = [
        {"image_id": 1, "category_id": 2, "score": 0.9, "bbox": [50, 0, 10, h]} for h in (40, 39)
    ]
    elsewhere = {"image_id": 1, "category_id": 2, "score": 0.9, "bbox": [0, 40, 10, 8]}
    perfect = average_precision(split, detections)
    assert perfect == pytest.approx(1 / 3)  # one class of three
    assert average_precision(split, on_difficult + detections) == perfect
    assert average_precision(split, [elsewhere, *detections]) < perfect


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("</annotation>", "", r"not readable as XML \(no element found: line 1"),
        ("<annotation>", "<!DOCTYPE a><annotation>", r"XML \(declares a document type\)"),
        ("<annotation>", '<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotation>',
         "declares a document type"),
        ("<name>cat</name>", "<name>&cat;</name>", "undefined entity"),
        ("annotation>", "opinion>", "mismatched tag"),
        ("<name>cat</name>", "", r"object 1: has no <name>; add it"),
        ("<name>cat</name>", "<name> </name>", r"object 1: has no <name>; add it"),
        ("<xmin>5</xmin>", "", r"object 1 \('cat'\): has no <xmin>; add it"),
        ("<xmin>5</xmin>", "<xmin>five</xmin>", r"<xmin> is 'five'; expected a number of px"),
        ("<xmin>5</xmin>", "<xmin>nan</xmin>", r"<xmin> is 'nan'; expected a number of px"),
        ("<xmin>5</xmin>", "<xmin></xmin>", r"<xmin> is ''; expected a number of px"),
        ("<xmax>40</xmax>", "<xmax>4</xmax>", r"from \(5, 7\) to \(4, 30\); expected xmin <= xmax"),
        ("<ymax>30</ymax>", "<ymax>4</ymax>", r"object 1 \('cat'\): from .* ymin <= ymax"),
        ("bndbox>", "box>", "mismatched tag"),
        ("<width>64</width>", "", r"size: has no <width>; add it"),
        ("<width>64</width>", "<width>w</width>", r"size: <width> is 'w'; expected a number"),
        ("<name>hot dog<", "<name>hotdog<",
         r"object 2: unknown class 'hotdog'; did you mean 'hot dog'\? correct it, or .*classes"),
        ("<name>cat<", "<name>zebra<", r"unknown class 'zebra'; known: cat, dog, hot dog; correct"),
        ("a.jpg", "b.jpg", r"b\.xml: 'b\.jpg' is the image of .*a\.xml too; correct a <filename>"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_voc_file_is_named(voc, old, new, message):
    edit(voc, "a.xml", old, new)
    with pytest.raises(DataError, match=message) as caught:
        read(voc, "voc")
    assert "a.xml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_entities_are_refused_before_they_expand(voc, encoding):
    entities = "".join(f'<!ENTITY e{n + 1} "{f"&e{n};" * 10}">' for n in range(9))
    bomb = f'<?xml version="1.0" encoding="{encoding}"?>' + (
        f'<!DOCTYPE a [<!ENTITY e0 "ha">{entities}]><annotation>&e9;</annotation>'
    )
    (Path(voc.annotations) / "a.xml").write_bytes(bomb.encode(encoding))
    with pytest.raises(DataError, match="declares a document type"):
        read(voc, "voc")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no element found"),
        (b"<html></html>", "is a <html>; expected a VOC <annotation>"),
        (b"<annotation><object><name>cat</name></object></annotation>", "has no <bndbox>; add it"),
        (b'<?xml version="1.0" encoding="big5"?><annotation/>', "multi-byte encodings"),
        (b'<?xml version="1.0" encoding="none"?><annotation/>', "unknown encoding"),
    ],
)
def test_what_is_no_voc_file_is_named(voc, content, message):
    (Path(voc.annotations) / "a.xml").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.xml: .*{message}"):
        read(voc, "voc")


def test_classes_of_voc_are_those_that_training_uses(tiny, tmp_path):
    train = write(tmp_path / "train", "voc", PICTURES)
    val = write(tmp_path / "val", "voc", PICTURES[1:])  # has dogs alone
    overrides = [
        "data.format=voc", f"data.train={train.model_dump_json()}",
        f"data.val={val.model_dump_json()}", "model.num_classes=3",
    ]  # fmt: skip
    splits = load_splits(derive(type(tiny), tiny, overrides))
    assert [split.classes for split in splits] == [sorted(CLASSES)] * 2
    assert splits[1].records[0].labels.tolist() == [1]
