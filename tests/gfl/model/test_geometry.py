"""Boxes, points and edge distributions: round trips, closed forms, the reference's numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import box_iou as pairwise_iou
from torchvision.ops import generalized_box_iou

from gfl.model.boxes import box_giou, box_iou, grid_points, ltrb_to_xyxy, xyxy_to_ltrb
from gfl.model.head import Integral
from gfl.model.losses import TARGET_MARGIN
from tests.support.detectors import level_sizes


def some_boxes(count, seed):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 50
    return torch.cat([corner, corner + torch.rand(count, 2, generator=generator) * 50 + 0.1], dim=1)


@given(seed=st.integers(0, 1000))
def test_distances_and_corners_are_inverse(seed):
    boxes = some_boxes(30, seed).double()
    points = some_boxes(30, seed + 1)[:, :2].double()
    back = ltrb_to_xyxy(points, xyxy_to_ltrb(points, boxes))
    torch.testing.assert_close(back, boxes, rtol=0, atol=1e-12)


def test_overlaps_are_torchvisions():
    boxes, others = some_boxes(40, 0), some_boxes(40, 1)
    torch.testing.assert_close(box_iou(boxes, others), pairwise_iou(boxes, others).diagonal())
    torch.testing.assert_close(
        box_giou(boxes, others), generalized_box_iou(boxes, others).diagonal()
    )


def test_giou_does_not_change_under_translation_and_scale():
    boxes, others = some_boxes(40, 2).double(), some_boxes(40, 3).double()
    expected = box_giou(boxes, others)
    torch.testing.assert_close(box_giou(boxes + 7.5, others + 7.5), expected)
    torch.testing.assert_close(box_giou(boxes * 3, others * 3), expected)


def test_overlaps_have_the_right_gradients():
    boxes, others = some_boxes(5, 4).double().requires_grad_(), some_boxes(5, 5).double()
    assert torch.autograd.gradcheck(lambda b: box_giou(b, others), boxes)


def test_overlaps_of_empty_boxes_are_finite():
    empty = torch.zeros(1, 4, requires_grad=True)
    value = box_giou(empty, torch.zeros(1, 4)) + box_iou(empty, torch.zeros(1, 4))
    value.sum().backward()
    assert value.isfinite().all()
    assert empty.grad.isfinite().all()


def test_locations_lie_at_multiples_of_their_stride():
    points = grid_points(level_sizes(64, 96), torch.device("cpu"))
    assert points.level_start.tolist() == [0, 96, 120, 126, 128]
    assert points.level_shape.tolist() == [[12, 8], [6, 4], [3, 2], [2, 1], [1, 1]]
    assert points.xy[:3].tolist() == [[0, 0], [8, 0], [16, 0]]
    assert points.xy[96 + 6].tolist() == [0, 16]
    assert points.stride[96 + 24 :].flatten().tolist() == [32] * 6 + [64] * 2 + [128]


def test_integral_is_the_references(golden):
    numbers = np.load(golden / "losses.npz")
    logits = torch.from_numpy(numbers["integral/x"]).requires_grad_()
    integral = Integral(int(numbers["integral/reg_max"]))
    distances = integral(logits)
    torch.testing.assert_close(distances, torch.from_numpy(numbers["integral/y"]))
    distances.backward(torch.from_numpy(numbers["integral/gy"]))
    torch.testing.assert_close(logits.grad, torch.from_numpy(numbers["integral/gx"]))
    points = torch.from_numpy(numbers["integral/points"])
    decoded = ltrb_to_xyxy(points, distances)
    torch.testing.assert_close(decoded, torch.from_numpy(numbers["integral/decoded"]))
    boxes = torch.from_numpy(numbers["integral/enc_gt"])
    largest = int(numbers["integral/reg_max"]) - TARGET_MARGIN
    encoded = xyxy_to_ltrb(points, boxes).clamp(min=0, max=largest)
    torch.testing.assert_close(encoded, torch.from_numpy(numbers["integral/encoded"]))


@pytest.mark.parametrize("bin_width", [0.5, 1.0, 2.0])
def test_moments_of_two_neighbouring_bins(bin_width):
    integral = Integral(8, bin_width)
    distribution = torch.zeros(1, 4, 9)
    distribution[..., 3], distribution[..., 4] = 0.75, 0.25
    mean, std = integral.moments(distribution)
    assert mean[0, 0].item() == pytest.approx(3.25 * bin_width)
    assert std[0, 0].item() == pytest.approx(np.sqrt(0.75 * 0.25) * bin_width)


def test_distances_are_float32_whatever_the_precision_of_logits():
    logits = torch.randn(4, 36)
    low = Integral(8)(logits.bfloat16())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, Integral(8)(logits.bfloat16().float()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Integral(8)(logits), Integral(8)(logits.clone()))
        assert Integral(8)(logits).dtype == torch.float32
