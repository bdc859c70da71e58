"""`gfl.load(...).predict(...)`: forms of images, batches, augmented looks, other tools."""

import json
import weakref

import numpy as np
import pytest
import supervision
import torch
from PIL import Image

import gfl
from gfl.checkpoint.files import About
from gfl.checkpoint.snapshot import take_snapshot
from gfl.config.loader import derive
from gfl.config.schema import Config
from gfl.data.images import list_images, read_image
from gfl.errors import DataError
from gfl.inference.detections import Detections, require_own_names, write_detections
from gfl.inference.predictor import Model, _batches, _mirror
from gfl.model.tile_merge import merge_tiles
from tests.support.detectors import attentive_detector


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """The checkpoint of a detector that finds something everywhere."""
    detector = attentive_detector(tiny)
    path = tmp_path_factory.mktemp("checkpoint")
    about = About(["rectangle", "ellipse", "triangle"], [1, 2, 5], 0, 0, {})
    take_snapshot(detector, tiny, about, {}).write(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return gfl.load(folder)


@pytest.fixture(scope="module")
def files(shapes_folder):
    return list_images(shapes_folder / "val" / "images")


def same(one, other):
    torch.testing.assert_close(one.boxes, other.boxes, atol=1e-3, rtol=0)
    torch.testing.assert_close(one.scores, other.scores, atol=1e-5, rtol=0)
    assert torch.equal(one.labels, other.labels)


def test_every_form_of_an_image_gives_the_same(model, files):
    (expected,) = model.predict(files[0])
    assert isinstance(expected, Detections)
    assert len(expected) > 0
    assert (expected.source, expected.size) == (str(files[0]), (64, 64))
    pixels = read_image(files[0])
    array = pixels.permute(1, 2, 0).numpy()
    forms = (str(files[0]), files[0].read_bytes(), pixels, array, Image.open(files[0]))
    for form in (*forms, array[None], pixels[None]):
        (detections,) = model.predict(form)
        same(detections, expected)


def test_a_folder_is_its_images_in_order(model, files, shapes_folder):
    detections = model.predict(shapes_folder / "val" / "images")
    assert [of_image.source for of_image in detections] == [str(file) for file in files]
    assert model.predict([]) == []


def test_a_batch_changes_no_more_than_rounding(model, files):
    thin = torch.zeros(3, 1, 400, dtype=torch.uint8)  # less than a pixel high when scaled
    mixed = [*files[:3], torch.zeros(3, 40, 96, dtype=torch.uint8), thin, *files[3:5]]
    for one, other in zip(model.predict(mixed), model.predict(mixed, batch=4), strict=True):
        same(one, other)


def test_detections_of_tiles_are_merged_in_px_of_the_image(model, files):
    pixels = torch.cat([read_image(file) for file in files[:2]], dim=2)  # 64 x 128
    places = [[0, 0, 64, 64], [40, 0, 104, 64], [64, 0, 128, 64]]
    of_tiles = [model.predict(pixels[:, :, x1:x2])[0].predictions for x1, _, x2, _ in places]
    settings = model.config.postprocess
    expected = merge_tiles(of_tiles, torch.tensor(places), (64, 128), settings)
    for batch in (1, 2, 5):
        (detections,) = model.predict(pixels, tiles=(64, 24), batch=batch)
        assert detections.size == (64, 128)
        same(detections, expected)
    (both,) = model.predict(pixels, tiles=(64, 32), flip=True)
    (mirrored,) = model.predict(pixels.flip(2), tiles=(64, 32), flip=True)
    same(_mirror(mirrored.predictions, 128), both)


class WithMore(Config):
    """A configuration with more than the detector's part, like that of a job."""

    where: str = "here"


def test_tiles_are_those_of_the_configuration_unless_others_are_asked_for(folder, model, files):
    changes = ["data.tiles={size: 40, overlap: 16}"]
    tiled = gfl.load(folder, derive(WithMore, model.config, changes))
    (expected,) = model.predict(files[0], tiles=(40, 16))
    same(tiled.predict(files[0])[0], expected)
    (whole,) = model.predict(files[0])
    same(tiled.predict(files[0], tiles=False)[0], whole)
    same(tiled.predict(files[0], tiles=(64, 0))[0], whole)  # the image is one tile
    assert len(whole) != len(expected)
    same(tiled.predict(files[0], tiles=(40, 16))[0], expected)


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        (640, r"tiles: got 640; expected \(size, overlap\) in px, True or False"),
        ((640,), r"tiles: got \(640,\); expected \(size, overlap\)"),
        ((16, 0), r"tiles: data\.tiles\.size: got 16: Input should be greater than or equal to 32"),
        ((64, 80), r"tiles: data\.tiles\.overlap 80 is not below data\.tiles\.size 64: lower it"),
    ],
)
def test_tiles_of_another_form_are_refused(model, files, tiles, message):
    with pytest.raises(ValueError, match=message):
        model.predict(files[0], tiles=tiles)


def test_images_of_many_sizes_do_not_pile_up():
    alive = []

    def images():
        for height in range(32, 132):
            yield torch.zeros(3, height, 40, dtype=torch.uint8)
            alive.append(height)

    passes = 0
    for places, pixels in _batches(images(), 4):
        assert {tuple(each.shape) for each in pixels} == {(3, 32 + places[0], 40)}
        passes += len(places)
        assert len(alive) - passes < 32
    assert passes == 100


def test_an_image_of_a_rare_size_does_not_keep_all_others_waiting(model):
    """Detections come in order, and never more than eight batches after their image."""
    read = []

    def images():
        for number in range(100):
            read.append(number)
            yield torch.zeros(3, 64, 48 if number == 3 else 64, dtype=torch.uint8)

    for number, of_image in enumerate(model.stream(images(), batch=2)):
        assert of_image.size == (64, 48 if number == 3 else 64)
        assert len(read) - number <= 8 * 2 + 2
    assert number == 99


def test_images_of_an_iterator_are_not_kept(model):
    frames = []

    def video():
        for number in range(12):
            assert sum(frame() is not None for frame in frames) <= 2
            image = np.full((64, 64, 3), number, np.uint8)
            frames.append(weakref.ref(image))
            yield image

    detections = model.predict(video())
    assert [of_image.source for of_image in detections] == [""] * 12


def test_thresholds_leave_out_what_is_below(folder, model, files, tiny):
    (detections,) = model.predict(files[0], min_score=0.3)
    assert (detections.scores >= 0.3).all()
    (everything,) = model.predict(files[0])
    assert 0 < len(detections) < len(everything)
    assert len(detections) == (everything.scores >= 0.3).sum()
    strict = gfl.Config(**tiny.model_dump() | {"postprocess": {"detections_per_image": 2}})
    assert len(gfl.load(folder, strict).predict(files[0])[0]) == 2


def test_a_mirrored_look_finds_what_is_mirrored(model, files):
    pixels = read_image(files[0])
    (detections,) = model.predict(pixels)
    (mirrored,) = model.predict(pixels.flip(2))
    back = _mirror(_mirror(mirrored.predictions, 64), 64)
    torch.testing.assert_close(back.boxes, mirrored.boxes, atol=1e-4, rtol=0)
    assert torch.equal(back.edge_std, mirrored.edge_std)
    (both,) = model.predict(pixels, flip=True)
    best = max(detections.scores.max(), mirrored.scores.max())
    assert both.scores[0] == pytest.approx(best.item(), abs=1e-5)
    (other,) = model.predict(pixels.flip(2), flip=True)
    torch.testing.assert_close(other.scores, both.scores, atol=1e-4, rtol=0)
    x1, _, x2, _ = both.boxes[0]
    torch.testing.assert_close(
        other.boxes[0, [2, 0]], 64 - torch.stack([x1, x2]), atol=0.01, rtol=0
    )
    (scaled,) = model.predict(pixels, scales=(1.0, 1.5))
    assert len(scaled) > 0
    assert (scaled.boxes >= 0).all()
    assert (scaled.boxes <= 64).all()


def test_other_tools_understand_the_detections(model, files):
    (detections,) = model.predict(files[0])
    theirs = detections.to_supervision()
    assert isinstance(theirs, supervision.Detections)
    assert theirs.data["class_name"].tolist() == detections.names
    np.testing.assert_allclose(theirs.xyxy, detections.boxes.numpy())
    record = detections.to_coco(7)[0]
    x1, y1, x2, y2 = detections.boxes[0].tolist()
    assert record["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=1e-4)
    assert (record["image_id"], record["category_id"]) == (7, [1, 2, 5][detections.labels[0]])
    assert record["edge_std"] == detections.edge_std[0].tolist()
    label, cx, cy, w, h, score = detections.to_yolo().splitlines()[0].split()
    assert int(label) == detections.labels[0]
    assert (float(cx) - float(w) / 2) * 64 == pytest.approx(x1, abs=1e-3)
    assert (float(cy) + float(h) / 2) * 64 == pytest.approx(y2, abs=1e-3)
    assert float(score) == pytest.approx(detections.scores[0].item(), abs=1e-6)


def test_a_coco_file_written_image_by_image_is_what_json_would_write(model, files, tmp_path):
    for count, least in ((2, 0.3), (1, 1.0)):
        detections = model.predict(files[:count], min_score=least)
        write_detections(iter(detections), tmp_path, "coco", 0.3)
        text = (tmp_path / "predictions.json").read_text()
        content = json.loads(text)
        assert text == json.dumps(content, indent=1) + "\n"
        assert [image["id"] for image in content["images"]] == list(range(1, count + 1))
        assert len(content["annotations"]) == sum(map(len, detections))
        assert [entry["id"] for entry in content["categories"]] == [1, 2, 5]
    assert len(list(tmp_path.glob("*.png"))) == 2


@pytest.mark.parametrize("form", ["coco", "yolo"])
def test_where_an_image_fails_no_file_is_written(model, files, tmp_path, form):
    def detections():
        yield from model.predict(files[:2])
        raise DataError("the third is damaged")

    (tmp_path / "predictions.json").write_text("of before")
    with pytest.raises(DataError, match="the third"):
        write_detections(detections(), tmp_path, form, 0.3)
    assert [file.name for file in tmp_path.iterdir()] == ["predictions.json"]
    assert (tmp_path / "predictions.json").read_text() == "of before"


def test_yolo_files_are_written(model, files, tmp_path):
    detections = model.predict(files[:2])
    counts = write_detections(detections, tmp_path, "yolo", 0.3)
    texts = [(tmp_path / f"{file.stem}.txt").read_text() for file in files[:2]]
    lines = [len(text.splitlines()) for text in texts]
    assert lines == [len(of_image) for of_image in detections]
    assert sum(lines) == sum(counts.values()) > 0
    require_own_names(files)
    with pytest.raises(ValueError, match=f"{files[0].stem}: 2 images have this name"):
        require_own_names([*files, tmp_path / files[0].with_suffix(".png").name])
    assert (tmp_path / "classes.txt").read_text().split() == ["rectangle", "ellipse", "triangle"]


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (b"no image", DataError, r"8 bytes: cannot be read as an image \(cannot identify image"),
        (b"", DataError, "0 bytes: cannot be read as an image"),
        ("nowhere.png", ValueError, r"nowhere\.png: no such image or folder"),
        (np.zeros((4, 4)), ValueError, r"got ndarray float64 \(4, 4\); expected a path"),
        (torch.zeros(3, 4, 4), ValueError, r"got Tensor torch\.float32 \(3, 4, 4\); expected"),
        ([None], ValueError, "got NoneType; expected a path"),
    ],
)
def test_what_is_no_image_is_said(model, image, error, message):
    with pytest.raises(error, match=message):
        model.predict(image)


def test_a_batch_of_none_is_refused(model, files):
    with pytest.raises(ValueError, match=r"batch 0, scales \[1.0\]: expected a positive batch"):
        model.predict(files, batch=0)


def test_the_model_says_what_it_is(model, tiny):
    assert isinstance(model, Model)
    assert model.about.classes == ["rectangle", "ellipse", "triangle"]
    assert model.config == tiny
