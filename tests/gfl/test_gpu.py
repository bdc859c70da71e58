"""What must hold on a GPU as on a CPU: no host wait, the same figures, not one changed digit."""

from dataclasses import replace

import pytest
import torch

import gfl
from gfl.checkpoint.files import About
from gfl.config.loader import derive
from gfl.data.dataset import collate
from gfl.data.images import list_images
from gfl.data.split import load_splits
from gfl.evaluation.protocol import Variant
from gfl.evaluation.speed import measure_latency, peak_memory
from gfl.export.export import export
from gfl.export.exportable import Form
from gfl.inference.predictor import Model
from gfl.model.detector import folded, place
from gfl.train.engine import FitOptions, fit
from gfl.train.trainer import Start, Trainer
from tests.support.detectors import attentive_detector

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda")
OPTIONS = {
    "sgd": [],
    "adamw": ["optim.name=adamw"],
    "passes": ["optim.ema=0.9", "optim.clip_norm=1.0", "data.images_per_pass=3"],
    "bfloat16": ["optim.precision=bfloat16", "model.quality_predictor={topk: 4, hidden: 8}"],
    "centerness": ["model.edges=dirac", "model.quality=centerness"],
    "float16": ["optim.precision=float16"],
    "deformable": ["model.backbone.deformable={version: 2, stages: [5]}"],
    # As published; with norms of eight images, rounding changes its gradients by a percent.
    "resnet50": [
        "model.backbone={name: resnet50, norm_eval: true}",
        "data={short_side: 256, long_side: 256}",
    ],
}


@pytest.fixture
def exact(monkeypatch):
    """Products in float32 as on a CPU, not in TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def trainer_of(tiny, *overrides, device=GPU):
    config = derive(type(tiny), tiny, list(overrides))
    trainer = Trainer(config, load_splits(config)[0], device)
    trainer.parallel.train()
    return trainer


def batch_of(trainer, step):
    batch = collate([trainer.dataset[key] for key in trainer.batches.keys(step)])
    return batch.pin_memory().to(trainer.device)


@pytest.mark.parametrize("option", OPTIONS)
def test_no_step_waits_for_the_host(tiny, option):
    trainer = trainer_of(tiny, *OPTIONS[option])
    batches = [batch_of(trainer, step) for step in range(3)]
    trainer.train_step(batches[0])  # the first makes the optimizer's state
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows = [trainer.train_step(batch) for batch in batches[1:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(rows).isfinite().all()


@pytest.mark.parametrize("option", ["sgd", "centerness", "resnet50"])
def test_losses_and_gradients_are_those_of_a_cpu(tiny, exact, option):
    trainers = [trainer_of(tiny, *OPTIONS[option], device=d) for d in (torch.device("cpu"), GPU)]
    ours, theirs = (trainer.train_step(batch_of(trainer, 0)).cpu() for trainer in trainers)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    pairs = zip(*(trainer.detector.named_parameters() for trainer in trainers), strict=True)
    for (name, on_cpu), (_, on_gpu) in pairs:
        if on_cpu.grad is not None:
            distance = (on_cpu.grad - on_gpu.grad.cpu()).norm() / on_cpu.grad.norm().clamp(min=1e-6)
            assert distance < 1e-2, name


# torchvision adds up the gradients of deformable convolutions in any order.
@pytest.mark.parametrize("option", [option for option in OPTIONS if option != "deformable"])
def test_steps_do_not_differ_in_one_digit(tiny, option):
    weights = []
    for _ in range(2):
        trainer = trainer_of(tiny, *OPTIONS[option])
        for step in range(4):
            trainer.train_step(batch_of(trainer, step))
        weights.append({k: v.cpu() for k, v in trainer.detector.state_dict().items()})
    assert [k for k in weights[0] if not torch.equal(weights[0][k], weights[1][k])] == []


class Kept:
    """Keeps the checkpoint of an epoch, and AP of all."""

    def __init__(self, folder, epoch=0):
        self.folder, self.epoch, self.ap, self.reports = folder, epoch, [], []

    def on_steps(self, report):
        self.reports.append(report)

    def on_epoch(self, report):
        self.ap.append(report.metrics["AP"])
        if report.epoch == self.epoch:
            self.folder.mkdir()
            report.snapshot().write(self.folder)


def test_a_resumed_training_equals_an_uninterrupted_one_bit_for_bit(tiny, tmp_path):
    config = derive(type(tiny), tiny, ["schedule.epochs=2"])
    splits, options = load_splits(config), FitOptions(GPU, tmp_path / "bad")
    first, second = Kept(tmp_path / "one", epoch=1), Kept(tmp_path)
    whole = fit(config, splits, first, options)
    resumed = fit(config, splits, second, replace(options, start=Start(resume=tmp_path / "one")))
    for key, value in whole.detector.state_dict().items():
        assert torch.equal(value, resumed.detector.state_dict()[key]), key
    assert first.ap[-1] == second.ap[-1]
    figures = first.reports[-1].metrics
    assert figures["step_ms_p50"] > 0
    assert figures["worker0.gpu_memory_gib"] > 0
    assert 0 <= figures["worker0.gpu"] <= 1


def test_detections_are_those_of_a_cpu(tiny, exact):
    torch.manual_seed(0)
    detector = gfl.Detector(derive(type(tiny), tiny, ["postprocess.score_threshold=0.0"])).eval()
    images = torch.randn(2, 3, 256, 320)
    ours = folded(place(detector, GPU)).predict(images.to(GPU))
    theirs = folded(place(detector, torch.device("cpu"))).predict(images)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found.scores.cpu(), expected.scores, rtol=1e-4, atol=1e-5)
        near = torch.cdist(found.boxes.cpu().double(), expected.boxes.double()).amin(dim=1)
        assert near.amax() < 0.01


def test_a_compiled_step_computes_the_same(tiny, exact):
    plain, compiled = trainer_of(tiny), trainer_of(tiny, "optim.compile=true")
    rows = [t.train_step(batch_of(t, 0)) for t in (plain, compiled)]
    torch.testing.assert_close(*rows, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "variant",
    [Variant(), Variant("bfloat16"), Variant("float16", batch=2), Variant(channels_last=False)],
)
def test_every_variant_is_measured(tiny, variant):
    with peak_memory(GPU) as peak:
        seconds, protocol = measure_latency(
            gfl.Detector(tiny), load_splits(tiny)[1], tiny, GPU, variant, 4
        )
    assert len(seconds) == 4 // variant.batch
    assert peak["bytes"] > 0
    assert protocol["cudnn"]["float32"] == "tf32"


def test_a_model_predicts_and_is_exported(tiny, shapes_folder, tmp_path):
    about = About(["rectangle", "ellipse", "triangle"], [1, 2, 3], 0, 0, {})
    model = Model(attentive_detector(tiny), about)
    files = list_images(shapes_folder / "val" / "images")[:2]
    assert len(model.predict(files)) == 2
    figures = export(model, tmp_path / "files", ("onnx",), Form(), files, {})
    assert figures["model.onnx"]["detections"] > 0
