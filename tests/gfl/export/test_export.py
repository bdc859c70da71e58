"""Exported files do what the detector does, at any size, and say what they are."""

import json

import numpy as np
import onnx
import pytest
import torch
from torchvision.ops import batched_nms

import gfl
from benchmarks import export as benchmark
from gfl.checkpoint.files import About
from gfl.config.loader import derive
from gfl.data.images import list_images
from gfl.data.split import load_splits
from gfl.export import export as export_module
from gfl.export import exportable as exportable_module
from gfl.export.export import _rows, compare, export, open_onnx, open_pt2, quantize
from gfl.export.exportable import METADATA, Exportable, ExportError, Form
from gfl.inference.predictor import Model
from gfl.model.postprocess import decode
from tests.support.detectors import attentive_detector

ABOUT = About(["rectangle", "ellipse", "triangle"], [1, 2, 3], 0, 0, {})
SIZES = [(64, 64), (97, 160), (200, 333)]


def model_of(config):
    return Model(attentive_detector(config), ABOUT, "cpu")


@pytest.fixture(scope="module")
def model(tiny):
    return model_of(tiny)


@pytest.fixture(scope="module")
def files(shapes_folder):
    return list_images(shapes_folder / "val" / "images")


@pytest.fixture(scope="module")
def opened():
    """What runs the files of `exported`, for which .pt2 takes seconds to open."""
    return {}


@pytest.fixture(scope="module")
def exported(model, files, opened, tmp_path_factory):
    def noted(path):
        opened[path.name] = (open_onnx if path.suffix == ".onnx" else open_pt2)(path)
        return opened[path.name]

    folder = tmp_path_factory.mktemp("export") / "files"
    formats, form = ("onnx", "pt2"), Form(True, True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_module, "OPENERS", dict.fromkeys(formats, noted))
        figures = export(model, folder, formats, form, files[:3], {"device": "x"})
    return folder, figures


def images():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 256, (1, 3, *size), generator=generator).float() for size in SIZES]


def test_files_do_what_the_detector_does_at_any_size(model, exported, opened):
    _, figures = exported
    assert opened.keys() == {"model.onnx", "model.pt2"}
    for name, run in opened.items():
        assert figures[name]["detections"] > 0
        difference = compare(model, run, Form(True, True), images())
        assert difference.detections > 50
        assert difference.box_px < 0.01
        boxes, scores, labels, edge_std, distributions = run(images()[0])
        assert (boxes.shape, labels.dtype) == ((100, 4), np.int64)
        there = scores > 0
        np.testing.assert_allclose(distributions[there].sum(-1), 1, atol=1e-5)
        assert (edge_std[there] > 0).all()


def test_an_image_of_nothing_gives_empty_rows(exported, tiny, tmp_path):
    """No score reaches a threshold of 1."""
    folder, _ = exported
    strict = onnx.load(folder / "model.onnx")
    for value in strict.graph.initializer:
        array = onnx.numpy_helper.to_array(value)
        if array.size == 1 and np.isclose(array.item(), tiny.postprocess.score_threshold):
            value.CopyFrom(onnx.numpy_helper.from_array(np.ones_like(array), value.name))
    onnx.save(strict, tmp_path / "strict.onnx")
    run = open_onnx(tmp_path / "strict.onnx")
    assert (run(images()[0])[1] == 0).all()
    model = model_of(derive(type(tiny), tiny, ["postprocess.score_threshold=1.0"]))
    assert compare(model, run, Form(True, True), images()).detections == 0


@pytest.mark.slow
def test_an_export_replaces_older_files_and_warns_where_nothing_is_detected(
    tiny, files, tmp_path, caplog
):
    folder = tmp_path
    quiet = attentive_detector(tiny)
    with torch.no_grad():
        quiet.head.cls_logits.bias.fill_(-20)
    model = Model(quiet, ABOUT, "cpu")
    stale = ("model.pt2", "model.int8.onnx", "model.int8.json")
    (folder / "quiet").mkdir()
    for name in (*stale, "notes.txt"):
        (folder / "quiet" / name).touch()
    export(model, folder / "quiet", ("onnx",), Form(), files[:1], {})
    assert "model.onnx: nothing was detected, so it is hardly checked" in caplog.text
    left = {path.name for path in (folder / "quiet").iterdir()}
    assert left == {"model.onnx", "model.json", "notes.txt"}  # of an earlier model there is none


def test_files_say_what_they_are(exported, tiny):
    folder, _ = exported
    properties = {p.key: p.value for p in onnx.load(folder / "model.onnx").metadata_props}
    extra = {METADATA: ""}
    torch.export.load(folder / "model.pt2", extra_files=extra)
    about = json.loads(extra[METADATA])
    for metadata in (about, {k: json.loads(v) for k, v in properties.items() if k in ("classes",)}):
        assert metadata["classes"] == ABOUT.classes
    assert about["postprocess"] == tiny.postprocess.model_dump(mode="json")
    assert (about["short_side"], about["protocol"]) == (64, {"device": "x"})
    assert list(about["outputs"]) == ["boxes", "scores", "labels", "edge_std", "distributions"]
    assert json.loads((folder / "model.json").read_text())["parity"].keys() == {
        "model.onnx", "model.pt2"
    }  # fmt: skip


@pytest.mark.slow
def test_without_nms_every_location_is_an_output(model, files, tmp_path):
    form = Form(with_nms=False)
    export(model, tmp_path / "raw", ("onnx",), form, files[:2], {})
    run = open_onnx(tmp_path / "raw" / "model.onnx")
    boxes, scores = run(torch.randint(0, 256, (3, 3, 64, 96)).float())  # any batch
    assert boxes.shape == (3, scores.shape[1], 4)
    assert scores.shape[2] == 3
    assert compare(model, run, form, images()).box_px < 0.01
    image = images()[0]
    boxes, scores = (torch.from_numpy(output[0]) for output in run(image))
    location, label = (scores > model.config.postprocess.score_threshold).nonzero().unbind(1)
    boxes, scores = boxes[location], scores[location, label]
    keep = batched_nms(boxes, scores, label, model.config.postprocess.nms_iou)[:100]
    (detections,) = model.predict(image[0].byte())
    torch.testing.assert_close(boxes[keep], detections.boxes, atol=0.01, rtol=0)
    torch.testing.assert_close(scores[keep], detections.scores, atol=1e-4, rtol=0)


def test_int8_states_what_it_costs(model, exported, tiny, files):
    folder, _ = exported
    progress = []
    split = load_splits(tiny)[1]
    figures = quantize(model, folder, files[:4], split, lambda *done: progress.append(done))
    assert progress == [(done, 22) for done in range(1, 23)]
    assert {"float32 AP", "int8 AP"} <= figures.keys()
    assert json.loads((folder / "model.int8.json").read_text()) == figures
    assert (folder / "model.int8.onnx").stat().st_size < (folder / "model.onnx").stat().st_size


def test_a_file_is_measured_by_tiles_like_its_model(exported, opened, tiny):
    config = derive(type(tiny), tiny, ["data.tiles={size: 40, overlap: 16}"])
    model, split = model_of(config), load_splits(config)[1]
    for record, rows in zip(split.records[:3], _rows(model, opened["model.onnx"], split)):  # noqa: B905
        (expected,) = model.predict(record.path)
        assert len(rows) == len(expected) > 20
        np.testing.assert_allclose(rows[:, 1:3], expected.boxes[:, :2], rtol=0, atol=0.01)
        np.testing.assert_allclose(rows[:, 5], expected.scores, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_file_that_does_something_else_is_not_published(model, files, tmp_path, monkeypatch):
    def wrong(path):
        run = open_pt2(path)
        return lambda image: [output + np.float32(1) for output in run(image)[:2]]

    monkeypatch.setitem(export_module.OPENERS, "pt2", wrong)
    with pytest.raises(ExportError, match="boxes differ by up to 1 px and scores by 1"):
        export(model, tmp_path / "f", ("pt2",), Form(False), files[:1], {})
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_decodes_wrongly_is_found_without_nms(model, monkeypatch):
    form = Form(with_nms=False, distributions=True)

    def run(image):
        with torch.no_grad():
            return [output.numpy() for output in Exportable(model.detector, form)(image)]

    assert compare(model, run, form, images()).box_px < 0.01

    def shifted(*location):
        boxes, edge_std, distributions = decode(*location)
        return boxes + 1, edge_std, distributions

    monkeypatch.setattr(exportable_module, "decode", shifted)
    with pytest.raises(ExportError, match=r"boxes differ by up to 1 px and scores by .*e-"):
        compare(model, run, form, images())


def test_the_benchmark_times_what_the_model_does(model, monkeypatch):
    timed = []

    def eager(detector, image):
        timed.append((detector, *plain(detector, image)))

    plain = benchmark.eager
    monkeypatch.setattr(benchmark, "ROUNDS", 1)
    monkeypatch.setattr(benchmark, "eager", eager)
    image = torch.randint(0, 256, (3, 64, 40), dtype=torch.uint8)  # 40 is no multiple of 32
    benchmark.compare(model, lambda _: None, [image.float().unsqueeze(0)])
    ((detector, detections),) = timed
    (expected,) = model.predict(image)
    torch.testing.assert_close(detections.boxes, expected.boxes, atol=1e-3, rtol=0)
    norms = [m for m in detector.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms == []


def test_what_cannot_be_exported_is_said(tiny):
    centerness = derive(type(tiny), tiny, ["model.quality=centerness"])
    with pytest.raises(ExportError, match=r"model\.quality is 'centerness': only 'joint'"):
        Exportable(gfl.Detector(centerness), Form())
    dirac = derive(type(tiny), tiny, ["model.edges=dirac"])
    with pytest.raises(
        ExportError, match=r"model\.edges is 'dirac', which learns no distributions"
    ):
        Exportable(gfl.Detector(dirac), Form(distributions=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gfl_r50_1x", "gflv2_r50_1x", "gfl_r18_1x"])
@pytest.mark.parametrize("with_nms", [True, False])
def test_published_models_are_exported(name, with_nms, files, tmp_path):
    config = gfl.load_config(f"configs/{name}.yaml", ["data.short_side=160", "data.long_side=256"])
    form = Form(with_nms)
    parity = export(model_of(config), tmp_path / "f", ("onnx", "pt2"), form, files[:2], {})
    assert parity.keys() == {"model.onnx", "model.pt2"}
    assert all(figures["box_px"] < 0.01 for figures in parity.values())
