"""The data doctor on sets with one thing wrong each, on rendered shapes and on real images."""

import re
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from gfl.config.loader import derive, load_config
from gfl.data.dataset import DetectionDataset
from gfl.data.split import ImageRecord, load_splits
from gfl.errors import DataError
from gfl.inference.visualize import draw_augmentation, draw_samples
from gfl.inspection.findings import EXAMPLES, check_files, describe, find_cheaply, inspect_data
from gfl.train.trainer import Trainer


@pytest.fixture
def prepared(shapes_folder, tiny):
    """The splits of rendered shapes, in which nothing is wrong but small objects."""
    train, val = load_splits(tiny)
    return replace(train, dropped={}), replace(val, dropped={})


def examine(config, train, val, *, quick=False):
    paths = set() if quick else {r.path for r in [*train.records, *val.records]}
    return inspect_data(config, train, val, dict(check_files(paths)))


def findings(config, train, val, *, quick=False):
    """What there is to say, without what rendered shapes always have."""
    expected = ("images without boxes", "objects that no location learns")
    everything = examine(config, train, val, quick=quick).findings
    return [finding for finding in everything if finding.what not in expected]


def changed(split, index, **values):
    records = list(split.records)
    records[index] = replace(records[index], **values)
    return replace(split, records=records)


def test_nothing_is_wrong_with_rendered_shapes(tiny, prepared):
    assert findings(tiny, *prepared) == []


def test_a_damaged_file_is_an_error_that_names_it(tiny, prepared, tmp_path):
    train, val = prepared
    whole = train.records[0].path.read_bytes()
    (cut := tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (text := tmp_path / "text.jpg").write_text("no image")
    broken = changed(changed(train, 0, path=cut), 1, path=text)
    (finding,) = findings(tiny, broken, val)
    assert (finding.error, finding.split, finding.count) == (True, "train", 2)
    assert finding.what == "files that cannot be read"
    assert str(cut) in finding.details[0]
    assert str(text) in finding.details[1]
    assert findings(tiny, broken, val, quick=True) == []


def test_another_size_than_annotated_is_an_error(tiny, prepared):
    train, val = prepared
    name = val.records[2].path.name
    (finding,) = findings(tiny, train, changed(val, 2, size=(48, 64)))
    assert (finding.error, finding.split, finding.count) == (True, "val", 1)
    assert finding.details == [f"{name} is 64 x 64 px, annotated as 64 x 48"]
    assert str(finding) == f"val: images of another size than annotated: 1 ({finding.details[0]})"


def test_copies_are_found_by_content_within_a_set_and_across(tiny, prepared, tmp_path):
    train, val = prepared
    original = train.records[3].path
    (copy := tmp_path / "copy.jpg").write_bytes(original.read_bytes())
    (finding,) = findings(tiny, changed(train, 5, path=copy), val)
    assert (finding.error, finding.split, finding.what) == (
        False,
        "train",
        "copies of another image",
    )
    assert finding.details == [f"copy.jpg = {original.name}"]
    (finding,) = findings(tiny, train, changed(val, 5, path=copy))
    assert (finding.error, finding.split) == (False, "val")
    assert finding.what == "images that are trained on, too"
    assert finding.details == [f"copy.jpg = {original.name}"]


def test_without_reading_copies_are_found_by_path(tiny, prepared):
    train, _ = prepared
    listed = findings(tiny, train, train, quick=True)
    count = len(train.records)
    assert [(f.what, f.count) for f in listed] == [("images that are trained on, too", count)]
    assert listed[0].details[EXAMPLES:] == [f"{count - EXAMPLES} more"]


def test_unreadable_files_are_no_copies_of_each_other(tiny, prepared, tmp_path):
    train, val = prepared
    for name in "ab":
        (tmp_path / name).write_bytes(b"")
    broken = changed(changed(train, 0, path=tmp_path / "a"), 1, path=tmp_path / "b")
    assert [finding.what for finding in findings(tiny, broken, val)] == [
        "files that cannot be read"
    ]


def test_a_class_without_boxes_is_named(tiny, prepared):
    train, val = prepared
    (finding,) = findings(tiny, replace(train, classes=[*train.classes, "ghost"]), val)
    assert (finding.error, finding.count, finding.details) == (False, 1, ["ghost"])
    assert finding.what == "classes without boxes"


def test_boxes_beyond_their_image_are_counted_with_its_name(tiny, prepared):
    train, val = prepared
    boxes = np.array([[-9.0, 5, 20, 20], [3, 3, 20, 80], [-0.5, 0, 64.5, 64]], np.float32)
    broken = changed(train, 4, boxes=boxes, labels=np.zeros(3, np.int64))
    (finding,) = findings(tiny, broken, val)
    assert (finding.error, finding.count) == (False, 2)
    assert finding.details == [train.records[4].path.name] * 2


def test_what_the_reader_left_out_is_told(tiny, prepared):
    train, val = prepared
    (finding,) = findings(tiny, replace(train, dropped={"degenerate boxes": 7}), val)
    assert (finding.error, finding.count, finding.what) == (False, 7, "degenerate boxes, left out")


def test_errors_come_before_warnings(tiny, prepared):
    train, val = prepared
    train, val = replace(train, dropped={"crowd boxes": 1}), changed(val, 0, size=(65, 64))
    assert [finding.error for finding in findings(tiny, train, val)] == [True, False]


def test_images_and_boxes_are_counted(tiny, prepared):
    train, val = prepared
    labels = [label for r in train.records for label in r.labels.tolist()]
    statistics = examine(tiny, train, val, quick=True).splits["train"]
    assert statistics.images == len(train.records)
    assert statistics.boxes == len(labels) == sum(statistics.sizes.values())
    assert statistics.classes == {n: labels.count(i) for i, n in enumerate(train.classes)}
    assert statistics.boxes_per_image.max == max(len(r.boxes) for r in train.records)


def test_sizes_are_those_of_the_network_s_input(tiny, prepared):
    train, _ = prepared
    sides = np.array([[31, 32], [32, 32], [95, 96], [96, 96]], np.float32)
    boxes = np.concatenate([0 * sides, 2 * sides], axis=1)  # the image is halved
    labels = np.zeros(4, np.int64)
    data = tiny.data.model_copy(update={"short_side": 100, "long_side": 200})
    record = replace(train.records[0], size=(200, 400), boxes=boxes, labels=labels)
    statistics = describe(replace(train, records=[record]), data)
    assert statistics.sizes == {"small": 1, "medium": 2, "large": 1}
    assert (statistics.height.min, statistics.width.median, statistics.aspect.max) == (200, 400, 2)


def clipping(tiny):
    return tiny.model_copy(update={"model": tiny.model.model_copy(update={"reg_max": 2})})


def test_clipped_edges_are_reported_with_what_to_set(tiny, prepared):
    config = clipping(tiny)
    report = examine(config, *prepared, quick=True)
    (finding,) = [f for f in report.findings if "beyond the regression range" in f.what]
    (measured,) = report.regression_ranges
    assert finding.count == measured.total.clipped > 0
    assert f"model.reg_max={measured.reg_max} clips under 0.1%" in finding.details
    assert f"{measured.clipped_objects} of {measured.objects} objects" in finding.details
    enough = config.model_copy(
        update={"model": config.model.model_copy(update={"reg_max": measured.reg_max})}
    )
    again = examine(enough, *prepared, quick=True)
    assert not [f for f in again.findings if "beyond the regression range" in f.what]


def test_the_check_before_training_says_the_same_without_a_file(tiny, prepared, tmp_path):
    train, _ = prepared
    config = clipping(tiny)
    records = [replace(r, path=tmp_path / "absent.jpg") for r in train.records]
    ghost = replace(train, records=records, classes=[*train.classes, "ghost"])
    clipped, empty = map(str, find_cheaply(config, ghost, ghost))
    assert clipped.startswith(
        "train: edges beyond the regression range of model.reg_max 2, hence clipped: "
    )
    assert empty == "train: classes without boxes: 1 (ghost)"
    assert "images at short side" not in clipped


def test_the_check_before_training_samples_a_large_set_in_a_second_or_two(prepared):
    generator = torch.Generator().manual_seed(0)
    config = load_config("configs/gfl_r50_1x.yaml")
    corners = torch.rand(118_000, 7, 2, 2, generator=generator) * torch.tensor([640.0, 480.0])
    boxes = torch.cat([corners.amin(dim=2), corners.amax(dim=2)], dim=-1)
    labels = torch.randint(0, 79, (118_000, 7), generator=generator)
    first = prepared[0].records[0]
    records = [
        ImageRecord(number, first.path, (480, 640), *objects)
        for number, objects in enumerate(zip(boxes.numpy(), labels.numpy(), strict=True))
    ]
    names = [f"{label}" for label in range(80)]
    split = replace(prepared[0], records=records, classes=names)
    config = config.model_copy(update={"model": config.model.model_copy(update={"reg_max": 8})})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    started = time.process_time()
    clipped, empty = map(str, find_cheaply(config, split, split))
    seconds = time.process_time() - started
    torch.set_num_threads(threads)
    assert "of edges in 1000 of 118000 images at short side 800" in clipped
    assert empty == "train: classes without boxes: 1 (79)"
    assert seconds < 2  # of one core; on a free one it takes a quarter of that


def test_samples_are_drawn_as_training_sees_them(tiny, prepared, tmp_path):
    train, _ = prepared
    boxes = np.array([[16, 16, 48, 40]], np.float32)
    train = changed(train, 0, boxes=boxes, labels=np.zeros(1, np.int64))
    config = derive(type(tiny), tiny, ["data.augment.flip=0"])
    draw_samples(DetectionDataset(train, config, training=True), tmp_path / "new", count=5)
    drawn = sorted((tmp_path / "new").iterdir())
    assert len(drawn) == 5
    assert drawn[0].name == f"000000-{train.records[0].path.stem}.png"
    picture = np.asarray(Image.open(drawn[0]).convert("RGB")).astype(int)
    assert picture.shape == (640, 640, 3)  # ten times the size
    blue = np.array([31, 119, 180])  # of the first class
    for x, y in ((160, 300), (480, 300), (300, 160), (300, 400)):
        around = picture[y - 2 : y + 3, x - 2 : x + 3]
        assert np.abs(around - blue).sum(axis=-1).min() < 60
    assert np.abs(picture[280, 320] - blue).sum() > 60


def test_captions_say_what_augmentation_did(tiny, prepared, tmp_path):
    """A mosaic of the first epoch has a caption, and takes part in no later one."""
    changes = ["mosaic=1", "flip=0", "close_epochs=2"]
    config = derive(type(tiny), tiny, [f"data.augment.{change}" for change in changes])
    picture = tmp_path / "grid.svg"
    draw_augmentation(DetectionDataset(prepared[0], config, training=True), picture)
    captions = re.findall(r"<!-- (mosaic|unchanged) -->", picture.read_text())
    assert captions == ["mosaic", "unchanged", "unchanged", "unchanged"] * 4


@pytest.mark.real_data
def test_real_images_have_no_errors_and_known_troubles(real_data):
    folder = real_data / "coco128"
    where = f"{{images: {folder}/images, annotations: {folder}/annotations/instances.json}}"
    config = load_config("configs/coco128.yaml", [f"data.train={where}", f"data.val={where}"])
    report = examine(config, *load_splits(config))
    assert report.files == 128
    assert (report.splits["train"].images, report.splits["train"].boxes) == (126, 929)
    counts = {(f.split, f.what): f.count for f in report.findings}
    assert not any(finding.error for finding in report.findings)
    assert counts["val", "images that are trained on, too"] == 126
    assert counts["train", "classes without boxes"] == 9
    assert counts["val", "images without boxes"] == 2
    (measured,) = report.regression_ranges
    assert (measured.total.clipped, measured.reg_max) == (0, 12)


def test_images_with_more_objects_than_detections_are_named(tiny, prepared):
    config = derive(type(tiny), tiny, ["postprocess.detections_per_image=1"])
    (finding,) = [f for f in find_cheaply(config, *prepared) if "more objects" in f.what]
    assert finding.what == "images with more objects than the 1 detections that are kept"
    counts = np.array([len(record.boxes) for record in prepared[1].records])
    assert finding.count == (counts > 1).sum() > 0
    share = np.minimum(counts, 1).sum() / counts.sum()
    assert f"recall is at most {share:.2f} and AP" in str(finding)
    assert f"postprocess.detections_per_image={counts.max()} and" in str(finding)
    assert not [f for f in find_cheaply(tiny, *prepared) if "more objects" in f.what]


def test_a_batch_with_one_value_a_channel_is_an_error_before_training(tiny, prepared):
    small = ["data.short_side=32", "data.long_side=32", "data.batch=1"]
    config = derive(type(tiny), tiny, small)
    (error,) = [f for f in findings(config, *prepared, quick=True) if f.error]
    assert "set a larger data.batch or data.short_side, or model.backbone.norm_eval" in str(error)
    mends = (["data.batch=2"], ["data.long_side=64", "data.short_side=64"],
             ["model.backbone.norm_eval=true"])  # fmt: skip
    for mend in mends:
        mended = derive(type(tiny), config, mend)
        assert not [f for f in findings(mended, *prepared, quick=True) if f.error]
    with pytest.raises(DataError, match="gives BatchNorm one value of each channel"):
        Trainer(config, prepared[0], torch.device("cpu"))


def test_pixels_that_use_a_small_part_of_their_range_are_named(tiny, prepared, tmp_path):
    train, val = prepared
    height, width = train.records[0].size
    twelve_bits = np.random.default_rng(0).integers(0, 4096, (height, width)).astype(np.uint16)
    Image.fromarray(twelve_bits).save(dark := tmp_path / "dark.png")
    (finding,) = findings(tiny, changed(train, 0, path=dark), val)
    assert finding.what.startswith("images whose brightest pixel is below 32 of 255")
    assert finding.details == ["dark.png: 16"]
