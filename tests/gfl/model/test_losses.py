import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gfl.model.losses import (
    background_focal_loss,
    distribution_focal_loss,
    giou_loss,
    quality_focal_loss,
)

BETAS = [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 4.0]


@pytest.fixture(scope="module")
def reference(golden):
    return {
        key: torch.from_numpy(np.asarray(v)) for key, v in np.load(golden / "losses.npz").items()
    }


def case(reference, name):
    return {key.split("/")[1]: v for key, v in reference.items() if key.startswith(f"{name}/")}


@pytest.mark.parametrize("name", ["qfl_beta2.0", "qfl_beta1.0", "qfl_beta0.5"])
def test_quality_focal_loss_is_the_references(reference, name):
    for variant in (name, name.replace("qfl", "qfl_clean")):
        c = case(reference, variant)
        logits = c["pred"].requires_grad_()
        rows, classes = logits.shape
        positive = c["label"] < classes
        quality = torch.zeros(rows, classes)
        quality[positive, c["label"][positive]] = c["score"][positive]
        per_row = quality_focal_loss(logits, quality, float(c["beta"])).sum(dim=1)
        torch.testing.assert_close(per_row, c["loss_none"], rtol=1e-6, atol=1e-7)
        loss = (per_row * c.get("weight", torch.ones(rows))).sum() / float(c["avg_factor"])
        torch.testing.assert_close(loss, c["loss"], rtol=1e-6, atol=1e-7)
        (gradient,) = torch.autograd.grad(loss, logits)
        finite = c["grad"].isfinite()  # the reference's is not where prediction equals target
        torch.testing.assert_close(gradient[finite], c["grad"][finite], rtol=1e-5, atol=1e-8)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("beta", BETAS)
def test_quality_focal_loss_is_equation_3_for_any_beta(beta):
    torch.manual_seed(0)
    logits = (torch.randn(50, 4, dtype=torch.float64) * 4).float()
    quality = torch.rand(50, 4)
    loss = quality_focal_loss(logits, quality, beta)
    for z, y, found in zip(logits.flatten(), quality.flatten(), loss.flatten(), strict=True):
        z, y = z.double(), y.double()
        sigma = 1 / (1 + torch.exp(-z))
        entropy = -((1 - y) * torch.log(1 - sigma) + y * torch.log(sigma))
        assert found.item() == pytest.approx(
            (abs(y - sigma) ** beta * entropy).item(), rel=2e-5, abs=1e-6
        )


@pytest.mark.parametrize("beta", BETAS)
def test_the_background_is_quality_focal_loss_without_objects(beta):
    logits = torch.tensor([-1e3, -60.0, -20, -3, -0.1, 0, 2, 19.9, 20.1, 60], requires_grad=True)
    found = background_focal_loss(logits, beta)
    expected = quality_focal_loss(logits, torch.zeros_like(logits), beta)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    (ours,), (theirs,) = (torch.autograd.grad(f.sum(), logits) for f in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_quality_focal_loss_without_modulation_is_binary_cross_entropy():
    logits, quality = torch.randn(9, 3), torch.rand(9, 3)
    expected = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    assert torch.equal(quality_focal_loss(logits, quality, 0.0), expected)


@pytest.mark.parametrize("beta", BETAS)
def test_quality_focal_loss_is_finite_at_its_target_and_when_saturated(beta):
    logits = torch.tensor([0.0, 100.0, -100.0, 100.0, -100.0], requires_grad=True)
    quality = torch.tensor([0.5, 1.0, 0.0, 0.0, 1.0])
    loss = quality_focal_loss(logits, quality, beta)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logits.grad.isfinite().all()


def test_distribution_focal_loss_is_the_references(reference):
    c = case(reference, "dfl")
    logits = c["pred"].requires_grad_()
    loss = distribution_focal_loss(logits, c["target"])
    weight = float(c["loss_weight"])  # which the reference's unreduced loss contains
    torch.testing.assert_close(loss * weight, c["loss_none"], rtol=1e-5, atol=1e-6)
    total = (loss * c["weight"]).sum() / float(c["avg_factor"]) * weight
    torch.testing.assert_close(total, c["loss"], rtol=1e-6, atol=1e-7)
    (gradient,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(gradient, c["grad"], rtol=1e-5, atol=1e-8)


def test_distribution_focal_loss_is_least_at_the_interpolation_of_two_bins():
    target = torch.tensor([3.25])
    best = torch.full((1, 9), -30.0)
    best[0, 3], best[0, 4] = np.log(0.75), np.log(0.25)
    least = distribution_focal_loss(best, target)
    assert least.item() == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)), rel=1e-5)
    for _ in range(20):
        assert distribution_focal_loss(best + torch.randn(1, 9), target) > least


def test_distribution_focal_loss_clamps_targets_to_its_reach():
    logits = torch.randn(3, 9)
    beyond = distribution_focal_loss(logits, torch.tensor([8.5, -1.0, 100.0]))
    within = distribution_focal_loss(logits, torch.tensor([7.9, 0.0, 7.9]))
    assert torch.equal(beyond, within)


def test_giou_loss_is_the_references(reference):
    c = case(reference, "giou")
    boxes = c["pred"].requires_grad_()
    loss = giou_loss(boxes, c["target"])
    torch.testing.assert_close(loss, 1 - c["giou_eps1e6"], rtol=1e-6, atol=1e-6)
    total = (loss * c["weight"]).sum() / float(c["avg_factor"]) * float(c["loss_weight"])
    torch.testing.assert_close(total, c["loss"], rtol=1e-5, atol=1e-7)
    (gradient,) = torch.autograd.grad(total, boxes)
    torch.testing.assert_close(gradient, c["grad"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [0.5, 1.5, 2.0])
def test_gradients_are_those_of_finite_differences(beta):
    # gradcheck needs float64, which the losses leave only for float32 inputs alone.
    torch.manual_seed(1)
    logits, quality, step = torch.randn(6, 3), torch.rand(6, 3), 1e-2
    z = logits.clone().requires_grad_()
    quality_focal_loss(z, quality, beta).sum().backward()
    up = quality_focal_loss(logits + step, quality, beta)
    down = quality_focal_loss(logits - step, quality, beta)
    torch.testing.assert_close(z.grad, (up - down) / (2 * step), rtol=2e-2, atol=2e-3)
