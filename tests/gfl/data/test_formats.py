"""The three formats: what is written in one comes back the same as from any other."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gfl.config.loader import derive
from gfl.data.dataset import DetectionDataset
from gfl.data.split import load_splits
from gfl.errors import DataError
from tests.support.annotation_writers import CLASSES, FORMATS, PICTURES, SIZES, read, write
from tests.support.detections import average_precision


@st.composite
def boxes(draw, size):
    """A box of whole pixels inside of an image.

    Of at least two: a side of one, rounded to decimals, may be too short to be trained on.
    """
    x0, y0 = (draw(st.integers(0, side - 2)) for side in size)
    x1, y1 = (draw(st.integers(low + 2, side)) for low, side in zip((x0, y0), size, strict=True))
    return x0, y0, x1, y1


@st.composite
def datasets(draw):
    pictures = []
    for number, size in enumerate(SIZES):
        objects = st.tuples(st.integers(0, len(CLASSES) - 1), boxes(size))
        pictures.append((f"{number}.png", size, draw(st.lists(objects, max_size=3))))
    return pictures


@settings(max_examples=25, deadline=None)
@given(datasets())
def test_the_same_boxes_come_back_from_every_format(pictures):
    for form in FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            split = read(write(Path(folder) / "set", form, pictures), form, "val")
        assert split.classes == list(CLASSES)
        assert [r.image_id for r in split.records] == [1, 2, 3]
        for record, (name, (width, height), objects) in zip(split.records, pictures, strict=True):
            assert record.path.name == name
            assert record.size == (height, width)
            assert record.labels.tolist() == [label for label, _ in objects]
            expected = np.array([box for _, box in objects], np.float32).reshape(-1, 4)
            # Six decimals of at most 100 px, for a centre and half a side.
            tolerance = 1e-4 if form == "yolo" else 0
            np.testing.assert_allclose(record.boxes, expected, rtol=0, atol=tolerance)


@settings(max_examples=10, deadline=None)
@given(datasets())
def test_the_same_boxes_are_trained_on_whatever_the_format(pictures):
    pictures[0][2].append((0, (1, 2, 30, 40)))  # at least one
    contents = []
    for form in FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            split = read(write(Path(folder) / "set", form, pictures), form)
        boxes = [[round(side) for side in box] for r in split.records for box in r.boxes.tolist()]
        contents.append(([r.path.name for r in split.records], split.dropped, boxes))
    assert contents[0] == contents[1] == contents[2]


@pytest.mark.parametrize("form", FORMATS)
def test_perfect_detections_have_an_ap_of_1(tmp_path, form):
    split = read(write(tmp_path / "set", form, PICTURES), form, "val")
    detections = [
        {"image_id": record.image_id, "category_id": split.category_ids[label], "score": 0.9,
         "bbox": [x0, y0, x1 - x0, y1 - y0]}
        for record in split.records
        for (x0, y0, x1, y1), label in zip(record.boxes.tolist(), record.labels.tolist(),
                                           strict=True)
    ]  # fmt: skip
    assert average_precision(split, detections) == pytest.approx(1)
    assert average_precision(split, detections[1:]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("form", FORMATS)
def test_both_sets_load_and_give_samples(tiny, tmp_path, form):
    train = write(tmp_path / "train", form, PICTURES)
    val = write(tmp_path / "val", form, PICTURES[:2])
    overrides = [
        f"data.format={form}", f"data.classes={json.dumps(CLASSES)}", "model.num_classes=3",
        f"data.train={train.model_dump_json()}", f"data.val={val.model_dump_json()}",
    ]  # fmt: skip
    config = derive(type(tiny), tiny, overrides)
    splits = load_splits(config)
    assert [len(split.records) for split in splits] == [2, 2]
    assert splits[0].dropped == {"images without annotations": 1}
    sample = DetectionDataset(splits[1], config, training=False)[0, 0]
    assert sample.pixels.shape == (3, 48, 64)
    torch.testing.assert_close(sample.boxes[1], torch.tensor([0.0, 0, 64, 48]))


@pytest.mark.parametrize("form", ["voc", "yolo"])
def test_the_digest_is_of_every_annotation_file(tmp_path, form):
    section = write(tmp_path / "set", form, PICTURES)
    before = read(section, form).digest
    assert read(section, form, "val").digest == before
    folder = Path(section.annotations)
    file = sorted(folder.iterdir())[-1]
    text = file.read_text()
    file.write_text(text + "\n")
    changed = read(section, form).digest
    file.write_text(text)
    assert read(section, form).digest == before != changed
    # The last in order before and after, so that with YOLO nothing but its name changes.
    (tmp_path / "set" / "images" / f"{file.stem}.jpg").rename(tmp_path / "set/images/d.jpg")
    file.write_text(text.replace("c.jpg", "d.jpg"))
    file.rename(folder / f"d{file.suffix}")
    assert read(section, form).digest != before


@pytest.mark.parametrize(("form", "suffix"), [("voc", ".xml"), ("yolo", ".txt")])
def test_annotations_that_are_missing_are_named(tmp_path, form, suffix):
    section = write(tmp_path / "set", form, PICTURES)
    folder = Path(section.annotations)
    (Path(section.images) / "b.jpg").unlink()
    message = rf"b\{suffix}: its image 'b(\.jpg)?' is missing in .*images; add the image or remove"
    with pytest.raises(DataError, match=message):
        read(section, form)
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(DataError, match=rf"no \{suffix} file .*data\.format"):
        read(section, form)
    folder.rmdir()
    with pytest.raises(DataError, match=rf"no such folder; expected a folder of \{suffix} files"):
        read(section, form)


@pytest.mark.parametrize("form", FORMATS)
def test_classes_that_do_not_fit_the_model_are_named(tmp_path, form):
    section = write(tmp_path / "set", form, PICTURES)
    with pytest.raises(DataError, match=r"has 3 categories, .* set model\.num_classes=3"):
        read(section, form, count=80)


@pytest.mark.parametrize("form", ["coco", "voc"])
def test_a_size_from_before_the_exif_turn_is_explained(tiny, tmp_path, form):
    section = write(tmp_path / "set", form, PICTURES)
    exif = Image.Exif()
    exif[0x0112] = 8
    file = Path(section.images) / "a.jpg"
    Image.new("RGB", SIZES[0]).save(file, exif=exif)
    dataset = DetectionDataset(read(section, form), tiny, training=False)
    with pytest.raises(
        DataError,
        match=r"is 48 x 64 px, but its annotations say 64 x 48, as before the rotation by its EXIF "
        r"orientation; remove the orientation or correct .*annotations",
    ):
        dataset[0, 0]
    for size, orientation in ((SIZES[0][::-1], 1), (SIZES[1], 8)):
        exif[0x0112] = orientation
        Image.new("RGB", size).save(file, exif=exif)
        with pytest.raises(DataError, match="but its annotations say 64 x 48; correct"):
            dataset[0, 0]
