"""`gfl.data.synthetic`: what is painted, what is annotated, and what a second call does.

Shapes are told from the background by their chroma (greatest minus least channel).
"""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools.coco import COCO

from gfl.data import synthetic
from gfl.data.synthetic import CATEGORIES, MIN_VISIBLE, RENDERER_VERSION, render

SIZE = 128
CHROMA_OF_SHAPES = 80
"""Half way between the background's greatest, about 50, and the shapes' least, about 110."""


def read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "annotations.json").read_text())
    return content


def files_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def boxes_by_image(content: dict[str, Any]) -> dict[str, list[list[int]]]:
    """Return the boxes of every file as (first column, first row, end column, end row)."""
    names = {image["id"]: image["file_name"] for image in content["images"]}
    boxes: dict[str, list[list[int]]] = {name: [] for name in names.values()}
    for annotation in content["annotations"]:
        x, y, width, height = map(int, annotation["bbox"])
        boxes[names[annotation["image_id"]]].append([x, y, x + width, y + height])
    return boxes


def painted(path: Path) -> NDArray[np.bool_]:
    pixels = np.asarray(Image.open(path)).astype(int)
    mask: NDArray[np.bool_] = np.ptp(pixels, axis=2) > CHROMA_OF_SHAPES
    return mask


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(tmp_path_factory.mktemp("shapes") / "set", count=200, size=SIZE, seed=0)


@pytest.fixture(scope="module")
def content(folder: Path) -> dict[str, Any]:
    return read(folder)


def test_two_renders_are_identical_to_the_byte(tmp_path: Path) -> None:
    first = render(tmp_path / "first", count=5, size=64, seed=7)
    second = render(tmp_path / "second", count=5, size=64, seed=7)
    assert len(files_of(first)) == 6
    assert files_of(first) == files_of(second)


def test_another_seed_gives_other_images(tmp_path: Path) -> None:
    first = files_of(render(tmp_path / "first", count=5, size=64, seed=7))
    second = files_of(render(tmp_path / "second", count=5, size=64, seed=8))
    assert first.keys() == second.keys()
    assert all(first[name] != second[name] for name in first)


def test_an_image_does_not_depend_on_the_count(tmp_path: Path, folder: Path) -> None:
    few = render(tmp_path / "few", count=6, size=SIZE, seed=0)
    for path in (few / "images").iterdir():
        assert path.read_bytes() == (folder / "images" / path.name).read_bytes()
    annotations = read(few)["annotations"]
    assert annotations
    assert annotations == read(folder)["annotations"][: len(annotations)]


def test_files_and_records_agree(folder: Path, content: dict[str, Any]) -> None:
    names = [f"{index:06d}.jpg" for index in range(200)]
    assert sorted(path.name for path in (folder / "images").iterdir()) == names
    assert [image["file_name"] for image in content["images"]] == names
    assert {(image["width"], image["height"]) for image in content["images"]} == {(SIZE, SIZE)}
    with Image.open(folder / "images" / names[0]) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (SIZE, SIZE))
    assert content["info"]["renderer_version"] == RENDERER_VERSION


def test_categories(content: dict[str, Any]) -> None:
    categories = [(category["id"], category["name"]) for category in content["categories"]]
    assert categories == [(1, "rectangle"), (2, "ellipse"), (3, "triangle")]
    used = [annotation["category_id"] for annotation in content["annotations"]]
    shares = np.bincount(used, minlength=4)[1:] / len(used)
    assert shares == pytest.approx([1 / 3] * 3, abs=0.08)


def test_pycocotools_reads_it(folder: Path, content: dict[str, Any]) -> None:
    coco = COCO(str(folder / "annotations.json"))
    assert len(coco.getImgIds()) == 200
    assert len(coco.getAnnIds(iscrowd=False)) == len(content["annotations"])
    assert [category["name"] for category in coco.loadCats([1, 2, 3])] == list(CATEGORIES)


def test_boxes_lie_in_the_image_and_hold_their_area(content: dict[str, Any]) -> None:
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        assert all(isinstance(value, float) for value in (*annotation["bbox"], annotation["area"]))
        assert min(x, y) >= 0
        assert min(width, height) >= 1
        assert max(x + width, y + height) <= SIZE
        # At least a pixel per row and column of the visible extent would be the diagonal.
        assert min(width, height) <= annotation["area"] <= width * height


def test_a_lone_shape_fills_its_box_to_the_pixel(folder: Path, content: dict[str, Any]) -> None:
    alone = {name: boxes[0] for name, boxes in boxes_by_image(content).items() if len(boxes) == 1}
    assert len(alone) >= 5
    for name, box in alone.items():
        rows, columns = np.nonzero(painted(folder / "images" / name))
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert seen == box, name


def test_each_box_is_tight_and_no_shape_is_without_one(
    folder: Path, content: dict[str, Any]
) -> None:
    for name, boxes in boxes_by_image(content).items():
        mask = painted(folder / "images" / name)
        uncovered = mask.copy()
        for x, y, end_x, end_y in boxes:
            inside = mask[y:end_y, x:end_x]
            edges = (inside[0], inside[-1], inside[:, 0], inside[:, -1])
            assert all(edge.any() for edge in edges), name
            uncovered[y:end_y, x:end_x] = False
        assert not uncovered.any(), name


def test_areas_count_the_visible_pixels(folder: Path, content: dict[str, Any]) -> None:
    for image in content["images"]:
        areas = [
            annotation["area"]
            for annotation in content["annotations"]
            if annotation["image_id"] == image["id"]
        ]
        seen = painted(folder / "images" / image["file_name"]).sum()
        # JPEG takes a pixel here and there along the outlines.
        assert seen == pytest.approx(sum(areas), rel=0.02, abs=4)


def extent(mask: NDArray[np.bool_]) -> list[float]:
    rows, columns = np.nonzero(mask)
    width, height = np.ptp(columns) + 1, np.ptp(rows) + 1
    return [columns.min(), rows.min(), width, height]


def test_each_box_is_the_extent_of_its_own_visible_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visible: list[list[float]] = []
    whole: list[list[float]] = []
    arrange = synthetic._arrange

    def arrange_and_record(
        rng: np.random.Generator, size: int
    ) -> tuple[list[synthetic._Shape], NDArray[np.int64]]:
        arranged, owner = arrange(rng, size)
        visible.extend(extent(owner == position) for position in range(len(arranged)))
        whole.extend(extent(shape.mask(size)) for shape in arranged)
        return arranged, owner

    monkeypatch.setattr(synthetic, "_arrange", arrange_and_record)
    annotations = read(render(tmp_path / "set", count=50, size=SIZE, seed=2))["annotations"]
    assert [annotation["bbox"] for annotation in annotations] == visible
    assert visible != whole


def test_shapes_overlap_but_none_is_hidden_too_far() -> None:
    shares = []
    for index in range(100):
        arranged, owner = synthetic._arrange(np.random.default_rng([1, index]), SIZE)
        for position, shape in enumerate(arranged):
            shares.append((owner == position).sum() / shape.mask(SIZE).sum())
    # The mask of a small shape has not exactly its area.
    assert min(shares) >= MIN_VISIBLE - 0.05
    assert 0.1 <= np.mean(np.array(shares) < 0.9) <= 0.4


def test_sizes_reach_from_small_to_large(content: dict[str, Any]) -> None:
    sides = np.array([max(annotation["bbox"][2:]) for annotation in content["annotations"]])
    small, large = sides <= 12, sides >= 0.6 * SIZE
    assert small.sum() >= 2
    assert large.sum() >= 10
    medium = (sides >= 20) & (sides <= 80)
    assert medium.mean() > 0.5 > 3 * small.mean()


def test_numbers_of_objects_and_empty_images(content: dict[str, Any]) -> None:
    numbers = np.array([len(boxes) for boxes in boxes_by_image(content).values()])
    assert 2 <= (numbers == 0).sum() <= 16
    assert (numbers == 1).any()
    assert 4 <= numbers.max() <= 8


@pytest.mark.parametrize("size", [32, 200])
def test_other_sizes(tmp_path: Path, size: int) -> None:
    content = read(render(tmp_path / "set", count=20, size=size, seed=0))
    ends = [annotation["bbox"][0] + annotation["bbox"][2] for annotation in content["annotations"]]
    assert 0.8 * size < max(ends) <= size


def test_a_finished_set_is_not_rendered_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = render(tmp_path / "set", count=3, size=64, seed=0)
    monkeypatch.delattr(synthetic, "_write_set")
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}
    assert render(folder, count=3, size=64, seed=0) == folder
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]} == before


@pytest.mark.parametrize(
    ("parameter", "value"), [("count", 4), ("size", 96), ("seed", 1)], ids=["count", "size", "seed"]
)
def test_another_set_is_refused_and_kept(tmp_path: Path, parameter: str, value: int) -> None:
    there = {"count": 3, "size": 64, "seed": 0}
    folder = render(tmp_path / "set", **there)
    before = files_of(folder)
    with pytest.raises(ValueError, match=rf"holds .*{parameter}={there[parameter]}\b") as caught:
        render(folder, **(there | {parameter: value}))
    assert f"{parameter}={value}" in str(caught.value).split("but")[1]
    assert "delete" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files_of(folder) == before


def test_a_set_of_another_renderer_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    render(tmp_path / "set", count=3, size=64, seed=0)
    monkeypatch.setattr(synthetic, "RENDERER_VERSION", RENDERER_VERSION + 1)
    with pytest.raises(ValueError, match=f"renderer_version={RENDERER_VERSION}, but"):
        render(tmp_path / "set", count=3, size=64, seed=0)


@pytest.mark.parametrize("text", [None, "not json", "[]", "{}", '{"info": {"year": 2017}}'])
def test_a_folder_of_something_else_is_refused(tmp_path: Path, text: str | None) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    if text is not None:
        (tmp_path / "annotations.json").write_text(text)
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match="no set of shapes"):
        render(tmp_path, count=3, size=64, seed=0)
    assert files_of(tmp_path) == before


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set").write_text("mine")
    with pytest.raises(ValueError, match="no set of shapes"):
        render(tmp_path / "set", count=3, size=64, seed=0)


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    assert len(files_of(render(tmp_path / "set", count=3, size=64, seed=0))) == 4


@pytest.mark.parametrize("wrong", [{"count": 0}, {"size": 31}, {"seed": -1}])
def test_parameters_out_of_range_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    parameter, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"{parameter}={value}"):
        render(tmp_path / "set", **({"count": 3, "size": 64, "seed": 0} | wrong))
    assert not any(tmp_path.iterdir())


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(synthetic, "_draw", fail)
    with pytest.raises(OSError, match="disk full"):
        render(tmp_path / "set", count=3, size=64, seed=0)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("seed", [0, 1], ids=["same set", "another set"])
def test_a_faster_process_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """The other's set appears between our look at the folder and our rename."""
    other = render(tmp_path / "other", count=3, size=64, seed=seed)
    theirs = files_of(other)
    folder = tmp_path / "set"
    write_set = synthetic._write_set

    def write_and_be_overtaken(ours: Path, parameters: dict[str, int]) -> None:
        write_set(ours, parameters)
        other.rename(folder)

    monkeypatch.setattr(synthetic, "_write_set", write_and_be_overtaken)
    if seed == 0:
        assert render(folder, count=3, size=64, seed=0) == folder
    else:
        with pytest.raises(ValueError, match="seed=1"):
            render(folder, count=3, size=64, seed=0)
    assert files_of(folder) == theirs
    assert list(tmp_path.iterdir()) == [folder]


def test_two_processes_end_in_one_good_set(tmp_path: Path) -> None:
    parameters = {"count": 60, "size": 64, "seed": 0}
    folder = tmp_path / "shared" / "set"
    context = multiprocessing.get_context("spawn")
    # Neither worker takes a job before both are up.
    together = context.Barrier(2)
    with ProcessPoolExecutor(
        2, mp_context=context, initializer=together.wait, initargs=(60,)
    ) as executor:
        jobs = [executor.submit(partial(render, folder, **parameters)) for _ in range(2)]
        assert [job.result(timeout=120) for job in jobs] == [folder, folder]
    assert list(folder.parent.iterdir()) == [folder]
    assert files_of(folder) == files_of(render(tmp_path / "alone", **parameters))
