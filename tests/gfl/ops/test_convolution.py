import copy
from math import prod

import pytest
import torch
from torch import nn

from gfl.ops import winograd
from gfl.ops.convolution import WINOGRAD_CELLS, Conv3x3, replace_convolutions

LEVELS = ((33, 50), (17, 25), (9, 13), (5, 7), (3, 4), (1, 1))
"""Not of whole tiles."""


@pytest.fixture(autouse=True)
def _no_more_than_avx2(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


def maps(*sizes, images=2, channels=128):
    torch.manual_seed(0)
    made = [torch.randn(images, channels, *size) for size in sizes]
    return [one.contiguous(memory_format=torch.channels_last).requires_grad_() for one in made]


def pair(channels_in, channels_out, **settings):
    """Return torch's convolution, and ours with the same weights, each in a `Sequential`."""
    torch.manual_seed(0)
    layer = nn.Conv2d(channels_in, channels_out, 3, **{"padding": 1, **settings})
    plain = nn.Sequential(layer).to(memory_format=torch.channels_last)
    ours = copy.deepcopy(plain)
    replace_convolutions(ours)
    return plain, ours


def apply(model, levels):
    """Return the outputs of a `Sequential` for each level; ours take the levels together."""
    for layer in model:
        levels = layer(levels) if isinstance(layer, Conv3x3) else [layer(m) for m in levels]
    return levels


def gradients(model, levels):
    model.zero_grad()
    torch.stack([found.square().sum() for found in apply(model, levels)]).sum().backward()
    found = [level.grad for level in levels] + [value.grad for value in model.parameters()]
    for level in levels:
        level.grad = None
    return found


def assert_close(found, expected):
    """They differ by 1e-4 of their spread at most."""
    limit = 1e-4 * expected.double().square().mean().sqrt().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=limit)
    assert found.stride() == expected.stride()


@pytest.mark.parametrize("tiles", [1, 7, 40, 10000])
@pytest.mark.parametrize("bias", [True, False])
def test_winograds_algorithm_says_what_torchs_convolution_does(tiles, bias, monkeypatch):
    monkeypatch.setattr(winograd, "TILES", tiles)
    plain, ours = pair(128, 72, bias=bias)
    levels = maps(*LEVELS)
    for found, expected in zip(apply(ours, levels), apply(plain, levels), strict=True):
        assert "Winograd" in str(found.grad_fn)
        assert_close(found, expected)
    for found, expected in zip(gradients(ours, levels), gradients(plain, levels), strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("images", [1, 3, 8, 20])
def test_tiles_come_as_many_at_a_time_as_are_allowed(images):
    levels = [torch.empty(images, 1, *size) for size in ((100, 168), (50, 84), (25, 42), (13, 21))]
    turns = [[prod(piece.shape) for piece in pieces] for pieces in winograd._pieces(levels)]
    tiles = images * sum(-(-height // 4) * -(-width // 4) for height, width in shapes(levels))
    assert sum(map(sum, turns)) == tiles
    assert all(sum(turn) <= winograd.TILES for turn in turns)
    assert len(turns) <= 2 * tiles / winograd.TILES + 1


def shapes(levels):
    return [level.shape[2:] for level in levels]


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("size", [(40, 40), (41, 43), (42, 40)])
def test_what_comes_out_may_be_changed_in_place(size, images):
    plain, ours = pair(128, 64)
    images = maps(size, images=images)
    for model in (ours, plain):
        model.append(nn.ReLU(inplace=True))
    for found, expected in zip(gradients(ours, images), gradients(plain, images), strict=True):
        assert_close(found, expected)


def test_cells_that_are_far_out_cost_digits_but_not_many():
    """Maps as logarithms are spread: oneDNN's error is 3e-5 there."""
    plain, ours = pair(256, 64)
    images = maps((40, 48), channels=256)[0].detach().exp()
    exact = copy.deepcopy(plain).double()(images.double())
    error = (ours(images) - exact).abs().max() / exact.square().mean().sqrt()
    assert error < 3e-4


def test_it_is_exact_but_for_rounding():
    """In float64 it says the same to 1e-12, and gradients are those of finite differences."""
    torch.manual_seed(0)
    shapes = ((3, 2, 3, 3), (3,), (1, 2, 5, 6), (1, 2, 4, 4), (1, 2, 2, 3))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def ours(weight, bias, *levels):
        return tuple(winograd.convolution(list(levels), weight, bias))

    weight, bias, *levels = inputs
    for found, level in zip(ours(*inputs), levels, strict=True):
        expected = nn.functional.conv2d(level, weight, bias, padding=1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.autograd.gradcheck(ours, inputs)


def test_a_map_that_needs_no_gradient_gets_none():
    plain, ours = pair(128, 64)
    images = maps((40, 40))[0].detach()
    for model in (plain, ours):
        model(images).square().sum().backward()
    assert images.grad is None
    for found, expected in zip(ours.parameters(), plain.parameters(), strict=True):
        assert_close(found.grad, expected.grad)


@pytest.mark.parametrize(
    "settings",
    [
        {"stride": 2, "padding": 1},
        {"padding": 2, "dilation": 2},
        {"padding": 0},
        {"padding": 1, "groups": 2},
        {"padding": 1, "padding_mode": "reflect"},
    ],
)
def test_other_geometry_takes_torchs_own_way(settings):
    plain, ours = pair(128, 64, **settings)
    images = maps((40, 40))
    assert torch.equal(apply(ours, images)[0], apply(plain, images)[0])


def test_small_narrow_or_plain_maps_and_other_processors_take_torchs_own_way(monkeypatch):
    _, ours = pair(128, 64)
    (images,) = maps((40, 40), images=1)
    assert images.shape[2] * images.shape[3] >= WINOGRAD_CELLS
    assert "Winograd" in str(ours(images).grad_fn)
    half = images[:, ::2].contiguous(memory_format=torch.channels_last)
    assert "Winograd" not in str(pair(64, 64)[1](half).grad_fn)
    assert "Winograd" not in str(pair(128, 32)[1](images).grad_fn)
    assert "Winograd" not in str(ours(images[:, :, :12]).grad_fn)
    assert "Winograd" not in str(ours(images.contiguous()).grad_fn)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert "Winograd" not in str(ours(images).grad_fn)


def test_hooks_see_every_level():
    _, ours = pair(128, 64)
    levels, seen = maps(*LEVELS), []
    ours[0].register_forward_hook(lambda _, inputs, outputs: seen.append((*inputs, outputs)))
    outputs = apply(ours, levels)
    ((seen_inputs, seen_outputs),) = seen
    assert seen_inputs is levels
    assert seen_outputs is outputs
    assert len(outputs) == len(levels)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_many_weights_on_tiny_maps_are_one_product(stride, bias):
    plain, ours = pair(384, 320, stride=stride, bias=bias)
    levels = maps((5, 6), images=3, channels=384)
    (found,) = apply(ours, levels)
    assert "Permute" in str(found.grad_fn)
    assert_close(found, plain(levels[0]))
    for found, expected in zip(gradients(ours, levels), gradients(plain, levels), strict=True):
        assert_close(found, expected)


def for_inference(channels_in, channels_out, **settings):
    plain, ours = pair(channels_in, channels_out, **settings)
    ours.requires_grad_(False)
    ours[0].for_inference = True
    return plain[0].requires_grad_(False), ours


@pytest.mark.parametrize("bias", [True, False])
def test_what_only_predicts_says_the_same_of_an_image_in_every_batch(bias):
    plain, ours = for_inference(128, 72, bias=bias)
    levels = [level.detach() for level in maps(*LEVELS, images=3)]
    found = apply(ours, levels)
    for level, one in zip(levels, found, strict=True):
        assert not torch.equal(one, plain(level))
        assert_close(one, plain(level))
    for number in range(3):
        alone = apply(ours, [level[number : number + 1] for level in levels])
        for one, expected in zip(alone, found, strict=True):
            assert torch.equal(one, expected[number : number + 1])
    none = levels[0][:0]
    assert ours(none).shape == plain(none).shape


def test_what_only_predicts_compiles_as_one_graph_for_all_sizes():
    _, model = for_inference(128, 64)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    compiled(torch.randn(1, 128, 30, 32))
    with torch.compiler.set_stance("fail_on_recompile"):
        for side in (48, 60):
            compiled(torch.randn(1, 128, side, side + 2))


def test_convolutions_of_other_geometry_or_class_are_not_replaced():
    class Special(nn.Conv2d):
        pass

    model = nn.ModuleList([Special(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3)])
    layers = list(model)
    replace_convolutions(model)
    assert all(new is old for new, old in zip(model, layers, strict=True))


def test_replacing_keeps_parameters_names_and_random_numbers():
    model = nn.Sequential(nn.Conv2d(8, 4, 3, stride=2, padding=1, bias=False), nn.Conv2d(8, 8, 1))
    names, parameters = list(model.state_dict()), list(model.parameters())
    state = torch.get_rng_state()
    replace_convolutions(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(model[0], Conv3x3)
    assert (model[0].stride, model[0].bias) == ((2, 2), None)
    assert list(model.state_dict()) == names
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))
