import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from gfl.convolution import Convolution, PredictingConvolution, convert


@pytest.fixture(params=[1, 2])
def pair(request):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(16, 8, 3, stride=request.param, padding=1, groups=2))
    plain.to(memory_format=torch.channels_last)
    ours = nn.Sequential(nn.Conv2d(16, 8, 3, stride=request.param, padding=1, groups=2))
    ours.load_state_dict(plain.state_dict())
    convert(ours)
    return plain, ours.to(memory_format=torch.channels_last)


def gradients(model, images):
    images = images.clone(memory_format=torch.preserve_format).requires_grad_()
    model.zero_grad()
    model(images).square().sum().backward()
    return [images.grad, *(parameter.grad for parameter in model.parameters())]


def test_gradients_are_those_of_torchs_convolution(pair, monkeypatch):
    plain, ours = pair
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    images = torch.randn(2, 16, 64, 80).contiguous(memory_format=torch.channels_last)
    assert type(ours[0]) is Convolution
    assert "PlainWeightGradient" in str(ours(images).grad_fn)
    small = images[:, :, :50].contiguous(memory_format=torch.channels_last)
    assert "PlainWeightGradient" not in str(ours(small).grad_fn)
    for found, expected in zip(gradients(ours, images), gradients(plain, images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
        assert found.stride() == expected.stride()


def test_other_layouts_and_processors_take_torchs_own_way(pair, monkeypatch):
    images = torch.randn(2, 16, 64, 80)
    assert "PlainWeightGradient" not in str(pair[1](images).grad_fn)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    images = images.contiguous(memory_format=torch.channels_last)
    assert "PlainWeightGradient" not in str(pair[1](images).grad_fn)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_many_weights_on_tiny_maps_are_one_product(stride, bias):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(384, 320, 3, stride=stride, padding=1, bias=bias))
    ours = copy.deepcopy(plain)
    convert(ours)
    for model in (plain, ours):
        model.to(memory_format=torch.channels_last)
    images = torch.randn(3, 384, 5, 6).contiguous(memory_format=torch.channels_last)
    assert "Permute" in str(ours(images).grad_fn)
    assert ours(images).is_contiguous(memory_format=torch.channels_last)
    for found, expected in zip(gradients(ours, images), gradients(plain, images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
        assert found.stride() == expected.stride()
    with torch.no_grad():
        torch.testing.assert_close(ours(images), plain(images))


@pytest.mark.parametrize("bias", [True, False])
def test_what_only_predicts_multiplies_less_on_large_maps(bias, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    torch.manual_seed(0)
    plain = nn.Conv2d(256, 40, 3, padding=1, bias=bias).requires_grad_(False)
    ours = copy.deepcopy(plain)
    ours.__class__ = PredictingConvolution
    images = torch.randn(2, 256, 48, 50).contiguous(memory_format=torch.channels_last)
    small = images[:, :, :40].contiguous(memory_format=torch.channels_last)
    wide, narrow = kernels(ours, images), kernels(ours, small)
    assert ("_nnpack_spatial_convolution" in wide, "_nnpack_spatial_convolution" in narrow) == (
        torch.backends.nnpack.is_available(),
        False,
    )
    found, expected = ours(images), plain(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.std().item())
    assert torch.equal(found[:1], ours(images[:1]))
    assert torch.equal(ours(small), plain(small))


def kernels(model, images):
    with torch.profiler.profile() as profile:
        model(images)
    return {event.key.removeprefix("aten::") for event in profile.key_averages()}


def test_what_only_predicts_compiles_as_one_graph_for_all_sizes(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    model = nn.Conv2d(256, 8, 3, padding=1).requires_grad_(False)
    model.__class__ = PredictingConvolution
    graphs = CompileCounter()
    compiled = torch.compile(model, backend=graphs, fullgraph=True, dynamic=True)
    for side in (30, 48, 60):
        compiled(torch.randn(1, 256, side, side + 2))
    assert graphs.frame_count == 1
