"""Whatever an annotation file holds, it is read, or refused with a reason."""

import contextlib
import copy
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from gfl.config.schema import Config, DataConfig, SplitConfig
from gfl.data.split import read_split
from gfl.errors import DataError
from gfl.evaluation.coco_eval import evaluate_split

pytestmark = pytest.mark.fuzz
LONG = settings(
    max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["1", "a.png", "../a.png", "/a.png", "", ".", "..", "a\x00.png", "\ud800",
                       "a\x00/a.png", "\ud800/a.png", "..\\a.png", 10**400, -(10**400)])
)  # fmt: skip
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
COCO = {
    "images": [
        {"id": 1, "file_name": "a.png", "width": 64, "height": 48},
        {"id": 2, "file_name": "b.png", "width": 64, "height": 48},
    ],
    "annotations": [
        {"id": n, "image_id": 1 + n % 2, "category_id": 1, "bbox": [n, 2, 20, 20], "area": 400,
         "iscrowd": 0, "ignore": 0}
        for n in range(4)
    ],
    "categories": [{"id": 1, "name": "thing"}],
}  # fmt: skip
VOC = """<annotation><filename>a.png</filename><size><width>64</width><height>48</height></size>
<object><name>thing</name><difficult>0</difficult><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>30</xmax>
<ymax>30</ymax></bndbox></object></annotation>"""
YOLO = "0 0.5 0.5 0.3 0.3\n0 0.2 0.2 0.1 0.1\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    for name in "ab":
        Image.new("RGB", (64, 48)).save(folder / "images" / f"{name}.png")
    return folder


def read(annotations, images, form):
    """Read a set for training and for evaluation, and evaluate it; a refusal says why."""
    section = SplitConfig(images=str(images), annotations=str(annotations))
    data = DataConfig(train=section, val=section, format=form)
    refusals = []
    for which in ("train", "val"):
        try:
            split = read_split(data, which, 1, ["thing"])
        except DataError as error:
            refusals.append(str(error))
        else:
            for record in split.records:
                assert record.path.is_relative_to(images)
                assert np.isfinite(record.boxes).all()
                assert min(record.size) > 0
            if which == "val":
                evaluate_split(split, np.empty((0, 7)), Config())
    assert all(refusals)


@LONG
@given(
    st.sampled_from(list(COCO)),
    st.integers(0, 3),
    st.sampled_from(["id", "image_id", "category_id", "bbox", "area", "iscrowd", "ignore", "name",
                     "file_name", "width", "height"]),
    JSON,
)  # fmt: skip
def test_a_field_of_coco_may_hold_anything(folder, section, index, field, value):
    content = copy.deepcopy(COCO)
    entries = content[section]
    entries[index % len(entries)][field] = value
    (folder / "a.json").write_text(json.dumps(content))
    read(folder / "a.json", folder / "images", "coco")


@LONG
@given(st.sampled_from(list(COCO)), JSON)
def test_a_section_of_coco_may_hold_anything(folder, section, value):
    (folder / "a.json").write_text(json.dumps(COCO | {section: value}))
    read(folder / "a.json", folder / "images", "coco")
    (folder / "a.json").write_text(json.dumps(COCO | {section: [value]}))
    read(folder / "a.json", folder / "images", "coco")


@st.composite
def damaged(draw, text):
    """The bytes of `text` with a part cut, doubled or replaced."""
    content = text.encode()
    start = draw(st.integers(0, len(content)))
    end = draw(st.integers(start, min(len(content), start + 40)))
    return content[:start] + draw(st.binary(max_size=12)) + content[end:]


@LONG
@given(damaged(json.dumps(COCO)))
def test_coco_may_be_damaged(folder, content):
    (folder / "a.json").write_bytes(content)
    read(folder / "a.json", folder / "images", "coco")


@LONG
@given(damaged(VOC))
def test_voc_may_be_damaged(folder, content):
    (folder / "labels" / "a.xml").write_bytes(content)
    read(folder / "labels", folder / "images", "voc")


@LONG
@given(damaged(YOLO) | st.lists(SCALARS, max_size=6).map(lambda n: " ".join(map(repr, n)).encode()))
def test_yolo_may_be_damaged(folder, content):
    (folder / "labels" / "a.txt").write_bytes(content)
    with contextlib.suppress(FileNotFoundError):
        (folder / "labels" / "classes.txt").unlink()
    read(folder / "labels", folder / "images", "yolo")
