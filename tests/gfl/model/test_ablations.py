"""What the paper compares with: edges as plain distances, centerness in place of joint scores."""

import numpy as np
import pytest
import torch

import gfl
from gfl.checkpoint.files import About
from gfl.checkpoint.snapshot import load_checkpoint, take_snapshot
from gfl.checkpoint.state_dict import infer_model
from gfl.config.loader import ConfigError, derive
from gfl.config.schema import ModelConfig
from gfl.data.split import load_splits
from gfl.inspection.findings import find_cheaply
from gfl.inspection.regression_range import measure_regression_range
from gfl.model.boxes import grid_points, ltrb_centerness
from gfl.model.criterion import loss_names
from gfl.model.head import LARGEST_LOG_DISTANCE, Dirac
from gfl.model.losses import focal_loss
from gfl.model.postprocess import postprocess
from gfl.structures import pad_targets
from gfl.train.microbatch import LossModule
from tests.support.detectors import learn_one_batch_by_heart, level_sizes
from tests.support.loop_reference import losses as loop_losses

CPU = torch.device("cpu")
TABLE_3 = [(e, q) for e in ("dirac", "distribution") for q in ("centerness", "joint")]
BOXES = [
    torch.tensor([[4.0, 6, 60, 58], [30, 20, 50, 44], [40, 2, 62, 18]]),
    torch.zeros(0, 4),
    torch.tensor([[10.0, 12, 44, 40]]),
]
LABELS = [torch.tensor([0, 2, 1]), torch.zeros(0, dtype=torch.long), torch.tensor([1])]


def option(edges, quality):
    return [f"model.edges={edges}", f"model.quality={quality}"]


@pytest.fixture(params=TABLE_3, ids="-".join)
def config(request, tiny):
    weights = [f"loss.{name}.weight={w}" for name, w in
               (("qfl", 0.7), ("focal", 0.5), ("centerness", 1.5), ("dfl", 0.3))]  # fmt: skip
    return derive(type(tiny), tiny, [*option(*request.param), *weights])


@pytest.fixture
def detector(config):
    torch.manual_seed(0)
    return gfl.Detector(config).train()


def maps_of(flat, size):
    """Return (B, P, channels) as the maps of levels that a head gives."""
    shapes = level_sizes(size, size)
    parts = flat.split([h * w for h, w in shapes], dim=1)
    return [part.transpose(1, 2).unflatten(2, hw) for part, hw in zip(parts, shapes, strict=True)]


def random_outputs(model, images, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = sum(h * w for h, w in level_sizes(size, size))
    channels = [model.num_classes, 4 * model.bins, *([1] if model.quality != "joint" else [])]
    return [torch.randn(images, count, c, generator=generator) for c in channels]


def test_losses_are_those_of_plain_loops(config, detector):
    flat = random_outputs(config.model, 3, 64)
    targets = pad_targets(BOXES, LABELS, torch.tensor([[64, 64]] * 3))
    found = detector.criterion.losses(tuple(maps_of(f, 64) for f in flat), targets)
    boxes, labels = ([t.tolist() for t in truths] for truths in (BOXES, LABELS))
    expected, _ = loop_losses(flat, boxes, labels, 64, config)
    assert tuple(found) == loss_names(config.model) == LossModule(detector, config).names
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, 1e-5)


@pytest.mark.parametrize("objects", [True, False])
def test_every_parameter_gets_a_finite_gradient(detector, objects):
    images = torch.randn(3, 3, 64, 64)
    boxes = BOXES if objects else [BOXES[1]] * 3
    labels = LABELS if objects else [LABELS[1]] * 3
    losses = detector.losses(images, boxes, labels)
    if not objects:
        assert all(losses[n].item() == 0 for n in ("giou", "dfl", "centerness") if n in losses)
    sum(losses.values()).backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert not objects or "scales" in name or parameter.grad.abs().sum() > 0, name


def test_workers_average_both_normalizers_in_one_all_reduce(config, detector, monkeypatch):
    """Two that see the same have the losses of one, above the floor of the summed weights."""
    flat = random_outputs(config.model, 3, 64)
    outputs = tuple(maps_of(f, 64) for f in flat)
    targets = pad_targets(BOXES, LABELS, torch.tensor([[64, 64]] * 3))
    alone = detector.criterion.losses(outputs, targets)
    calls = []

    def all_reduce(values):
        calls.append(values.shape)
        values.mul_(2)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    shared = detector.criterion.losses(outputs, targets)
    assert calls == [(2,)]
    for name, loss in alone.items():
        torch.testing.assert_close(shared[name], loss)


def test_a_step_compiles_as_one_graph(config, detector):
    loss_module = LossModule(detector, config)
    compiled = torch.compile(loss_module.forward, fullgraph=True, backend="eager")
    targets = pad_targets(BOXES, LABELS, torch.tensor([[64, 64]] * 3))
    images = torch.randn(3, 3, 64, 64)
    detector.eval()  # BatchNorm as in its first call
    torch.testing.assert_close(compiled(images, targets), loss_module.forward(images, targets))


def test_losses_are_float32_in_mixed_precision(config, detector):
    mixed = derive(type(config), config, ["optim.precision=bfloat16"])
    targets = pad_targets(BOXES, LABELS, torch.tensor([[64, 64]] * 3))
    images = torch.randn(3, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    detector.eval()
    low = LossModule(detector, mixed)(images, targets)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, LossModule(detector, config)(images, targets), rtol=0.1, atol=0)


def test_a_checkpoint_comes_back_and_is_not_exported(config, detector, tmp_path):
    about = About(["ellipse", "rectangle", "triangle"], [1, 2, 3], 0, 0, {})
    take_snapshot(detector, config, about, {}).write(tmp_path)
    loaded, _ = load_checkpoint(tmp_path)
    for key, value in detector.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key
    found = infer_model(detector.state_dict())
    assert (found.edges, found.quality) == (config.model.edges, config.model.quality)
    if (found.edges, found.quality) != ("distribution", "joint"):
        with pytest.raises(ValueError, match=f"edges is {found.edges!r}, model.quality is"):
            gfl.export_mmdet(detector)


def test_one_batch_can_be_learned_by_heart(tiny):
    torch.manual_seed(0)
    detector = gfl.Detector(derive(type(tiny), tiny, option("dirac", "centerness"))).train()
    for found in learn_one_batch_by_heart(detector):
        assert torch.equal(found.distributions, torch.ones(len(found), 4, 1))
        assert torch.equal(found.edge_std, torch.zeros(len(found), 4))


@pytest.fixture(scope="module")
def reference(golden):
    numbers = np.load(golden / "atss_head.npz")
    return {key: torch.from_numpy(np.asarray(value)) for key, value in numbers.items()}


@pytest.fixture
def atss(tiny):
    return gfl.Detector(derive(type(tiny), tiny, option("dirac", "centerness")))


def test_losses_of_the_baseline_are_those_of_the_reference(reference, atss):
    flat = [reference[name].requires_grad_() for name in ("cls", "reg", "centerness")]
    boxes, labels = ([reference[f"{what}{i}"] for i in range(3)] for what in ("boxes", "labels"))
    targets = pad_targets(boxes, labels, torch.tensor([[128, 128]] * 3))
    losses = atss.criterion.losses(tuple(maps_of(f, 128) for f in flat), targets)
    for ours, theirs in (("focal", "cls"), ("giou", "bbox"), ("centerness", "centerness")):
        torch.testing.assert_close(losses[ours], reference[f"loss_{theirs}"], rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(sum(losses.values()), flat)
    for name, gradient in zip(("cls", "reg", "centerness"), gradients, strict=True):
        torch.testing.assert_close(gradient, reference[f"grad_{name}"], rtol=1e-4, atol=1e-7)


def test_detections_of_the_baseline_are_those_of_the_reference(reference, atss):
    counts = [h * w for h, w in level_sizes(128, 128)]
    cls, reg, centerness = (
        reference[name].detach().split(counts, dim=1) for name in ("cls", "reg", "centerness")
    )
    points, size = grid_points(level_sizes(128, 128), CPU), torch.tensor([[128, 128]] * 3)
    found = postprocess(cls, reg, points, Dirac(), size, size, atss.config.postprocess, centerness)
    for image, predictions in enumerate(found):
        torch.testing.assert_close(predictions.scores, reference[f"pred_scores{image}"])
        torch.testing.assert_close(predictions.labels, reference[f"pred_labels{image}"])
        torch.testing.assert_close(
            predictions.boxes, reference[f"pred_boxes{image}"], rtol=1e-5, atol=1e-4
        )


def test_focal_loss_is_the_references_and_its_equation(reference):
    logits, target = reference["focal_logits"].requires_grad_(), reference["focal_target"]
    loss = focal_loss(logits, target)
    torch.testing.assert_close(loss, reference["focal_loss"], rtol=1e-6, atol=1e-7)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(gradient, reference["focal_grad"], rtol=1e-5, atol=1e-7)
    p = logits.detach().double()[1:].sigmoid()  # the first row saturates
    p_t = torch.where(target[1:] == 1, p, 1 - p)
    alpha = torch.where(target[1:] == 1, 0.25, 0.75)
    expected = -alpha * (1 - p_t) ** 2 * p_t.log()
    torch.testing.assert_close(loss[1:].double(), expected, rtol=1e-4, atol=1e-7)


def test_centerness_is_1_at_the_centre_and_0_outside():
    ltrb = torch.tensor(
        [[3.0, 2, 3, 2], [1, 2, 4, 2], [1, 1, 4, 9], [0, 1, 1, 1], [-1, 2, 5, 2], [-1, -2, -3, -4]]
    )
    expected = torch.tensor([1, 0.5, 1 / 6, 0, 0, 0])
    torch.testing.assert_close(ltrb_centerness(ltrb), expected)
    torch.testing.assert_close(ltrb_centerness(ltrb * 7), expected)


def test_plain_distances_are_finite_in_any_precision():
    logits = torch.tensor([[-3e38, -65504.0, 0.0, 65504.0], [88.0, 89.0, 2.5, 3e38]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        low = logits.clamp(-65504, 65504).to(dtype).requires_grad_()
        distance = Dirac()(low)
        distance.sum().backward()
        assert distance.dtype == torch.float32
        assert distance.max().item() == pytest.approx(np.exp(LARGEST_LOG_DISTANCE))
        assert low.grad.isfinite().all()
    assert Dirac()(torch.tensor([2.5])).item() == pytest.approx(np.exp(2.5))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.edges=dirac", "model.quality_predictor={}"], "not dirac and joint"),
        (["model.quality=centerness", "model.quality_predictor={}"], "distribution and centerness"),
        (["model.edges=dirac", "loss.distillation={teacher: a}"], r"loss\.distillation: .*dirac"),
    ],
)
def test_what_needs_a_distribution_or_joint_scores_is_refused(tiny, overrides, message):
    with pytest.raises(ConfigError, match=message):
        derive(type(tiny), tiny, overrides)


def test_weights_of_another_kind_of_edge_or_quality_are_named(tiny):
    plain = gfl.Detector(tiny)
    other = gfl.Detector(derive(type(tiny), tiny, option("dirac", "centerness")))
    with pytest.raises(ValueError, match=r"edges distribution, .*has dirac; .*quality joint, "):
        gfl.load_weights(other, plain.state_dict())


def test_a_teacher_without_distributions_is_refused(tiny):
    master = gfl.Detector(derive(type(tiny), tiny, ["model.edges=dirac"]))
    student = derive(type(tiny), tiny, ["loss.distillation={teacher: a}"])
    with pytest.raises(ValueError, match=r"teacher: model\.edges is dirac in the teacher"):
        LossModule(gfl.Detector(student), student, master)


def test_plain_distances_reach_every_edge(tiny):
    short = derive(type(tiny), tiny, ["model.reg_max=1"])
    plain = derive(type(tiny), short, ["model.edges=dirac"])
    train = load_splits(short)[0]
    beyond = "beyond the regression range"
    assert [f for f in find_cheaply(short, train, train) if beyond in f.what]
    assert not [f for f in find_cheaply(plain, train, train) if beyond in f.what]
    measured = measure_regression_range(train.records, plain, 64)
    assert (measured.clipped_objects, measured.total.clipped, measured.total.share) == (0, 0, 0)


def test_the_defaults_are_the_papers_model():
    model = ModelConfig()
    assert (model.edges, model.quality, model.bins) == ("distribution", "joint", 17)
    assert loss_names(model) == ("qfl", "giou", "dfl")
