"""The losses over all that users sweep: every beta and every reg_max trains, and is what it says.

Compared with plain loops in float64; the criterion computes in float32, hence the tolerance.
"""

from itertools import product

import pytest
import torch

import gfl
from gfl.config.loader import derive
from gfl.model.criterion import Criterion
from gfl.model.head import build_integral
from gfl.structures import pad_targets
from gfl.train.microbatch import LossModule
from tests.support.detectors import level_sizes
from tests.support.loop_reference import losses as loop_losses

BETAS = (0, 0.5, 1, 1.5, 2, 2.5, 4)
REG_MAXES = (4, 7, 8, 16, 32)
GRID = list(product(BETAS, REG_MAXES))
AXES = [(beta, 8) for beta in BETAS] + [(2, reg_max) for reg_max in REG_MAXES if reg_max != 8]
TOLERANCE = 2e-5
SIZE = 64
BOXES = [
    # The last is so wide that no reg_max reaches its sides.
    torch.tensor([[4.0, 6, 60, 58], [30, 20, 50, 44], [-2000, 20, 2000, 44]]),
    torch.zeros(0, 4),
    torch.tensor([[8.0, 8, 48, 40]]),
]
LABELS = [torch.tensor([0, 2, 1]), torch.zeros(0, dtype=torch.long), torch.tensor([1])]
TARGETS = pad_targets(BOXES, LABELS, torch.tensor([[SIZE, SIZE]] * 3))
SHAPES = level_sizes(SIZE, SIZE)
LOCATIONS = [h * w for h, w in SHAPES]


@pytest.fixture(scope="module")
def detector_of(tiny):
    """A function that gives a detector with a beta and a reg_max, the same at every call."""

    def make(beta, reg_max, *more):
        options = [f"loss.qfl.beta={beta}", f"model.reg_max={reg_max}", *more]
        torch.manual_seed(0)
        return gfl.Detector(derive(type(tiny), tiny, options))

    return make


@pytest.fixture(scope="module")
def losses_of(tiny):
    """A function that gives the losses of flat logits (B, P, channels)."""

    def losses(beta, reg_max, cls, reg):
        options = [f"loss.qfl.beta={beta}", f"model.reg_max={reg_max}"]
        config = derive(type(tiny), tiny, options)
        maps = tuple(
            [level.transpose(1, 2).unflatten(2, shape)
             for level, shape in zip(flat.split(LOCATIONS, dim=1), SHAPES, strict=True)]
            for flat in (cls, reg)
        )  # fmt: skip
        return Criterion(config, build_integral(config.model)).losses(maps, TARGETS)

    return losses


def random_logits(reg_max, spread=1.0):
    generator = torch.Generator().manual_seed(reg_max)
    count = sum(LOCATIONS)
    cls = torch.randn(3, count, 3, generator=generator) * spread
    reg = torch.randn(3, count, 4 * (reg_max + 1), generator=generator) * spread
    return cls.requires_grad_(), reg.requires_grad_()


@pytest.mark.parametrize("reg_max", REG_MAXES)
@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_losses_are_those_of_plain_loops_for_every_beta(losses_of, tiny, reg_max, spread):
    flat = random_logits(reg_max, spread)
    boxes, labels = ([t.tolist() for t in truths] for truths in (BOXES, LABELS))
    for beta in BETAS:
        found = losses_of(beta, reg_max, *flat)
        config = derive(type(tiny), tiny, [f"loss.qfl.beta={beta}", f"model.reg_max={reg_max}"])
        arrays = [f.detach().numpy() for f in flat]
        expected, clipped = loop_losses(arrays, boxes, labels, SIZE, config)
        assert clipped > 0
        values = {name: loss.item() for name, loss in found.items()}
        assert values == pytest.approx(expected, rel=TOLERANCE), beta


def finite_gradients(losses, leaves):
    """Return the gradients of `leaves`, which all are finite, as are the losses."""
    assert all(loss.isfinite() for loss in losses.values())
    gradients = torch.autograd.grad(sum(losses.values()), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)
    return gradients


@pytest.mark.parametrize(("beta", "reg_max"), GRID)
def test_gradients_are_finite_from_extreme_logits(losses_of, beta, reg_max):
    """Scores saturated, edges that are one bin, and predictions that equal their targets."""
    cls, reg = random_logits(reg_max)
    for level in (-120.0, -80.0, 0.0, 80.0, 120.0):
        flat = cls.detach().sign() * level, reg.detach().sign() * level
        leaves = [f.clone().requires_grad_() for f in flat]
        finite_gradients(losses_of(beta, reg_max, *leaves), leaves)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("certain", [80.0, 120.0])
def test_gradients_are_finite_where_predictions_equal_their_targets(losses_of, beta, certain):
    """The object of the last image lies whole strides from its locations: edges can be exact."""
    reg_max = 8
    cls = torch.full((3, sum(LOCATIONS), 3), -certain)
    reg = torch.zeros(3, sum(LOCATIONS), 4, reg_max + 1)
    places = []
    for row, column in product(range(2, 5), range(2, 6)):
        place = row * SHAPES[0][1] + column
        places.append(place)
        cls[2, place, 1] = certain
        for side, distance in enumerate((column - 1, row - 1, 6 - column, 5 - row)):
            reg[2, place, side, distance] = certain
    leaves = [cls.requires_grad_(), reg.flatten(2).requires_grad_()]
    gradient, _ = finite_gradients(losses_of(beta, reg_max, *leaves), leaves)
    # Where |y - sigmoid(z)| is exactly 0: at the positive locations, not at the others around.
    exact = gradient[2, places, 1] == 0
    assert 0 < exact.sum() < len(places)


@pytest.mark.parametrize(
    ("beta", "reg_max", "precision"),
    [(*point, "float32") for point in AXES]
    + [(*point, "bfloat16") for point in ((0.5, 8), (2, 8), (4, 32))],
)
def test_ten_steps_stay_finite_and_the_loss_falls(detector_of, beta, reg_max, precision):
    body = "model.backbone={frozen_stages: 4, norm_eval: true}"  # which no loss depends on
    detector = detector_of(beta, reg_max, f"optim.precision={precision}", body).train()
    # From scores of one half: those of an untrained head weigh boxes by less than the floor of 1,
    # and while they grow, so do the losses of boxes.
    torch.nn.init.zeros_(detector.head.cls_logits.bias)
    loss_module = LossModule(detector, detector.config)
    trained = [p for p in detector.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    # Not of 64 px: in bfloat16 on a CPU, torch's gradient of P7's weights is not always finite
    # where P6 is a single cell.
    images = torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    targets = pad_targets(BOXES, LABELS, torch.tensor([[96, 96]] * 3))
    totals = []
    for _ in range(10):
        optimizer.zero_grad()
        total = loss_module(images, targets).sum()
        total.backward()
        assert all(p.grad.isfinite().all() for p in trained)
        optimizer.step()
        totals.append(total.item())
    assert max(totals[-3:]) < 0.9 * totals[0], totals
