"""What the detector and its training step promise."""

import pytest
import torch

import gfl
from benchmarks.counting import Counts
from gfl.config.loader import derive
from gfl.data.dataset import collate
from gfl.data.split import load_splits
from gfl.model.criterion import loss_names
from gfl.structures import pad_targets
from gfl.train.trainer import Trainer
from tests.support.detectors import learn_one_batch_by_heart


@pytest.fixture
def small(tiny):
    torch.manual_seed(0)
    return gfl.Detector(tiny).train()


def batch_of(counts, size=64, classes=3):
    generator = torch.Generator().manual_seed(0)
    boxes, labels = [], []
    for count in counts:
        corner = torch.rand(count, 2, generator=generator) * (size - 20)
        boxes.append(
            torch.cat([corner, corner + 4 + torch.rand(count, 2, generator=generator) * 16], 1)
        )
        labels.append(torch.randint(0, classes, (count,), generator=generator))
    return torch.randn(len(counts), 3, size, size, generator=generator), boxes, labels


@pytest.mark.parametrize("objects", [0, 1, 100])
def test_the_training_step_never_waits_for_the_host(small, objects):
    images, boxes, labels = batch_of([objects, objects])
    with Counts() as counts:
        losses = small.losses(images, boxes, labels)
        sum(losses.values()).backward()
    assert counts.waits == []
    assert counts.operations > 100


@pytest.mark.parametrize(
    "options",
    [
        ["optim.name=sgd"],
        ["optim.name=adamw"],
        ["optim.ema=0.9", "optim.clip_norm=1.0", "data.images_per_pass=3"],
        ["optim.precision=bfloat16", "model.quality_predictor={topk: 4, hidden: 8}"],
        ["model.edges=dirac", "model.quality=centerness"],
        ["optim.precision=float16", "model.backbone.deformable={version: 2, stages: [5]}"],
    ],
)
def test_the_whole_step_of_the_trainer_never_waits_either(tiny, options):
    config = derive(type(tiny), tiny, options)
    trainer = Trainer(config, load_splits(config)[0], torch.device("cpu"))
    trainer.loss_module.train()
    batches = [collate([trainer.dataset[k] for k in trainer.batches.keys(step)]) for step in (0, 1)]
    trainer.train_step(batches[0])  # the first makes the optimizer's state
    with Counts() as counts:
        trainer.train_step(batches[1])
    assert counts.waits == []


def test_the_count_of_host_waits_would_notice_them():
    values = torch.tensor([1.0, -1.0])
    for wait in (
        lambda: values[values > 0],
        values.nonzero,
        values.unique,
        values.sum().item,
        lambda: values.masked_select(values > 0),
        lambda: torch.tensor([1.0]),
        lambda: values.masked_fill_(values > 0, 1.0)[values > 0].sum().item(),
    ):
        with Counts() as counts:
            wait()
        assert counts.waits


@pytest.mark.parametrize("counts", [[0, 0], [0, 3]])
def test_every_parameter_gets_a_finite_gradient_without_objects(small, counts):
    losses = small.losses(*batch_of(counts))
    assert tuple(losses) == loss_names(small.config.model)
    if not any(counts):
        assert losses["giou"].item() == losses["dfl"].item() == 0
    sum(losses.values()).backward()
    for name, parameter in small.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def test_padding_of_the_ground_truths_changes_nothing(small):
    images, boxes, labels = batch_of([2, 9])
    small.eval()
    plain = small.losses(images, boxes, labels)
    targets = pad_targets(boxes, labels, torch.tensor([[64, 64], [64, 64]]))
    wider = [torch.nn.functional.pad(t, pad) for t, pad in (
        (targets.boxes, (0, 0, 0, 5)), (targets.labels, (0, 5)), (targets.mask, (0, 5)),
    )]  # fmt: skip
    padded = small.criterion.losses(small(images), type(targets)(*wider, targets.sizes))
    for name in plain:
        assert torch.equal(plain[name], padded[name])


def test_losses_weigh_positives_over_the_batch_as_the_paper_normalises(small):
    images, boxes, labels = batch_of([4, 6])
    small.eval()
    together = small.losses(images, boxes, labels)["qfl"]
    apart = [
        small.losses(images[i : i + 1], boxes[i : i + 1], labels[i : i + 1])["qfl"] for i in (0, 1)
    ]
    from gfl.model.assigner import assign_targets
    from gfl.model.boxes import grid_points
    from tests.support.detectors import level_sizes

    points = grid_points(level_sizes(64, 64), images.device)
    targets = pad_targets(boxes, labels, torch.tensor([[64, 64], [64, 64]]))
    counts = (assign_targets(points, targets, 9).truth_of_locations() >= 0).sum(dim=1).clamp(min=1)
    expected = (apart[0] * counts[0] + apart[1] * counts[1]) / counts.sum()
    torch.testing.assert_close(together, expected)


def test_one_batch_can_be_learned_by_heart(small):
    torch.manual_seed(0)
    learn_one_batch_by_heart(small)


def test_predictions_are_in_pixels_of_the_original_image(small):
    images = batch_of([1])[0]
    small.eval()
    small.head.cls_logits.bias.data.fill_(0.0)
    sizes = torch.tensor([[48, 64]])
    (plain,) = small.predict(images, sizes)
    (scaled,) = small.predict(images, sizes, torch.tensor([[96, 192]]))
    assert len(plain) > 20
    assert plain.boxes[:, 3].max() <= 48
    assert (plain.scores[:-1] >= plain.scores[1:]).all()
    torch.testing.assert_close(plain.distributions.sum(-1), torch.ones(len(plain), 4))
    # Score and class tell which location a detection is; NMS may keep others after scaling.
    same = (scaled.scores[:, None] == plain.scores) & (scaled.labels[:, None] == plain.labels)
    kept, partner = same.nonzero(as_tuple=True)
    assert len(kept) > 20
    grown = torch.tensor([3.0, 2.0, 3.0, 2.0])
    torch.testing.assert_close(scaled.boxes[kept], plain.boxes[partner] * grown)
    torch.testing.assert_close(scaled.edge_std[kept], plain.edge_std[partner] * grown)


def test_predicting_changes_nothing_about_a_detector_in_training(small):
    before = {key: value.clone() for key, value in small.state_dict().items()}
    images = batch_of([1])[0]
    in_training = small.predict(images)[0]
    assert small.training
    for key, value in small.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert torch.equal(in_training.scores, small.eval().predict(images)[0].scores)


def test_ground_truths_that_do_not_fit_together_are_refused(small):
    images, boxes, labels = batch_of([2, 1])
    with pytest.raises(ValueError, match=r"each of 2 images, got 1 and 2"):
        small.losses(images, boxes[:1], labels)
    with pytest.raises(ValueError, match=r"image 1: expected boxes \(G, 4\)"):
        small.losses(images, boxes, [labels[0], labels[1][:0]])
    with pytest.raises(ValueError, match="without objects"):
        small.losses(images, [boxes[0], torch.tensor([])], [labels[0], labels[1][:0]])


def test_normalisation_leaves_padding_at_zero(small):
    pixels = torch.full((1, 3, 64, 64), 200, dtype=torch.uint8)
    inputs = small.normalize(pixels, torch.tensor([[40, 50]]))
    assert inputs[0, :, 40:].abs().max() == 0
    assert inputs[0, :, :, 50:].abs().max() == 0
    expected = (200 - torch.tensor([123.675, 116.28, 103.53])) / torch.tensor(
        [58.395, 57.12, 57.375]
    )
    torch.testing.assert_close(inputs[0, :, 0, 0], expected)


def test_frozen_stages_and_their_statistics_stay():
    detector = gfl.Detector(gfl.load_config("configs/gfl_r18_1x.yaml")).train()
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    detector.losses(*batch_of([2, 1]))["qfl"].backward()
    assert not detector.backbone.bn1.training
    frozen = {name.split(".")[1] for name, p in detector.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1"}
    for key, value in detector.state_dict().items():
        if "running" in key:
            assert torch.equal(value, before[key]), key
