"""The facade of torchsparse at both levels: its kernels, its coordinates and its functions on points."""

import importlib
import itertools
import sys

import numpy as np
import pytest
import torch

from kernelgraft_core.sparse import nn as own_nn
from kernelgraft_core.sparse.compat import torchsparse as ts
from kernelgraft_core.sparse.compat.modules import facade_modules
from kernelgraft_core.sparse.layouts import convert_weight
from kernelgraft_core.sparse.tensor import SparseTensor

from .clouds import random_sites


def tensors(channels=4):
    """The same sites for both levels."""
    sites = random_sites(3)
    feats = torch.randn(len(sites), channels)
    rows = sites.indices
    return ts.SparseTensor(feats, rows[:, [1, 2, 3, 0]]), ts.SparseTensor2(feats, rows, 1, (2, 10, 12, 6))


def defined(x, layer):
    """A convolution of version 1.4 as it is defined: taps one after another, rows in a dict."""
    table = {tuple(row): feats for row, feats in zip(x.coords.tolist(), x.feats, strict=True)}
    stride = [a * b for a, b in zip(x.stride, layer.stride, strict=True)]
    offsets = ts.get_kernel_offsets(layer.kernel_size, x.stride, layer.dilation).tolist()
    low = x.coords[:, :3].amin(0).tolist()
    outputs = set()
    for *site, batch in table:
        if all(s in (1, k) for s, k in zip(layer.stride, layer.kernel_size, strict=True)):
            outputs.add((*(c // s * s for c, s in zip(site, stride, strict=True)), batch))
            continue
        for offset in offsets:
            moved = [c + o for c, o in zip(site, offset, strict=True)]
            if all(c % s == 0 and c >= least for c, s, least in zip(moved, stride, low, strict=True)):
                outputs.add((*moved, batch))
    found = {}
    kernel = layer.kernel.view(len(offsets), *layer.kernel.shape[-2:])
    for *site, batch in outputs:
        total = torch.zeros(kernel.shape[2])
        for offset, weight in zip(offsets, kernel, strict=True):
            read = table.get((*(c + o for c, o in zip(site, offset, strict=True)), batch))
            total = total if read is None else total + read @ weight
        found[*site, batch] = total
    return found


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(3, 1, 1), (3, 1, 2), (2, 2, 1), (3, 2, 1), ((3, 3, 2), (1, 1, 2), 1), (2, 1, 1)]
)
def test_version_1_4_is_its_definition(kernel, stride, dilation):
    x, _ = tensors()
    layer = ts.Conv3d(4, 5, kernel, stride, dilation)
    found, wanted = layer(x), defined(x, layer)
    rows = found.coords.tolist()
    assert set(map(tuple, rows)) == set(wanted)
    torch.testing.assert_close(found.feats, torch.stack([wanted[tuple(row)] for row in rows]), rtol=1e-4, atol=1e-5)
    assert found.stride == tuple(torch.tensor([1, 1, 1]).mul(torch.tensor(stride)).tolist())


def test_both_levels_compute_the_same_and_go_back():
    first, second = tensors()
    first.feats.requires_grad_()
    down, up = ts.Conv3d(4, 6, 2, 2), ts.Conv3d(6, 4, 2, 2, transposed=True)
    other_down, other_up = ts.Conv3d2(4, 6, 2, 2), ts.Conv3d2(6, 4, 2, 2, transposed=True)
    other_down.load_state_dict(down.state_dict())
    other_up.load_state_dict(up.state_dict())
    coarse, coarse2 = down(first), other_down(second)
    assert torch.equal(coarse.coords[:, :3], coarse2.coords[:, 1:] * 2)
    assert torch.equal(coarse.feats, coarse2.feats)
    back, back2 = up(coarse), other_up(coarse2)
    assert back.coords is first.coords
    assert torch.equal(back.feats, back2.feats)
    assert (back.stride, back2.stride) == ((1, 1, 1), (1, 1, 1))
    back.feats.sum().backward()
    assert first.feats.grad is not None
    with pytest.raises(ValueError, match="nothing to go back to"):
        up(ts.SparseTensor(coarse.feats, coarse.coords, 2))


def test_version_2_pads_as_torch_does():
    _, x = tensors()
    layer, ours = ts.Conv3d2(4, 5, 3, 2, 1, bias=True), own_nn.Conv3d(4, 5, 3, 2, 1)
    weight = convert_weight(layer.kernel.detach(), "torchsparse", "kernelgraft", (3, 3, 3))
    ours.load_state_dict({"weight": weight, "bias": layer.bias.detach()})
    found, wanted = layer(x), ours(SparseTensor(x.feats, x.sites()))
    assert torch.equal(found.coords, wanted.coords)
    torch.testing.assert_close(found.feats, wanted.feats)
    assert found.spatial_range == (2, *wanted.spatial_shape)
    with pytest.raises(ValueError, match="generative"):
        ts.Conv3d2(4, 4, 2, 2, generative=True)


def test_layers_keep_what_is_known_of_the_sites():
    x, _ = tensors()
    made = ts.ReLU(True)(ts.BatchNorm(4)(ts.Conv3d(4, 4, 3)(x)))
    assert made.kmaps is x.kmaps
    assert made.sites() is x.sites()
    assert ts.Conv3d(4, 4, 1)(x).sites() is x.sites()
    assert ts.GroupNorm(2, 4)(x).feats.shape == x.feats.shape
    assert ts.GlobalMaxPool()(x).shape == (2, 4)
    assert ts.cat([x, made]).feats.shape[1] == 8
    assert torch.equal((x + made).feats, x.feats + made.feats)


def test_points_go_to_voxels_and_back():
    x, _ = tensors()
    points = torch.cat((torch.rand(200, 3) * 6, torch.randint(2, (200, 1)).float()), 1)
    numbers = ts.sphash(torch.floor(points).int())
    queried = ts.sphashquery(numbers, ts.sphash(x.C))
    table = {tuple(row): i for i, row in enumerate(x.coords.tolist())}
    assert queried.tolist() == [table.get(tuple(row), -1) for row in points.floor().int().tolist()]
    counts = ts.spcount(queried.int(), len(x.C))
    assert counts.sum() == (queried >= 0).sum()
    feats = torch.randn(200, 3, requires_grad=True)
    voxels = ts.spvoxelize(feats, queried, counts)
    full = int(counts.argmax())
    torch.testing.assert_close(voxels[full], feats[queried == full].mean(0))
    offsets = ts.get_kernel_offsets(2, 1)
    around = ts.sphashquery(ts.sphash(points.floor().int(), offsets), ts.sphash(x.C))
    assert around.shape == (8, 200)
    weights = ts.calc_ti_weights(points, around)
    there = (around >= 0).any(0)
    torch.testing.assert_close(weights.sum(0)[there], torch.ones(int(there.sum())), rtol=1e-3, atol=1e-3)
    back = ts.spdevoxelize(voxels, around.T.contiguous(), weights.T.contiguous())
    assert back.shape == (200, 3)
    back.sum().backward()
    assert feats.grad is not None


def test_offsets_are_in_torchsparse_s_order():
    assert ts.get_kernel_offsets(2, 4).tolist() == [list(each) for each in itertools.product((0, 4), repeat=3)]
    odd = ts.get_kernel_offsets(3).tolist()
    assert odd[:3] == [[-1, -1, -1], [0, -1, -1], [1, -1, -1]]
    assert odd[-1] == [1, 1, 1]
    with pytest.raises(ValueError, match="expected -32768 to 32767"):
        ts.sphash(torch.tensor([[40000, 0, 0, 0]]))


def test_samples_are_collated_and_quantized():
    a, b = (ts.SparseTensor(torch.randn(n, 2), torch.arange(3 * n).view(n, 3)) for n in (2, 3))
    one = ts.sparse_collate([a, b])
    assert one.coords[:, 3].tolist() == [0, 0, 1, 1, 1]
    assert ts.sparse_collate([a, b], "2").coords[:, 0].tolist() == [0, 0, 1, 1, 1]
    cells, first, which = ts.sparse_quantize(
        np.array([[0.1, 0, 0], [1.2, 0, 0], [0.3, 0, 0]]), 1.0, return_index=True, return_inverse=True
    )
    assert cells.tolist() == [[0, 0, 0], [1, 0, 0]]
    assert (first.tolist(), which.tolist()) == ([0, 1], [0, 1, 0])


@pytest.mark.parametrize(("facade", "tensor", "conv"), [("torchsparse", ts.SparseTensor, ts.Conv3d),
                                                        ("torchsparse2", ts.SparseTensor2, ts.Conv3d2)])  # fmt: skip
def test_modules_have_torchsparse_s_names(facade, tensor, conv, monkeypatch):
    for name, module in facade_modules(facade).items():
        monkeypatch.setitem(sys.modules, name, module)
    import torchsparse
    import torchsparse.nn as spnn
    from torchsparse.nn.functional import sphash
    from torchsparse.nn.utils import get_kernel_offsets
    from torchsparse.utils.collate import sparse_collate_fn
    from torchsparse.utils.quantize import sparse_quantize

    assert torchsparse.SparseTensor is tensor
    assert spnn.Conv3d is conv
    assert (sphash, get_kernel_offsets, sparse_quantize) == (ts.sphash, ts.get_kernel_offsets, ts.sparse_quantize)
    sample = {"lidar": tensor(torch.randn(2, 2), torch.arange(6).view(2, 3)), "name": "a", "n": np.arange(2)}
    found = sparse_collate_fn([sample, sample])
    assert isinstance(found["lidar"], tensor)
    assert found["n"].shape == (2, 2)
    assert found["name"] == ["a", "a"]
    assert importlib.import_module("torchsparse.tensor").PointTensor is ts.PointTensor


def test_a_transposed_layer_without_stride_reads_the_other_way():
    x, _ = tensors()
    plain, transposed = ts.Conv3d(4, 5, 3), ts.Conv3d(4, 5, 3, transposed=True)
    transposed.load_state_dict({"kernel": plain.kernel.flip(0)})
    torch.testing.assert_close(transposed(x).feats, plain(x).feats)


def test_features_of_another_length_are_named():
    x, _ = tensors()
    x.F = x.F[:5]
    with pytest.raises(ValueError, match="5 rows of features"):
        ts.Conv3d(4, 4, 3)(x)
