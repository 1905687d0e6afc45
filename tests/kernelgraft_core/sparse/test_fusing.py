"""Folded norms and activations compute what they did."""

import copy

import pytest
import torch

from kernelgraft_core.sparse import SparseTensor, nn
from kernelgraft_core.sparse.models import MinkUNet

from .clouds import random_sites


@pytest.fixture
def x():
    sites = random_sites(3)
    return SparseTensor(torch.randn(len(sites), 4), sites)


def with_statistics(model):
    """A model whose norms do something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm):
            for tensor in (module.running_mean, module.weight, module.bias):
                if tensor is not None:
                    torch.nn.init.normal_(tensor, 0.3)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_a_norm_and_an_activation_go_into_the_layer_before(bias, affine, x):
    layers = nn.SubMConv3d(4, 6, 3, groups=2, bias=bias), nn.BatchNorm(6, affine=affine), nn.ReLU(True)
    model = with_statistics(torch.nn.Sequential(*layers, nn.Conv3d(6, 3, 2, 2), nn.ReLU(), nn.ReLU()))
    fused = nn.fuse(copy.deepcopy(model))
    assert [type(layer).__name__ for layer in fused] == ["SubMConv3d", "Conv3d", "ReLU"]
    assert [layer.activation for layer in fused[:2]] == ["relu", "relu"]
    torch.testing.assert_close(fused(x).feats, model(x).feats, rtol=1e-5, atol=1e-5)


def test_a_network_computes_the_same(x):
    model = with_statistics(MinkUNet(4, 5, 0.25))
    fused = nn.fuse(copy.deepcopy(model))
    assert not any(isinstance(module, nn.BatchNorm) for module in fused.modules())
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


def test_what_does_not_follow_a_convolution_stays(x):
    model = with_statistics(torch.nn.Sequential(nn.ReLU(), nn.BatchNorm(4), nn.SubMConv3d(4, 4, 3)))
    assert len(nn.fuse(model)) == 3
    bare = torch.nn.Sequential(nn.SubMConv3d(4, 4, 3), nn.BatchNorm(4, track_running_stats=False)).eval()
    assert len(nn.fuse(bare)) == 2


def test_training_is_refused():
    with pytest.raises(ValueError, match="training mode"):
        nn.fuse(MinkUNet(4, 5, 0.25))


def test_a_layer_in_two_places_stays_as_it_is(x):
    shared = nn.SubMConv3d(4, 4, 3)
    model = with_statistics(
        torch.nn.Sequential(torch.nn.Sequential(shared, nn.BatchNorm(4)), torch.nn.Sequential(shared, nn.BatchNorm(4)))
    )
    wanted = model(x).feats
    torch.testing.assert_close(nn.fuse(model)(x).feats, wanted)
