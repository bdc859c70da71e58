"""Average precision: pycocotools' numbers through our pipeline, whatever the number of workers."""

import contextlib
import copy
import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import gfl
from gfl.checkpoint.files import About
from gfl.config.loader import derive
from gfl.data.split import load_splits
from gfl.evaluation.coco_eval import evaluate_detections, evaluate_split, format_statistic
from gfl.evaluation.evaluator import detect, evaluate, gather
from gfl.evaluation.speed import measure_fps
from gfl.inference.predictor import Model
from gfl.train.engine import build_evaluation_loader
from tests.support.detections import as_rows, rows_on
from tests.support.detectors import attentive_detector
from tests.support.processes import run_workers

CPU = torch.device("cpu")
NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


def plain_pycocotools(truth, rows, ids):
    """Return the twelve statistics as pycocotools computes and orders them, without our code."""
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = copy.deepcopy(truth)  # it writes into the annotations
        known.createIndex()
        evaluation = COCOeval(known, known.loadRes(rows), "bbox")
        evaluation.params.imgIds = ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def evaluate_both(truth, rows, ids, limits=(1, 10, 100)):
    """Return the evaluation that hotcoco and pycocotools agree on."""
    fast = evaluate_detections(truth, rows, ids, limits)
    referee = evaluate_detections(truth, rows, ids, limits, official=True)
    for part, figures in vars(fast).items():
        expected = getattr(referee, part)
        assert list(figures) == list(expected)
        assert figures == pytest.approx(expected, rel=0, abs=1e-12), part
    return fast


@pytest.mark.real_data
def test_the_known_case_gives_its_twelve_numbers(real_data):
    annotations = real_data / "coco_eval" / "instances_val2014_100.json"
    results = real_data / "coco_eval" / "instances_val2014_fakebbox100_results.json"
    truth, rows = json.loads(annotations.read_text()), as_rows(json.loads(results.read_text()))
    ids = [image["id"] for image in truth["images"]]
    evaluation = evaluate_both(annotations, rows, ids)
    expected = plain_pycocotools(truth, rows, ids)
    assert list(evaluation.metrics) == NAMES
    assert list(evaluation.metrics.values()) == pytest.approx(expected, rel=0, abs=1e-12)
    # As COCO's own demo prints them.
    published = [0.505, 0.697, 0.573, 0.586, 0.519, 0.501, 0.387, 0.594, 0.595, 0.640, 0.566, 0.564]
    assert [round(number, 3) for number in evaluation.metrics.values()] == published
    assert evaluation == evaluate_detections(truth, rows, ids)  # a file, or what is in it
    measured = [ap for ap in evaluation.ap_by_class.values() if ap >= 0]
    assert np.mean(measured) == pytest.approx(evaluation.metrics["AP"])
    assert np.mean(list(evaluation.ap_by_iou.values())) == pytest.approx(evaluation.metrics["AP"])
    assert evaluation.ap_by_iou["0.75"] == evaluation.metrics["AP75"]


def dataset(annotations, images=2):
    """Return a COCO dataset of the classes a, b, c from (image, class, box, further fields)."""
    complete = [
        {"id": n, "image_id": image, "category_id": kind, "bbox": [*box], "iscrowd": 0,
         "area": box[2] * box[3], **further}
        for n, (image, kind, box, further) in enumerate(annotations, start=1)
    ]  # fmt: skip
    return {
        "images": [{"id": n, "file_name": f"{n}.jpg"} for n in range(1, images + 1)],
        "annotations": complete,
        "categories": [{"id": n, "name": name} for n, name in enumerate("abc", start=1)],
    }


def detections(*entries):
    """Return rows from (image, class, box, score)."""
    return np.array([[i, *box, score, kind] for i, kind, box, score in entries]).reshape(-1, 7)


A, B, HUGE = (10.0, 10.0, 20.0, 20.0), (50.0, 10.0, 40.0, 40.0), (0.0, 0.0, 200.0, 200.0)
"""Small, medium and large, with nothing or all in common."""


def test_a_crowd_takes_any_number_of_detections_and_counts_for_nothing():
    truth = dataset([(1, 1, A, {}), (1, 1, HUGE, {"iscrowd": 1})])
    rows = detections((1, 1, B, 0.9), (1, 1, (60.0, 60.0, 20.0, 20.0), 0.8), (1, 1, A, 0.7))
    assert evaluate_both(truth, rows, [1, 2]).metrics["AP"] == pytest.approx(1.0)


def test_what_is_of_another_size_is_ignored():
    truth = dataset([(1, 1, A, {}), (1, 1, B, {})])
    metrics = evaluate_both(truth, detections((1, 1, B, 0.9), (1, 1, HUGE, 0.8)), [1]).metrics
    assert (metrics["APs"], metrics["APm"], metrics["APl"]) == pytest.approx((0.0, 1.0, -1.0))
    assert (metrics["ARs"], metrics["ARm"], metrics["ARl"]) == (0.0, 1.0, -1.0)


def test_a_class_without_ground_truth_has_no_ap_and_one_without_detections_has_none():
    truth = dataset([(1, 1, A, {}), (2, 3, B, {})])
    evaluation = evaluate_both(truth, detections((1, 1, A, 0.9), (1, 2, B, 0.8)), [1, 2])
    assert evaluation.ap_by_class == pytest.approx({"a": 1.0, "b": -1.0, "c": 0.0})
    assert evaluation.metrics["AP"] == pytest.approx(0.5)


def test_without_any_detection_all_is_zero_and_without_ground_truth_undefined():
    assert evaluate_both(dataset([(1, 1, A, {})]), detections(), [1, 2]).metrics["AP"] == 0
    nothing = evaluate_both(dataset([]), detections((1, 1, A, 0.9)), [1, 2])
    assert set(nothing.metrics.values()) == {-1.0}
    unannotated = {key: value for key, value in dataset([]).items() if key != "annotations"}
    assert evaluate_both(unannotated, detections((1, 1, A, 0.9)), [1, 2]) == nothing


def test_a_statistic_without_ground_truth_is_shown_as_a_dash():
    truth = dataset([(1, 1, A, {}), (1, 1, B, {})])
    metrics = evaluate_both(truth, detections((1, 1, B, 0.9)), [1]).metrics
    shown = [format_statistic(metrics[f"AP{size}"]) for size in "sml"]
    assert shown == ["0.0000", "1.0000", "-"]
    assert format_statistic(0.12345678, ".6g") == "0.123457"


def test_between_equal_scores_the_smaller_image_id_and_the_earlier_row_go_first():
    truth = dataset([(1, 1, A, {}), (2, 1, A, {})])
    right, wrong = (1, 1, A, 0.5), (2, 1, B, 0.5)
    first = evaluate_both(truth, detections(wrong, right), [2, 1])
    assert first == evaluate_both(truth, detections(right, wrong), [1, 2])
    assert first.metrics["AP50"] == pytest.approx(51 / 101)  # precision 1 up to half the recall
    for rows, ap in (
        (detections((1, 1, A, 0.5), (1, 1, B, 0.5)), 1.0),
        (detections((1, 1, B, 0.5), (1, 1, A, 0.5)), 0.5),
    ):
        assert evaluate_both(truth, rows, [1]).metrics["AP"] == pytest.approx(ap)


def test_the_limits_on_detections_give_recall_its_names_and_the_largest_is_that_of_ap():
    truth = dataset([(1, 1, A, {}), (1, 1, B, {}), (1, 1, HUGE, {})])
    rows = detections((1, 1, A, 0.9), (1, 1, B, 0.8), (1, 1, HUGE, 0.7))
    metrics = evaluate_both(truth, rows, [1], (2, 1)).metrics
    assert list(metrics) == [*NAMES[:6], "AR1", "AR2", *NAMES[9:]]
    assert (metrics["AR1"], metrics["AR2"]) == pytest.approx((1 / 3, 2 / 3))
    assert metrics["AP"] == pytest.approx(67 / 101)
    crowded = detections(*[(1, 1, B, 0.9)] * 100, (1, 1, A, 0.8))
    assert evaluate_both(truth, crowded, [1]).metrics["ARs"] == 0
    assert evaluate_both(truth, crowded, [1], (1, 10, 101)).metrics["ARs"] == 1


def test_only_the_images_named_count():
    truth = dataset([(1, 1, A, {}), (2, 1, A, {}), (3, 1, A, {})], images=3)
    rows = detections((1, 1, A, 0.9), (2, 1, B, 0.95), (3, 1, A, 0.5))
    assert evaluate_both(truth, rows, [3, 1]).metrics["AP"] == pytest.approx(1.0)
    assert evaluate_both(truth, rows, [1, 2, 3]).metrics["AP"] < 0.7


def test_what_only_one_of_the_evaluators_would_accept_is_evaluated_by_both():
    odd = {"id": 0, "segmentation": {"a": 1}, "area": None, "iscrowd": None}
    truth = dataset([(1, 1, A, odd), (1, 1, B, {})])
    truth["images"][0]["width"] = 3.5
    del truth["annotations"][1]["area"], truth["annotations"][1]["iscrowd"]
    before = copy.deepcopy(truth)
    evaluation = evaluate_both(truth, detections((1, 1, A, 0.9), (1, 1, B, 0.8)), [1])
    assert evaluation.metrics["AP"] == pytest.approx(1.0)
    assert truth == before


images, kinds = st.integers(1, 3), st.integers(1, 3)
sides = st.sampled_from([5.0, 30.0, 33.0, 64.0, 100.0])  # around the limits of the sizes
boxes = st.tuples(st.sampled_from([0.0, 2.0, 40.0]), st.sampled_from([0.0, 3.0]), sides, sides)
further = st.fixed_dictionaries(
    {"iscrowd": st.sampled_from([0, 0, 0, 1]), "area": st.sampled_from([20.0, 1023.9, 1024.0, 1e4])}
)


@settings(max_examples=100)
@given(
    st.lists(st.tuples(images, kinds, boxes, further), max_size=15),
    st.lists(st.tuples(images, kinds, boxes, st.integers(1, 4)), min_size=1, max_size=30),
    st.lists(images, min_size=1, unique=True),
    st.sampled_from([(1, 10, 100), (1, 2, 3), (5,), (2, 2)]),
)
def test_hotcoco_and_pycocotools_agree(annotations, entries, ids, limits):
    truth, rows = dataset(annotations, images=3), detections(*entries)
    evaluate_both(truth, rows, ids, limits)
    ours = evaluate_detections(truth, rows, ids).metrics
    expected = plain_pycocotools(truth, rows, ids)
    assert list(ours.values()) == pytest.approx(expected, rel=0, abs=1e-12)


@pytest.fixture
def splits(tiny):
    return load_splits(tiny)


def perfect(split):
    return rows_on(
        split,
        (
            {
                "image_id": r.image_id,
                "category_id": split.category_ids[label],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": 0.9,
            }
            for r in split.records
            for (x1, y1, x2, y2), label in zip(r.boxes.tolist(), r.labels.tolist(), strict=True)
        ),
    )


def test_the_ground_truth_itself_is_perfect_with_the_limits_of_the_configuration(splits, tiny):
    val = splits[1]
    config = derive(type(tiny), tiny, ["evaluation.max_detections=[1, 50]"])
    metrics = evaluate_split(val, perfect(val), config).metrics
    assert metrics["AP"] == metrics["AR50"] == pytest.approx(1.0)


def evaluate_share(rank, configs, weights):
    torch.set_num_threads(1)
    results = []
    for config in configs:
        detector = gfl.Detector(config)
        gfl.load_weights(detector, weights)
        val = load_splits(config)[1]
        loader = build_evaluation_loader(config, val, CPU)
        rows = gather(detect(detector, val, loader, CPU))
        results.append((evaluate(detector, val, loader, CPU), rows))
    return results


def test_two_workers_measure_exactly_what_one_does(tiny, tmp_path):
    tiled = derive(type(tiny), tiny, ["data.tiles={size: 40, overlap: 16}"])
    torch.manual_seed(3)
    detector = gfl.Detector(tiny)
    detector.head.cls_logits.bias.data.fill_(-2.0)  # so that there is something to find
    torch.save(detector.state_dict(), tmp_path / "w.pth")
    threads = torch.get_num_threads()
    expected = evaluate_share(0, [tiny, tiled], tmp_path / "w.pth")
    torch.set_num_threads(threads)
    shares = run_workers(2, evaluate_share, [tiny, tiled], tmp_path / "w.pth")
    for (metrics, detections), first, second in zip(expected, *shares, strict=True):
        assert first[0] == second[0] == metrics
        assert second[1] is None
        assert np.array_equal(first[1], detections)
        assert len(detections) > 100


def test_tiles_are_evaluated_as_predicted_on_whole_images(tiny, splits):
    config = derive(type(tiny), tiny, ["data.tiles={size: 40, overlap: 16}"])
    detector, val = attentive_detector(config), splits[1]
    rows = detect(detector, val, build_evaluation_loader(config, val, CPU), CPU)
    model = Model(detector, About(val.classes, val.category_ids, 0, 0, {}), CPU)
    for image, (record, number) in enumerate(zip(val.records, val.numbers, strict=True)):
        (expected,) = model.predict(record.path, batch=3)
        of_image = rows[rows[:, 0] == number]
        assert len(of_image) == len(expected) > 20, image
        boxes = expected.boxes.numpy()
        np.testing.assert_allclose(of_image[:, 1:3], boxes[:, :2], rtol=0, atol=1e-3)
        np.testing.assert_allclose(of_image[:, 5], expected.scores, rtol=0, atol=1e-5)
    assert len(evaluate_split(val, rows, config).ap_by_class) == 3


def test_fps_of_tiles_has_another_protocol(tiny, splits):
    config = derive(type(tiny), tiny, ["data.tiles={size: 40, overlap: 16}"])
    _, protocol = measure_fps(gfl.Detector(config), splits[1], config, CPU, images=4)
    assert protocol["tiles"] == {"size": 40, "overlap": 16}


def test_fps_comes_with_its_protocol(tiny, splits):
    fps, protocol = measure_fps(gfl.Detector(tiny), splits[1], tiny, CPU, images=4)
    assert fps > 0
    assert protocol["images"] == 4
    assert protocol["annotations"] == splits[1].digest
    assert protocol["postprocess"]["nms_iou"] == 0.6
