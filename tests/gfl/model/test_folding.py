import pytest
import torch
from torch import nn

import gfl
from gfl.config.loader import derive
from gfl.model.detector import folded

BODIES = (
    "{name: resnet18, frozen_stages: -1}",
    "{name: resnet50, deformable: {version: 2, stages: [5]}}",
)


@pytest.mark.parametrize("backbone", BODIES)
def test_a_folded_detector_says_the_same_and_has_no_norms_left(tiny, backbone):
    torch.manual_seed(0)
    detector = gfl.Detector(derive(type(tiny), tiny, [f"model.backbone={backbone}"]))
    for norm in detector.backbone.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    alone = folded(detector)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in alone.modules())
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        for ours, theirs in zip(alone(images), detector.eval()(images), strict=True):
            for level, plain in zip(ours, theirs, strict=True):
                torch.testing.assert_close(level, plain, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(before[key], value) for key, value in detector.state_dict().items())
