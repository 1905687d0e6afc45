"""Weights of other libraries: every layout is dense convolution with the weight that it stands for."""

import itertools

import pytest
import torch

from kernelgraft_core.sparse import nn
from kernelgraft_core.sparse.layouts import LAYOUTS, convert_checkpoint, convert_weight

SIZES = [(3, 3, 3), (2, 2, 2), (1, 3, 5), (2, 1, 3), (1, 1, 1)]


def tap_of(layout, size, weight, x, y, z):
    """``(Cin, Cout)`` of one tap, written down from each library's documentation."""
    kx, ky, kz = size
    if layout in ("mmcv", "spconv1"):
        return weight[z, y, x]
    if layout == "spconv2":
        return weight[:, z, y, x].T
    first_fastest, last_fastest = x + kx * (y + ky * z), z + kz * (y + ky * x)
    if layout == "kernelgraft":
        return weight[last_fastest, 0]
    if layout == "kernelgraft_zyx":
        return weight[first_fastest, 0]
    if weight.dim() == 2:
        return weight
    even = kx * ky * kz % 2 == 0
    return weight[last_fastest if layout == "torchsparse" and even else first_fastest]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_every_tap_stays_what_it_is(source, target, size):
    ours = torch.randn(size[0] * size[1] * size[2], 1, 4, 5)
    weight = convert_weight(ours, "kernelgraft", source, size)
    found = convert_weight(weight, source, target, size)
    assert found.is_contiguous()
    for tap in itertools.product(*map(range, size)):
        assert torch.equal(tap_of(target, size, found, *tap), tap_of("kernelgraft", size, ours, *tap))
    assert torch.equal(convert_weight(found, target, "kernelgraft", size), ours)


def test_a_checkpoint_goes_there_and_back():
    model = torch.nn.Sequential(nn.SubMConv3d(4, 6, 3), nn.BatchNorm(6), nn.Conv3d(6, 5, (2, 1, 3), 2))
    state = model.state_dict()
    for layout in LAYOUTS:
        away = convert_checkpoint(state, "kernelgraft", layout, model)
        names = [key.replace("weight", "kernel") if key in ("0.weight", "2.weight") else key for key in state]
        assert list(away) == (names if layout in ("torchsparse", "minkowski") else list(state))
        assert away["0.bias"].shape == ((1, 6) if layout == "minkowski" else (6,))
        back = convert_checkpoint(away, layout, "kernelgraft", {"0": (3, 3, 3), "2": (2, 1, 3)})
        assert all(torch.equal(back[key], state[key]) for key in state)


def test_shapes_of_kernels_are_found_where_they_can_be():
    state = {"a.weight": torch.randn(6, 2, 3, 1, 4), "a.bias": torch.randn(6), "n.weight": torch.randn(6)}
    found = convert_checkpoint(state, "spconv2", "mmcv")
    assert found["a.weight"].shape == (2, 3, 1, 4, 6)
    flat = {"a.kernel": torch.randn(27, 4, 6), "b.kernel": torch.randn(6, 7)}
    found = convert_checkpoint(flat, "torchsparse", "spconv2")
    assert found["a.weight"].shape == (6, 3, 3, 3, 4)
    assert found["b.weight"].shape == (7, 1, 1, 1, 6)
    alone = convert_checkpoint({"kernel": torch.randn(8, 4, 6)}, "minkowski", "kernelgraft")
    assert alone["weight"].shape == (8, 1, 4, 6)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (({}, "spconv3", "mmcv"), "layout is 'spconv3', expected one of kernelgraft"),
        (({"a.kernel": torch.zeros(6, 1, 1)}, "torchsparse", "mmcv"), "a.kernel has 6 taps, which are no cube"),
        (({}, "kernelgraft", "mmcv"), "pass kernel_sizes"),
        (({"b.weight": torch.zeros(1)}, "mmcv", "spconv2", {"a": (3, 3, 3)}), r"no a\.weight; it has b\.weight"),
        (({"a.weight": torch.zeros(27, 1, 2)}, "mmcv", "spconv2", {"a": (3, 3, 3)}), r"mmcv is \(27, 1, 2\)"),
        (({"a.weight": torch.zeros(27, 2, 2, 2)}, "kernelgraft", "mmcv", {"a": (3, 3, 3)}), "groups is 2"),
    ],
)
def test_what_cannot_be_converted_is_named(args, message):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(*args)
