"""Backbones: deformable convolution, what is frozen, gradients computed again."""

import pytest
import torch
from torch import nn

from gfl.config.schema import BackboneConfig, DeformableConfig
from gfl.model.backbone import Backbone, DeformableConv2d


@pytest.mark.parametrize(("version", "share"), [(1, 1.0), (2, 0.5)])
@pytest.mark.parametrize("groups", [1, 4])
def test_deformable_convolution_starts_as_a_plain_one(version, share, groups):
    plain = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=groups, bias=False)
    images = torch.randn(2, 8, 9, 11)
    deformable = DeformableConv2d(plain, version)
    torch.testing.assert_close(deformable(images), share * plain(images))


@pytest.mark.parametrize("version", [1, 2])
def test_deformable_convolution_samples_where_its_offsets_point(version):
    """An offset of one pixel right and two down is a plain convolution of the moved image."""
    plain = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    deformable = DeformableConv2d(plain, version)
    bias = torch.zeros(27 if version == 2 else 18)
    bias[0:18:2], bias[1:18:2] = 2.0, 1.0  # pairs of (y, x)
    bias[18:] = 100.0  # sigmoid(100) = 1: the mask lets everything through
    deformable.conv_offset.bias.data.copy_(bias)
    images = torch.randn(1, 4, 12, 12)
    moved = torch.zeros_like(images)
    moved[..., :-2, :-1] = images[..., 2:, 1:]
    inner = (..., slice(1, 8), slice(1, 8))
    torch.testing.assert_close(deformable(images)[inner], plain(moved)[inner])


def test_the_chosen_stages_are_deformable_and_no_other():
    config = BackboneConfig(name="resnet50", deformable=DeformableConfig(version=1, stages=(4, 5)))
    with torch.device("meta"):
        backbone = Backbone(config)
    found = {name.split(".")[0] for name, module in backbone.named_modules()
             if isinstance(module, DeformableConv2d)}  # fmt: skip
    assert found == {"layer3", "layer4"}
    assert all(isinstance(block.conv2, DeformableConv2d) for block in backbone.layer3)


@pytest.mark.parametrize("norm_eval", [True, False])
def test_computing_blocks_again_changes_no_bit(norm_eval):
    results = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        backbone = Backbone(BackboneConfig(name="resnet18", frozen_stages=0, norm_eval=norm_eval,
                                           checkpoint_gradients=checkpoint)).train()  # fmt: skip
        sum(c.square().mean() for c in backbone(torch.randn(2, 3, 64, 64))).backward()
        gradients = [p.grad for p in backbone.parameters() if p.requires_grad]
        results.append([*gradients, *backbone.state_dict().values()])
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


def test_blocks_with_synchronised_norms_are_computed_again():
    config = BackboneConfig(name="resnet18", frozen_stages=-1, norm_eval=False, sync_norm=True,
                            checkpoint_gradients=True)  # fmt: skip
    backbone = Backbone(config).train()
    sum(c.square().mean() for c in backbone(torch.randn(2, 3, 64, 64))).backward()
    assert backbone.layer1[0].bn1.num_batches_tracked == 1


def test_synchronised_norms_take_the_place_of_all():
    config = BackboneConfig(name="resnet18", frozen_stages=-1, norm_eval=False, sync_norm=True)
    backbone = Backbone(config).train()
    norms = [m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 20
    assert all(isinstance(norm, nn.SyncBatchNorm) and norm.training for norm in norms)
    assert set(backbone.state_dict()) == set(Backbone(BackboneConfig(name="resnet18")).state_dict())
