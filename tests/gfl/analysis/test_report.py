"""The analysis of a small scene, its tables, and the page that shows it."""

import csv
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from gfl.analysis.analysis import analyse, by_object_count
from gfl.analysis.gallery import pictures_of_edges, pictures_of_errors, pictures_of_worst
from gfl.analysis.report import Report, edge_table, render_report
from gfl.analysis.tables import tables
from gfl.config.schema import Config
from gfl.evaluation.bootstrap import measure_gain
from gfl.evaluation.coco_eval import evaluate_split
from gfl.structures import Predictions
from tests.support.splits import split_of

CLASSES = ("<b>狗</b> & 🐶", "cat")
OBJECTS = [(1, 3, (5, 5, 40, 40), 0), (2, 3, (10, 10, 30, 30), 0), (2, 7, (60, 60, 30, 30), 0)]
ROWS = np.array(
    [
        [0, 5, 5, 40, 41, 0.9, 0],  # correct
        [0, 60, 60, 20, 20, 0.8, 1],  # of the background
        [1, 10, 10, 30, 30, 0.7, 1],  # the wrong class
    ]
)
EDGE_STD = np.full((3, 4), 2.0)


@pytest.fixture
def scene(tmp_path):
    """A split of three real images, the third without objects."""
    for number in (1, 2, 3):
        pixels = np.random.default_rng(number).integers(0, 255, (99, 99, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg")
    return split_of(OBJECTS, 3, tmp_path, CLASSES)


def test_an_analysis_has_the_figures_of_the_evaluation(scene):
    analysis = analyse(scene, ROWS, EDGE_STD, Config())
    assert analysis.evaluation == evaluate_split(scene, ROWS, Config())
    assert analysis.kinds.tolist() == ["", "Bkg", "Cls"]
    assert analysis.errors.count["Miss"] == 1  # the cat; the dog of image 2 has a wrong class
    assert analysis.confusion.tolist() == [[1, 1, 0], [0, 0, 1], [0, 1, 0]]
    assert analysis.best_f1[CLASSES[0]].score == 0.9
    assert analysis.best_f1["cat"] is None
    assert analysis.edges.error.tolist() == [[0, 0, 0, 1]]
    assert analysis.worst_images[0] == 1  # image 2: nothing is right
    assert analysis.image_f1.tolist() == [pytest.approx(2 / 3), 0, 1]


def test_slices_are_the_evaluations_of_their_images(scene):
    groups = by_object_count(split_of([], 3))
    assert groups == {"no object": [0, 1, 2]}
    chosen = {"weather": {"sun": [0], "rain": [1, 2]}}
    slices = analyse(scene, ROWS, EDGE_STD, Config(), chosen).slices["weather"]
    alone = evaluate_split(split_of(OBJECTS[:1], 1), ROWS[:2], Config()).metrics
    assert slices["sun"]["AP"] == pytest.approx(alone["AP"])
    assert slices["sun"]["images"] == 1
    assert slices["rain"]["AP"] == 0


def test_tables_list_every_error_and_image(scene):
    files = tables(analyse(scene, ROWS, EDGE_STD, Config()), scene)
    errors = list(csv.DictReader(io.StringIO(files["errors.csv"])))
    assert [(row["kind"], row["image_id"], row["class"], row["score"]) for row in errors] == [
        ("Bkg", "1", "cat", "0.8"),
        ("Cls", "2", "cat", "0.7"),
        ("Miss", "2", CLASSES[0], ""),
        ("Miss", "2", "cat", ""),
    ]
    assert [float(errors[0][edge]) for edge in ("left", "top", "right", "bottom")] == [
        60,
        60,
        80,
        80,
    ]
    images = list(csv.DictReader(io.StringIO(files["images.csv"])))
    assert [(row["file"], row["objects"], row["detections"]) for row in images] == [
        ("2.jpg", "2", "1"), ("1.jpg", "1", "2"), ("3.jpg", "0", "0"),
    ]  # fmt: skip
    thresholds = json.loads(files["thresholds.json"])
    assert thresholds[CLASSES[0]] == {"score": 0.9, "precision": 1, "recall": 0.5, "f1": 2 / 3} | {
        "f1": pytest.approx(2 / 3)
    }
    # Four edges promise no more than 4 / 5.
    assert list(json.loads(files["edge_intervals.json"])["sigmas"])[-1] == "0.80"


def test_the_page_shows_names_as_they_are_and_needs_nothing_else(scene, tmp_path):
    analysis = analyse(scene, ROWS, EDGE_STD, Config())
    bins = torch.zeros(1, 4, 8)
    bins[..., 2], bins[..., 5] = 0.6, 0.4
    predictions = Predictions(
        boxes=torch.tensor([[5.0, 5, 45, 45]]), scores=torch.tensor([0.9]),
        labels=torch.tensor([0]), edge_std=torch.ones(1, 4), distributions=bins,
    )  # fmt: skip
    files = render_report(
        Report(
            title="models:/a&b/1",
            facts={"images": "3"},
            classes=CLASSES,
            analysis=analysis,
            errors=pictures_of_errors(analysis, scene, CLASSES),
            worst=pictures_of_worst(analysis, scene, CLASSES),
            edges=pictures_of_edges([tmp_path / "1.jpg"], [predictions], CLASSES),
            other="another",
            gain=measure_gain(scene, ROWS, ROWS[:1], Config(), draws=20),
        )
    )
    page = files["report.html"].decode()
    assert "&lt;b&gt;狗&lt;/b&gt; &amp; 🐶" in page
    assert "<b>狗" not in page
    assert "AP less that of another" in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) > 10
    assert all(source.startswith("data:image/") for source in sources)
    for kind in ("Cls", "Bkg", "Miss"):
        assert f"<h3>{kind}: " in page
    assert "<h3>two peaks</h3>" in page
    assert {name for name in files if name.endswith(".png")} >= {"errors.png", "confusion.png"}


def test_edges_are_told_by_size_and_class(scene):
    report = Report("m", {}, CLASSES, analyse(scene, ROWS, EDGE_STD, Config()), {}, [], {})
    table = edge_table(report)
    assert list(table) == ["all", "medium", CLASSES[0]]
    assert table["all"].edges == 4
    assert table["all"].error == pytest.approx(0.5)
    assert table["all"].sigma == 2
