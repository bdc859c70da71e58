"""Average precision: pycocotools' numbers through our pipeline, whatever the number of workers."""

import contextlib
import io
import json

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tests_support import run_workers

import gfl
from gfl.data import load_splits
from gfl.engine import build_evaluation_loader
from gfl.evaluation import STATISTICS, coco_statistics, detect, evaluate, evaluate_detections
from gfl.speed import measure_fps

CPU = torch.device("cpu")


def plain_pycocotools(annotations, detections):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(str(detections)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


@pytest.mark.real_data
def test_the_known_case_gives_its_twelve_numbers(real_data):
    annotations = real_data / "coco_eval" / "instances_val2014_100.json"
    results = real_data / "coco_eval" / "instances_val2014_fakebbox100_results.json"
    detections = json.loads(results.read_text())
    ids = [image["id"] for image in json.loads(annotations.read_text())["images"]]
    found = evaluate_detections(annotations, detections, ids)
    expected = plain_pycocotools(annotations, results)
    assert list(found) == list(STATISTICS)
    for name, number in zip(STATISTICS, expected, strict=True):
        assert found[name] == pytest.approx(number, abs=1e-10), name
    # As COCO's own demo prints them.
    published = [0.505, 0.697, 0.573, 0.586, 0.519, 0.501, 0.387, 0.594, 0.595, 0.640, 0.566, 0.564]
    assert [round(number, 3) for number in found.values()] == published


@pytest.fixture
def splits(tiny):
    return load_splits(tiny)


def perfect(split):
    return [
        {
            "image_id": r.image_id,
            "category_id": split.category_ids[label],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": 0.9,
        }
        for r in split.records
        for (x1, y1, x2, y2), label in zip(r.boxes.tolist(), r.labels.tolist(), strict=True)
    ]


def test_the_ground_truth_itself_is_perfect(splits):
    val = splits[1]
    assert coco_statistics(val, perfect(val))["AP"] == pytest.approx(1.0)


def test_no_detection_at_all_is_zero(splits):
    assert coco_statistics(splits[1], [])["AP"] == 0.0


def test_the_order_of_images_does_not_matter(splits):
    val = splits[1]
    detections = perfect(val)
    for number, detection in enumerate(detections):
        detection["bbox"][0] += number % 5
    # Within an image the order stays: it decides between equal scores.
    turned = sorted(detections, key=lambda d: -d["image_id"])
    assert turned != detections
    assert coco_statistics(val, detections) == coco_statistics(val, turned)


def evaluate_share(rank, config, weights):
    torch.set_num_threads(1)
    detector = gfl.Detector(config)
    gfl.load_weights(detector, weights)
    val = load_splits(config)[1]
    loader = build_evaluation_loader(config, val, CPU)
    return evaluate(detector, val, loader, CPU), len(detect(detector, val, loader, CPU))


def test_two_workers_measure_exactly_what_one_does(tiny, tmp_path):
    torch.manual_seed(3)
    detector = gfl.Detector(tiny)
    detector.head.cls_logits.bias.data.fill_(-2.0)  # so that there is something to find
    torch.save(detector.state_dict(), tmp_path / "w.pth")
    single = run_workers(1, evaluate_share, tiny, tmp_path / "w.pth")
    double = run_workers(2, evaluate_share, tiny, tmp_path / "w.pth")
    assert double[0][0] == double[1][0] == single[0][0]
    assert double[0][1] + double[1][1] == single[0][1] > 100


def test_fps_comes_with_its_protocol(tiny, splits):
    fps, protocol = measure_fps(gfl.Detector(tiny), splits[1], tiny, CPU, images=4)
    assert fps > 0
    assert protocol["images"] == 4
    assert protocol["annotations"] == splits[1].digest
    assert protocol["postprocess"]["nms_iou"] == 0.6
