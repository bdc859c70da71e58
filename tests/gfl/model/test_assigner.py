"""ATSS against the reference's numbers, an independent loop and its own invariances."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gfl.model.assigner import assign_targets, valid_locations
from gfl.model.boxes import grid_points
from gfl.structures import Targets, pad_targets
from tests.support.detectors import level_sizes
from tests.support.loop_reference import atss

CPU = torch.device("cpu")


def points_of(height, width):
    return grid_points(level_sizes(height, width), CPU)


def assign(points, targets, topk):
    """Return the ground truth of every location, (B, P), -1 where none."""
    return assign_targets(points, targets, topk).truth_of_locations()


def targets_of(boxes, size):
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.zeros(len(boxes), dtype=torch.long)
    return pad_targets([boxes], [labels], torch.tensor([size]))


CASES = (
    "main", "single_gt", "no_gt", "only_unreachable", "random7", "random30", "random100",
    "big_800x1344_25", "duplicate_gts",
)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_assignment_is_the_references(golden, name):
    numbers = np.load(golden / "atss.npz")
    sizes = tuple((int(h), int(w)) for h, w in numbers[f"{name}/featmap_sizes"])
    points = grid_points(sizes, CPU)
    targets = targets_of(numbers[f"{name}/gt_bboxes"], (sizes[0][0] * 8, sizes[0][1] * 8))
    assigned = assign(points, targets, topk=9)[0].numpy() + 1
    answers = [
        numbers[f"{name}/{k}"]
        for k in ("assigned_gt_inds", "assigned_tie_low", "assigned_tie_high")
    ]
    assert np.any([assigned == answer for answer in answers], axis=0).all()
    assert (assigned == numbers[f"{name}/assigned_tie_low"]).all()


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), topk=st.sampled_from([1, 3, 9]), count=st.integers(0, 12))
def test_assignment_is_that_of_plain_loops(seed, topk, count):
    rng = np.random.default_rng(seed)
    height, width = (int(v) * 32 for v in rng.integers(1, 7, 2))
    size = int(rng.integers(max(1, height - 40), height + 1)), int(rng.integers(1, width + 1))
    corner = rng.uniform(-5, 0.9, (count, 2)) * [size[1], size[0]]
    extent = rng.uniform(0.02, 1.2, (count, 2)) * [size[1], size[0]]
    # Eighths of a pixel: sums and products are exact, so that both sides see the same ties.
    boxes = np.round(np.concatenate([corner, corner + extent + 1], axis=1) * 8) / 8
    targets = targets_of(boxes, size)
    found = assign(points_of(height, width), targets, topk)[0].tolist()
    extent_px = [-(-side // 32) * 32 for side in size]
    assert found == atss(boxes.tolist(), height, width, *extent_px, topk)


def test_assignment_of_an_image_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    points = points_of(256, 320)
    boxes = [torch.rand(n, 4).sort(dim=1)[0][:, [0, 1, 2, 3]] * 250 for n in (0, 1, 17)]
    labels = [torch.zeros(len(b), dtype=torch.long) for b in boxes]
    sizes = torch.tensor([[256, 320], [200, 300], [256, 300]])
    together = assign(points, pad_targets(boxes, labels, sizes), 9)
    for i in range(3):
        alone = assign(
            points, pad_targets(boxes[i : i + 1], labels[i : i + 1], sizes[i : i + 1]), 9
        )
        assert torch.equal(together[i], alone[0])


def test_assignment_follows_a_permutation_of_the_ground_truths():
    torch.manual_seed(1)
    corner = torch.rand(20, 2) * 200
    boxes = torch.cat([corner, corner + 5 + torch.rand(20, 2) * 100], dim=1)
    order = torch.randperm(20)
    points = points_of(256, 320)
    first = assign(points, targets_of(boxes, (256, 320)), 9)[0]
    second = assign(points, targets_of(boxes[order], (256, 320)), 9)[0]
    assert torch.equal(first, torch.where(second >= 0, order[second], -1))
    assert (first >= 0).sum() > 50


def test_padding_and_masked_objects_are_assigned_to_nothing():
    targets = targets_of([[20.0, 20.0, 80.0, 60.0]], (128, 128))
    masked = Targets(targets.boxes, targets.labels, torch.zeros_like(targets.mask), targets.sizes)
    points = points_of(128, 128)
    assert (assign(points, targets, 9) >= 0).any()
    assert (assign(points, masked, 9) == -1).all()


def test_locations_beyond_the_image_rounded_up_to_32_take_no_part():
    points = points_of(128, 128)
    valid = valid_locations(points, torch.tensor([[33, 65]]))[0]
    inside = (points.xy[:, 0] < 96) & (points.xy[:, 1] < 64)
    assert torch.equal(valid, inside)
