"""The facade of spconv: layers with spconv's weights are dense convolutions, and networks run as they are written."""

import importlib
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kernelgraft_core.sparse.compat import spconv
from kernelgraft_core.sparse.compat.modules import facade_modules

from .clouds import random_sites

SubMConv3d, SparseConv3d = spconv.LAYERS["SubMConv3d"], spconv.LAYERS["SparseConv3d"]
SparseInverseConv3d = spconv.LAYERS["SparseInverseConv3d"]


@pytest.fixture
def x():
    sites = random_sites(3)
    return spconv.SparseConvTensor(torch.randn(len(sites), 4), sites.indices, sites.spatial_shape, 2)


def at(dense, found):
    return dense.movedim(1, -1)[tuple(found.indices.long().T)]


@pytest.mark.parametrize(
    ("options", "padding"),
    [({"kernel_size": 3, "stride": 2, "padding": 1}, 1), ({"kernel_size": (3, 1, 2), "stride": (2, 1, 1)}, 0)],
)
def test_strided_layers_are_dense_convolutions(options, padding, x):
    layer = SparseConv3d(4, 6, **options, bias=True, indice_key="a", algo=spconv.ConvAlgo.Native)
    assert layer.weight.shape == (6, *layer.kernel_size, 4)
    found = layer(x)
    dense = F.conv3d(x.dense(), layer.weight.movedim(-1, 1), layer.bias, layer.stride, padding)
    assert list(dense.shape[2:]) == found.spatial_shape
    torch.testing.assert_close(found.features, at(dense, found), rtol=1e-4, atol=1e-5)
    assert found.find_indice_pair("a") is x.indice_dict["a"]


def test_submanifold_layers_stay_where_they_are(x):
    layer = SubMConv3d(4, 6, 3, padding=1, bias=False, indice_key="s")
    found = layer(x)
    assert found.coordinates is x.coordinates
    dense = F.conv3d(x.dense(), layer.weight.movedim(-1, 1), padding=1)
    torch.testing.assert_close(found.features, at(dense, x), rtol=1e-4, atol=1e-5)


def test_transposed_layers_are_dense_ones(x):
    layer = spconv.LAYERS["SparseConvTranspose3d"](4, 6, 3, 2, 1, output_padding=1)
    found = layer(x)
    dense = F.conv_transpose3d(x.dense(), layer.weight.movedim(-1, 1).transpose(0, 1), layer.bias, 2, 1, 1)
    assert list(dense.shape[2:]) == found.spatial_shape
    torch.testing.assert_close(found.features, at(dense, found), rtol=1e-4, atol=1e-5)


def test_an_inverse_goes_back_to_the_sites_of_its_key(x):
    down = SparseConv3d(4, 6, 3, 2, 1, indice_key="d", bias=False)
    up = SparseInverseConv3d(6, 5, 3, indice_key="d", bias=False)
    found = up(down(x))
    assert torch.equal(found.indices, x.indices)
    dense = F.conv_transpose3d(
        down(x).dense(), up.weight.movedim(-1, 1).transpose(0, 1), None, 2, 1,
        [(size - 1) % 2 for size in x.spatial_shape],
    )  # fmt: skip
    torch.testing.assert_close(found.features, at(dense, x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no layer before has indice_key = 'd'"):
        up(x.replace_feature(torch.randn(len(x.features), 6)).__class__.from_dense(torch.ones(1, 3, 3, 3, 6)))
    with pytest.raises(ValueError, match=r"kernel_size \(3, 3, 3\), this layer has \(2, 2, 2\)"):
        SparseInverseConv3d(6, 5, 2, indice_key="d")(down(x))


def test_pooling_is_over_sites_that_are_there(x):
    found = spconv.LAYERS["SparseMaxPool3d"](2, 2)(x)
    low = x.dense() - 100 * (x.replace_feature(torch.ones_like(x.features)).dense() == 0)
    torch.testing.assert_close(found.features, at(F.max_pool3d(low, 2, 2, ceil_mode=False), found))
    ones = x.replace_feature(torch.ones_like(x.features))
    assert spconv.LAYERS["SparseAvgPool3d"](2, 2)(ones).features.eq(1).all()
    assert spconv.SparseGlobalMaxPool()(x).shape == (2, 4)


def test_a_sequential_gives_features_to_layers_on_features(x):
    net = spconv.SparseSequential(
        SubMConv3d(4, 6, 3, bias=False, indice_key="s"), nn.BatchNorm1d(6), nn.ReLU(),
        SubMConv3d(6, 6, 3, indice_key="s"), spconv.SparseReLU(), spconv.ToDense(),
    )  # fmt: skip
    assert list(net.state_dict())[:2] == ["0.weight", "1.weight"]
    out = net(x)
    assert out.shape == (2, 6, *x.spatial_shape)
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert isinstance(net[1], nn.BatchNorm1d)


def test_tensors_behave_as_spconv_s_do(x):
    with pytest.raises(ValueError, match="replace_feature"):
        x.features = x.features
    other = spconv.SparseConvTensor.from_dense(x.dense(channels_first=False))
    torch.testing.assert_close(other.dense(), x.dense())
    both = spconv.sparse_add(x, other, x.minus())
    torch.testing.assert_close(both.dense(), x.dense())
    assert len(x.select_by_index(torch.tensor([0, 5])).features) == 2
    assert x.spatial_size == 9 * 11 * 6


def test_groups_and_wrong_channels_are_refused(x):
    with pytest.raises(ValueError, match="groups is 2"):
        SubMConv3d(4, 4, 3, groups=2)
    with pytest.raises(ValueError, match="4 channels, expected 5"):
        SubMConv3d(5, 4, 3)(x)


def test_modules_have_spconv_s_names(monkeypatch):
    for name, module in facade_modules("spconv").items():
        monkeypatch.setitem(sys.modules, name, module)
    found = importlib.import_module("spconv.pytorch")
    assert found.SubMConv3d is SubMConv3d
    assert importlib.import_module("spconv").__version__ >= "2.0.0"
    from spconv.pytorch import SparseConvTensor, functional
    from spconv.pytorch.modules import SparseModule

    assert SparseConvTensor is spconv.SparseConvTensor
    assert issubclass(SubMConv3d, SparseModule)
    assert functional.sparse_add is spconv.sparse_add
    with pytest.raises(ValueError, match="facade is 'other'"):
        facade_modules("other")


def test_rows_keep_their_order_where_spconv_keeps_it(x):
    assert torch.equal(spconv.LAYERS["SparseConv3d"](4, 4, 1)(x).indices, x.indices)
    chosen = torch.tensor([7, 2, 5])
    found = x.select_by_index(chosen)
    assert torch.equal(found.indices, x.indices[chosen])
    assert torch.equal(found.features, x.features[chosen])


def test_indices_may_be_set(x):
    layer = SubMConv3d(4, 4, 3)
    layer(x)
    moved = x.indices.clone()
    moved[:, 1] = 8 - moved[:, 1]
    y = x.shadow_copy()
    y.indices = moved
    wanted = layer(spconv.SparseConvTensor(x.features, moved, x.spatial_shape, 2))
    assert torch.equal(layer(y).features, wanted.features)
