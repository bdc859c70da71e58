"""The options of training: accumulation, precision, averages, clipping, stopping, compilation."""

from dataclasses import replace
from math import isfinite

import pytest
import torch

import gfl
from gfl.config.loader import ConfigError, derive
from gfl.data.dataset import collate
from gfl.data.split import load_splits
from gfl.structures import pad_targets
from gfl.train.engine import FitOptions, fit
from gfl.train.microbatch import LossModule
from gfl.train.optimizer import build_optimizer, lr_factor, scaled_lr
from gfl.train.trainer import Start, Trainer, _require_device

CPU = torch.device("cpu")
MODELS = {
    "gfl_r50_1x": ("resnet50", 12, (8, 11), None),
    "gfl_r50_ms2x": ("resnet50", 24, (16, 22), None),
    "gfl_r101_ms2x": ("resnet101", 24, (16, 22), None),
    "gfl_r101_dcnv2_ms2x": ("resnet101", 24, (16, 22), (2, (3, 4, 5))),
    "gfl_x101_32x4d_ms2x": ("resnext101_32x4d", 24, (16, 22), None),
    "gfl_x101_32x4d_dcnv2_ms2x": ("resnext101_32x4d", 24, (16, 22), (2, (3, 4, 5))),
    "mmdet_r101_dcnv1_ms2x": ("resnet101", 24, (16, 22), (1, (3, 4, 5))),
    "mmdet_x101_32x4d_dcnv1_ms2x": ("resnext101_32x4d", 24, (16, 22), (1, (4, 5))),
    "gfl_r18_1x": ("resnet18", 12, (8, 11), None),
    "gfl_r34_1x": ("resnet34", 12, (8, 11), None),
}
STEPS_OF_COCO = 7330
"""117 266 images with annotations in batches of 16: steps of the reference's epoch."""


def trainer_of(tiny, *overrides):
    config = derive(type(tiny), tiny, list(overrides))
    trainer = Trainer(config, load_splits(config)[0], CPU)
    trainer.parallel.train()
    return trainer


def batch_of(trainer, step):
    return collate([trainer.dataset[key] for key in trainer.batches.keys(step)])


@pytest.mark.parametrize("name", MODELS)
def test_a_published_configuration_is_the_references_recipe(name):
    backbone, epochs, milestones, deformable = MODELS[name]
    config = gfl.load_config(f"configs/{name}.yaml")
    assert config.model.backbone.name == backbone
    found = config.model.backbone.deformable
    assert (found and (found.version, found.stages)) == deformable
    assert (config.model.num_classes, config.model.channels, config.model.reg_max) == (80, 256, 16)
    assert (config.model.backbone.frozen_stages, config.model.backbone.norm_eval) == (1, True)
    assert (config.schedule.epochs, config.schedule.milestones) == (epochs, milestones)
    assert config.data.multi_scale == ((480, 800) if epochs == 24 else None)
    assert (config.data.short_side, config.data.long_side, config.data.batch) == (800, 1333, 16)
    assert (config.optim.momentum, config.optim.weight_decay) == (0.9, 1e-4)
    assert (config.loss.qfl.beta, config.optim.clip_norm, config.optim.ema) == (2.0, None, None)

    with torch.device("meta"):
        detector = gfl.Detector(config)
    optimizer = build_optimizer(detector, config)
    trainable = [p for p in detector.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trainable)
    ours = not name.startswith("mmdet")
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 0.02 if ours else 0.01]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [1e-4, 0.0 if ours else 1e-4]
    first = 1 / 3 if ours else 0.001
    rates = [lr_factor(step, config.schedule, STEPS_OF_COCO) for step in
             (0, 500, milestones[0] * STEPS_OF_COCO, milestones[1] * STEPS_OF_COCO)]  # fmt: skip
    assert rates == pytest.approx([first, 1, 0.1, 0.01])


def test_offsets_of_deformable_convolutions_keep_the_common_rate():
    config = gfl.load_config("configs/gfl_r101_dcnv2_ms2x.yaml")
    with torch.device("meta"):
        detector = gfl.Detector(config)
    _, biases = build_optimizer(detector, config).param_groups
    names = {id(p): name for name, p in detector.named_parameters()}
    assert not any("conv_offset" in names[id(p)] for p in biases["params"])


def test_the_rate_follows_the_global_batch():
    config = gfl.load_config("configs/gfl_r50_1x.yaml", ["data.batch=4"])
    assert scaled_lr(config) == pytest.approx(0.0025)


def test_passes_add_up_to_the_mean_of_their_gradients(tiny):
    """With BatchNorm in evaluation: its statistics are those of a pass."""
    fixed = ("model.backbone.norm_eval=true", "optim={name: sgd, lr: 0.1, momentum: 0}")
    once, passes = trainer_of(tiny, *fixed), trainer_of(tiny, *fixed, "data.images_per_pass=3")
    batch = batch_of(once, 0)
    expected = torch.zeros(3)
    images = once.detector.normalize(batch.pixels, batch.targets.sizes)
    for start, end in ((0, 3), (3, 6), (6, 8)):
        targets = type(batch.targets)(*(v[start:end] for v in vars(batch.targets).values()))
        losses = once.loss_module(images[start:end], targets) * (end - start) / 8
        losses.sum().backward()
        expected += losses.detach()
    gradients = {name: p.grad.clone() for name, p in once.detector.named_parameters()}
    row = passes.train_step(batch)
    torch.testing.assert_close(row[:3], expected, rtol=1e-5, atol=1e-6)
    for name, parameter in passes.detector.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5)


def test_bfloat16_is_of_the_network_alone(tiny):
    plain, mixed = trainer_of(tiny), trainer_of(tiny, "optim.precision=bfloat16")
    seen = []
    mixed.detector.head.cls_logits.register_forward_hook(lambda *args: seen.extend(args[2]))
    rows = [trainer.train_step(batch_of(trainer, 0)) for trainer in (plain, mixed)]
    assert {level.dtype for level in seen} == {torch.bfloat16}
    assert rows[1].dtype == torch.float32
    torch.testing.assert_close(rows[0][:3], rows[1][:3], rtol=0.02, atol=0.02)
    assert {p.dtype for p in mixed.detector.parameters()} == {torch.float32}


def test_float16_lowers_its_scale_before_it_gives_up(tiny):
    trainer = trainer_of(tiny, "optim.precision=float16")
    batch = batch_of(trainer, 0)

    def step_with(scale):
        trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": scale})
        return trainer.train_step(batch)

    before = {k: v.detach().clone() for k, v in trainer.detector.named_parameters()}
    step_with(2.0**40)
    assert trainer.scaler.get_scale() == 2.0**39
    assert trainer.first_bad_step == -1
    assert all(torch.equal(v, before[k]) for k, v in trainer.detector.named_parameters())
    assert isfinite(step_with(2.0**8)[3])
    assert not torch.equal(trainer.detector.head.cls_logits.bias, before["head.cls_logits.bias"])
    trainer.detector.pixel_std.zero_()  # divides by zero
    step_with(0.5)
    assert trainer.first_bad_step == 2


def test_an_average_follows_the_weights(tiny):
    trainer = trainer_of(tiny, "optim.ema=0.75")
    weight = trainer.detector.head.cls_logits.bias
    expected = weight.detach().clone()
    for step in range(3):
        trainer.train_step(batch_of(trainer, step))
        expected = 0.75 * expected + 0.25 * weight.detach()
    assert trainer.model is not trainer.detector
    torch.testing.assert_close(trainer.model.head.cls_logits.bias.detach(), expected)
    statistics = trainer.model.backbone.bn1.running_mean
    assert not torch.equal(statistics, trainer.detector.backbone.bn1.running_mean)


def test_a_large_gradient_is_scaled_down(tiny):
    overrides = ("optim={name: sgd, lr: 1.0, momentum: 0, weight_decay: 0}", "schedule.name=step",
                 "schedule.warmup_steps=0", "optim.lr_batch=8")  # fmt: skip
    trainer = trainer_of(tiny, *overrides, "optim.clip_norm=0.01")
    before = [p.detach().clone() for p in trainer.detector.parameters()]
    row = trainer.train_step(batch_of(trainer, 0))
    assert row[-1] > 0.01  # what is reported is the norm before
    moved = [
        now.detach() - then for now, then in zip(trainer.detector.parameters(), before, strict=True)
    ]
    assert torch.nn.utils.get_total_norm(moved).item() == pytest.approx(0.01, rel=1e-2)


class Kept:
    """Keeps the checkpoint of an epoch."""

    def __init__(self, folder, epoch=0):
        self.folder, self.epoch, self.epochs = folder, epoch, 0

    def on_steps(self, report):
        pass

    def on_epoch(self, report):
        self.epochs += 1
        if report.epoch == self.epoch:
            self.folder.mkdir()
            report.snapshot().write(self.folder)


def test_training_stops_when_ap_does_not_rise_even_after_a_resumption(tiny, tmp_path):
    still = derive(type(tiny), tiny, ["optim.lr=1e-12", "schedule.epochs=9", "schedule.patience=2"])
    splits = load_splits(still)
    options = FitOptions(CPU, tmp_path / "bad")
    listener = Kept(tmp_path / "two", epoch=2)
    assert fit(still, splits, listener, options).epochs_done == listener.epochs == 3
    again = Kept(tmp_path / "never")
    fit(still, splits, again, replace(options, start=Start(resume=tmp_path / "two")))
    assert again.epochs == 1


def test_norms_over_workers_are_refused_where_they_cannot_run(tiny):
    config = derive(type(tiny), tiny, ["model.backbone.sync_norm=true"])
    _require_device(config, CPU, 1)
    with pytest.raises(ConfigError, match=r"sync_norm: .* GPUs only"):
        _require_device(config, CPU, 2)
    with pytest.raises(ConfigError, match=r"set model\.backbone\.norm_eval=false"):
        derive(type(tiny), config, ["model.backbone.norm_eval=true"])


@pytest.mark.slow
def test_one_compilation_serves_every_size(tiny):
    small = ["model.channels=8", "optim.compile=true", "model.backbone.norm_eval=true"]
    config = derive(type(tiny), tiny, small)
    detector = gfl.Detector(config).train()
    compiled, plain = LossModule(detector, config), LossModule(detector, tiny)
    compiled.compile(backend="aot_eager", fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    for height, width, count in ((288, 320, 3), (320, 288, 2), (416, 448, 7)):
        images = torch.randn(2, 3, height, width, generator=generator)
        corner = torch.rand(2, count, 2, generator=generator) * 200
        boxes = torch.cat([corner, corner + 60], dim=-1)
        labels = torch.zeros(2, count, dtype=torch.long)
        targets = pad_targets(list(boxes), list(labels), torch.tensor([[height, width]] * 2))
        compiled.mark_sizes(images, targets)
        stance = "default" if height == 288 else "fail_on_recompile"
        with torch.compiler.set_stance(stance):
            losses = compiled(images, targets)
        losses.sum().backward()
        torch.testing.assert_close(losses, plain(images, targets))


def test_a_step_is_compiled_where_the_configuration_asks_for_it(tiny, monkeypatch):
    compilations = []
    monkeypatch.setattr(LossModule, "compile", lambda _, **options: compilations.append(options))
    LossModule(gfl.Detector(tiny), tiny)
    assert compilations == []
    config = derive(type(tiny), tiny, ["optim.compile=true"])
    LossModule(gfl.Detector(config), config)
    assert compilations == [{"fullgraph": True}]
