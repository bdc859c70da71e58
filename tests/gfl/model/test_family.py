"""What GFL's family adds: GFLv2's quality predictor, localisation distillation."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import gfl
from gfl.checkpoint.files import About
from gfl.checkpoint.snapshot import take_snapshot
from gfl.config.loader import derive
from gfl.config.schema import QualityPredictorConfig
from gfl.data.dataset import collate
from gfl.data.split import load_splits
from gfl.model.head import QualityPredictor, joint_logits
from gfl.model.losses import localisation_distillation_loss, quality_focal_loss
from gfl.train.trainer import Start, Trainer

CPU = torch.device("cpu")
QUALITY = "model.quality_predictor={topk: 4, hidden: 64}"


def test_joint_logits_are_those_of_the_product_of_scores():
    grid = torch.linspace(-12, 12, 49)
    cls, quality = (g.flatten() for g in torch.meshgrid(grid, grid, indexing="ij"))
    product = cls.double().sigmoid() * quality.double().sigmoid()
    expected = torch.logit(product)
    torch.testing.assert_close(joint_logits(cls, quality).double(), expected, rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(
        joint_logits(cls, quality).sigmoid().double(), product, rtol=1e-5, atol=1e-9
    )


def test_joint_logits_stay_finite_where_scores_saturate():
    extreme = torch.tensor([-200.0, -90.0, 90.0, 200.0], requires_grad=True)
    joint = joint_logits(extreme[:, None], extreme)
    joint.sum().backward()
    assert joint.isfinite().all()
    assert extreme.grad.isfinite().all()


def test_the_loss_of_joint_logits_is_gflv2s_on_the_product():
    """Their code takes the binary cross-entropy of J = C * I itself; gradients in both factors."""
    generator = torch.Generator().manual_seed(0)
    cls, quality = (torch.randn(200, generator=generator).requires_grad_() for _ in range(2))
    target = torch.rand(200, generator=generator) * (torch.arange(200) % 3 == 0)
    ours = quality_focal_loss(joint_logits(cls, quality), target, 2.0).sum()
    gradients = torch.autograd.grad(ours, (cls, quality))
    cls64, quality64 = (x.detach().double().requires_grad_() for x in (cls, quality))
    joint = cls64.sigmoid() * quality64.sigmoid()
    theirs = F.binary_cross_entropy(joint, target.double(), reduction="none")
    theirs = (theirs * (joint - target).abs() ** 2).sum()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for found, expected in zip(
        gradients, torch.autograd.grad(theirs, (cls64, quality64)), strict=True
    ):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_quality_is_read_off_the_highest_probabilities_and_their_mean():
    torch.manual_seed(0)
    predictor = QualityPredictor(QualityPredictorConfig(topk=4, hidden=64), bins=17).double()
    logits = torch.randn(2, 4 * 17, 3, 5, dtype=torch.float64)
    predictor.float()
    found = predictor(logits.float())
    predictor.double()
    first, last = predictor.layers[0], predictor.layers[2]
    for image in range(2):
        for row in range(3):
            for column in range(5):
                statistics = []
                for side in range(4):
                    bins = logits[image, 17 * side : 17 * side + 17, row, column]
                    best = sorted(bins.softmax(0).tolist(), reverse=True)[:4]
                    statistics += [*best, sum(best) / 4]
                hidden = first.weight[:, :, 0, 0] @ torch.tensor(statistics, dtype=torch.float64)
                hidden = (hidden + first.bias).relu()
                expected = (last.weight[0, :, 0, 0] @ hidden + last.bias[0]).item()
                assert found[image, 0, row, column].item() == pytest.approx(expected, rel=1e-5)


def test_gflv2_lowers_scores_and_trains_every_parameter(tiny):
    torch.manual_seed(0)
    detector = gfl.Detector(derive(type(tiny), tiny, [QUALITY])).train()
    losses = detector.losses(
        torch.randn(1, 3, 64, 64), [torch.tensor([[4.0, 4, 40, 50]])], [torch.tensor([1])]
    )
    sum(losses.values()).backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, name
    assert detector.head.quality_predictor.layers[0].weight.grad.abs().sum() > 0


def test_gflv2_under_the_references_names_comes_back_bit_by_bit(tiny):
    config = derive(type(tiny), tiny, [QUALITY])
    detector, other = gfl.Detector(config), gfl.Detector(config)
    exported = gfl.export_mmdet(detector)
    assert exported["bbox_head.reg_conf.0.weight"].shape == (64, 20, 1, 1)
    gfl.load_weights(other, exported)
    for key, value in detector.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    with pytest.raises(ValueError, match=r"quality_predictor .*'topk': 4.*the model has None"):
        gfl.load_weights(gfl.Detector(tiny), exported)


def test_bins_that_the_reference_does_not_know_are_not_exported(tiny):
    detector = gfl.Detector(derive(type(tiny), tiny, ["model.bin_width=0.5"]))
    with pytest.raises(ValueError, match=r"bin_width is 0\.5: MMDetection's bins are 1 wide"):
        gfl.export_mmdet(detector)


def test_distillation_is_the_references(golden):
    case = {key: torch.from_numpy(value) for key, value in np.load(golden / "ld.npz").items()}
    student = case["student"].float().requires_grad_()
    rows = localisation_distillation_loss(student, case["teacher"].float(), 10.0)
    value = 0.25 * (rows * case["weight"]).sum() / case["avg_factor"]
    torch.testing.assert_close(value.double(), case["value"], rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(value, student)
    torch.testing.assert_close(gradient.double(), case["grad_student"], rtol=1e-4, atol=1e-7)


def test_distillation_is_the_papers_divergence():
    student, teacher = (torch.randn(6, 17, dtype=torch.float64) for _ in range(2))
    p, q = (teacher / 10).softmax(-1), (student / 10).softmax(-1)
    expected = 10**2 * (p * (p / q).log()).sum(-1) / 17
    found = localisation_distillation_loss(student, teacher, 10.0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)
    assert localisation_distillation_loss(teacher, teacher, 10.0).abs().max() < 1e-9


@pytest.fixture
def teacher(tiny, tmp_path):
    """A checkpoint of an untrained detector that has its edges at distances of its own."""
    torch.manual_seed(1)
    config = derive(type(tiny), tiny, ["model.channels=40"])
    about = About(["ellipse", "rectangle", "triangle"], [1, 2, 3], 0, 0, {})
    (tmp_path / "teacher").mkdir()
    detector = gfl.Detector(config)
    torch.nn.init.normal_(detector.head.reg_logits.bias, std=3)
    take_snapshot(detector, config, about, {}).write(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_a_student_learns_its_teachers_distributions(tiny, teacher):
    # Scores, which weigh the loss, must not rise meanwhile, nor edges go elsewhere.
    alone = [f"loss.{name}.weight=0" for name in ("qfl", "giou", "dfl")]
    config = derive(
        type(tiny),
        tiny,
        [f"loss.distillation={{teacher: {teacher}}}", *alone, "optim.lr=0.03"],
    )
    trainer = Trainer(config, load_splits(config)[0], CPU, Start(teacher=teacher))
    assert trainer.loss_module.names == ("qfl", "giou", "dfl", "ld")
    assert not any("teacher" in name for name in trainer.loss_module.state_dict())
    trainer.parallel.train()
    batch = collate([trainer.dataset[key] for key in trainer.batches.keys(0)])
    rows = [trainer.train_step(batch) for _ in range(8)]
    assert rows[0].shape == (5,)
    assert 0 < rows[-1][3] < 0.7 * rows[0][3]


def test_a_teacher_of_other_bins_is_refused(tiny, teacher):
    config = derive(
        type(tiny), tiny, [f"loss.distillation={{teacher: {teacher}}}", "model.reg_max=12"]
    )
    with pytest.raises(ValueError, match=r"teacher: model\.reg_max is 8 in the teacher, but 12"):
        Trainer(config, load_splits(config)[0], CPU, Start(teacher=teacher))
