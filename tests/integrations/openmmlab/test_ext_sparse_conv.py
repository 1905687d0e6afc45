"""Sparse convolution and pooling through mmcv's own layers, against dense convolution and brute force."""

import itertools
import types

import mmcv.ops
import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import SparseConvTensor, sparse_ops

from kernelgraft_openmmlab.sparse_layers import layers_for

from .grids import SHAPE, dense_of, scattered

CONVOLUTIONS = [
    ("SubMConv3d", {"kernel_size": 3, "padding": 1}),
    ("SubMConv3d", {"kernel_size": (1, 3, 3)}),
    ("SubMConv3d", {"kernel_size": 2}),
    ("SubMConv3d", {"kernel_size": 1}),
    ("SparseConv3d", {"kernel_size": 3, "stride": 2, "padding": 1}),
    ("SparseConv3d", {"kernel_size": 3, "stride": 2, "padding": (0, 1, 1)}),
    ("SparseConv3d", {"kernel_size": (3, 1, 1), "stride": (2, 1, 1)}),
    ("SparseConv3d", {"kernel_size": 2, "stride": 2}),
    ("SparseConv3d", {"kernel_size": 3, "dilation": 2, "padding": 2}),
    ("SparseConvTranspose3d", {"kernel_size": 3, "stride": 2, "padding": 1}),
]


def dense_convolution(name, layer, dense):
    weight = layer.weight.double().movedim(-1, 0).movedim(-1, 1)  # (C_out, C_in, *kernel)
    if name == "SubMConv3d":  # centred at half the kernel
        pads = [side for k in reversed(layer.kernel_size) for side in (k // 2, k - 1 - k // 2)]
        return F.conv3d(F.pad(dense, pads), weight, layer.bias.double())
    if name == "SparseConvTranspose3d":
        return F.conv_transpose3d(dense, weight.transpose(0, 1), layer.bias.double(), layer.stride, layer.padding)
    return F.conv3d(dense, weight, layer.bias.double(), layer.stride, layer.padding, layer.dilation)


@pytest.mark.parametrize(("name", "arguments"), CONVOLUTIONS, ids=lambda value: str(value))
def test_layers_of_mmcv_equal_dense_convolution_with_every_gradient(name, arguments):
    features, indices = scattered()
    layer = getattr(mmcv.ops, name)(5, 4, **arguments)
    x = features.clone().requires_grad_()
    out = layer(SparseConvTensor(x, indices, list(SHAPE), 2))
    assert isinstance(out, SparseConvTensor)
    grad = torch.randn(out.features.shape)
    out.features.backward(grad)

    wide = features.double().requires_grad_()
    truth = dense_convolution(name, layer, dense_of(wide, indices))
    assert list(truth.shape[2:]) == list(out.spatial_shape)
    places = out.indices.long()
    at_sites = truth.movedim(1, -1)[tuple(places.T)]
    torch.testing.assert_close(out.features.double(), at_sites, atol=1e-5, rtol=1e-5)
    mine = {key: value.grad for key, value in layer.named_parameters()}
    layer.zero_grad()
    at_sites.backward(grad.double())
    torch.testing.assert_close(x.grad.double(), wide.grad, atol=1e-5, rtol=1e-5)
    for key, value in layer.named_parameters():
        torch.testing.assert_close(mine[key], value.grad, atol=1e-4, rtol=1e-4)


def test_an_inverse_layer_undoes_the_layer_of_its_key():
    features, indices = scattered()
    down = mmcv.ops.SparseConv3d(5, 6, 3, stride=2, padding=1, indice_key="a", bias=False)
    up = mmcv.ops.SparseInverseConv3d(6, 3, 3, indice_key="a", bias=False)
    x = features.clone().requires_grad_()
    out = up(down(SparseConvTensor(x, indices, list(SHAPE), 2)))
    assert torch.equal(out.indices, indices)
    out.features.sum().backward()

    wide = features.double().requires_grad_()
    coarse = F.conv3d(dense_of(wide, indices), down.weight.double().permute(4, 3, 0, 1, 2), None, 2, 1)
    sites = F.conv3d(dense_of(torch.ones(60, 1), indices), torch.ones(1, 1, 3, 3, 3), None, 2, 1) > 0
    coarse = torch.where(sites, coarse, 0)
    weight = up.weight.double().permute(3, 4, 0, 1, 2)
    size = [n - ((c - 1) * 2 + 1) for n, c in zip(SHAPE, coarse.shape[2:], strict=True)]
    truth = F.conv_transpose3d(coarse, weight, None, 2, 1, size).movedim(1, -1)[tuple(indices.long().T)]
    torch.testing.assert_close(out.features.double(), truth, atol=1e-5, rtol=1e-5)
    truth.sum().backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("subm", [True, False])
@pytest.mark.parametrize("transpose", [True, False])
def test_pairs_are_in_mmcvs_format(subm, transpose):
    if subm and transpose:
        pytest.skip("there is no such layer")
    _, indices = scattered(40)
    stride, padding = (1, 1) if subm else (2, 1)
    outputs, pairs, counts = sparse_ops.get_indice_pairs(
        indices, 2, list(SHAPE), 3, stride, padding, 1, 0, subm, transpose
    )
    assert (pairs.dtype, pairs.shape, counts.dtype) == (torch.int32, (27, 2, 40), torch.int32)
    assert outputs is indices or not subm
    rows = {tuple(row): i for i, row in enumerate(outputs.tolist())}
    assert len(rows) == len(outputs)
    for k, tap in enumerate(itertools.product(range(3), repeat=3)):
        expected = set()
        for i, (b, *site) in enumerate(indices.tolist()):
            if transpose:
                at = [p * 2 - 1 + t for p, t in zip(site, tap, strict=True)]
            else:
                moved = [p + 1 - t for p, t in zip(site, tap, strict=True)]
                if any(m % stride for m in moved):
                    continue
                at = [m // stride for m in moved]
            if (b, *at) in rows:
                expected.add((i, rows[b, *at]))
        n = int(counts[k])
        assert set(zip(*pairs[k, :, :n].tolist(), strict=True)) == expected
        assert (pairs[k, :, n:] == -1).all()


def test_pairs_that_were_copied_are_understood():
    features, indices = scattered()
    layer = mmcv.ops.SubMConv3d(5, 4, 3, bias=False)
    outputs, pairs, counts = sparse_ops.get_indice_pairs(indices, 2, list(SHAPE), 3, 1, 1, subm=True)
    known = sparse_ops.indice_conv(features, layer.weight, pairs, counts, len(outputs))
    copied = sparse_ops.indice_conv(features, layer.weight, pairs.clone(), counts, len(outputs))
    assert torch.equal(known, copied)


def test_layers_of_one_key_and_different_kernels_share_pairs_as_in_cylinder3d():
    """mmcv gives the second layer the pairs of the first, which has fewer taps; published weights count on it."""
    features, indices = scattered()
    first = mmcv.ops.SubMConv3d(5, 5, (1, 3, 3), indice_key="a", bias=False)
    second = mmcv.ops.SubMConv3d(5, 4, 3, indice_key="a", bias=False)
    out = second(first(SparseConvTensor(features, indices, list(SHAPE), 2)))
    alone = mmcv.ops.SubMConv3d(5, 4, (1, 3, 3), bias=False)
    alone.weight.data = second.weight.data.reshape(27, 5, 4)[:9].reshape(1, 3, 3, 5, 4)
    expected = alone(first(SparseConvTensor(features, indices, list(SHAPE), 2)))
    torch.testing.assert_close(out.features, expected.features)
    out.features.sum().backward()
    gradient = second.weight.grad.reshape(27, 5, 4)
    assert (gradient[:9] != 0).any()
    assert (gradient[9:] == 0).all()


@pytest.mark.parametrize("shift", [0.0, -3.0], ids=["mixed", "negative"])
def test_max_pooling_begins_at_zero_as_in_compiled_mmcv(shift):
    features, indices = scattered()
    x = (features + shift).requires_grad_()
    layer = mmcv.ops.SparseMaxPool3d(3, stride=2, padding=1)
    out = layer(SparseConvTensor(x, indices, list(SHAPE), 2))
    out.features.sum().backward()
    dense = dense_of((features + shift).double(), indices).requires_grad_()
    there = dense_of(torch.ones(60, 1), indices).bool()
    truth = F.max_pool3d(torch.where(there, dense, -torch.inf), 3, 2, 1).clamp(min=0)
    at_sites = truth.movedim(1, -1)[tuple(out.indices.long().T)]
    torch.testing.assert_close(out.features.double(), at_sites)
    at_sites.sum().backward()
    given = dense.grad.movedim(1, -1)[tuple(indices.long().T)]
    torch.testing.assert_close(x.grad.double(), given)


def test_two_dimensions():
    features, indices = scattered(30, shape=(9, 8))
    layer = mmcv.ops.SubMConv2d(5, 4, 3)
    out = layer(SparseConvTensor(features, indices, [9, 8], 2))
    dense = dense_of(features, indices, shape=(9, 8))
    truth = F.conv2d(dense, layer.weight.permute(3, 2, 0, 1), layer.bias, padding=1)
    torch.testing.assert_close(out.features, truth.movedim(1, -1)[tuple(indices.long().T)], atol=1e-5, rtol=1e-5)


def test_four_dimensions():
    from mmcv.ops.sparse_conv import SubMConv4d

    shape = (4, 5, 3, 4)
    features, indices = scattered(30, shape=shape)
    layer = SubMConv4d(5, 4, 3, bias=False)
    out = layer(SparseConvTensor(features, indices, list(shape), 2))
    taps = itertools.product((-1, 0, 1), repeat=4)
    rows = {tuple(row): i for i, row in enumerate(indices.tolist())}
    truth = torch.zeros(30, 4)
    for weight, tap in zip(layer.weight.detach().reshape(81, 5, 4), taps, strict=True):
        for row, i in rows.items():
            neighbour = rows.get((row[0], *(a + b for a, b in zip(row[1:], tap, strict=True))))
            if neighbour is not None:
                truth[i] += features[neighbour] @ weight
    torch.testing.assert_close(out.features, truth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [0, 1])
def test_none_and_one_site(rows):
    features, indices = scattered(rows)
    x = features.requires_grad_()
    net = mmcv.ops.SparseSequential(
        mmcv.ops.SubMConv3d(5, 4, 3, indice_key="s"), mmcv.ops.SparseConv3d(4, 3, 3, stride=2, padding=1)
    )
    out = net(SparseConvTensor(x, indices, list(SHAPE), 2))
    assert len(out.features) == len(out.indices) >= rows
    dense = out.dense()
    assert dense.shape == (2, 3, 4, 5, 4)
    dense.sum().backward()
    assert x.grad.shape == (rows, 5)


def test_sites_outside_of_the_grid_and_doubles_are_refused():
    features, indices = scattered(4)
    layer = mmcv.ops.SubMConv3d(5, 4, 3)
    beyond = indices.clone()
    beyond[2, 1] = 7
    with pytest.raises(ValueError, match=r"row 2 of the coordinates is \[.*\], which is beyond"):
        layer(SparseConvTensor(features, beyond, list(SHAPE), 2))
    double = indices.clone()
    double[3] = double[1]
    with pytest.raises(ValueError, match="rows 1 and 3 of the coordinates are both"):
        layer(SparseConvTensor(features, double, list(SHAPE), 2))


def test_a_kernel_that_does_not_fit_has_no_outputs_as_in_mmcv():
    features, indices = torch.randn(1, 5), torch.zeros(1, 4, dtype=torch.int32)
    for layers in (mmcv.ops, types.SimpleNamespace(**layers_for(mmcv.ops.SparseModule))):
        net = mmcv.ops.SparseSequential(
            layers.SparseConv3d(5, 6, 2, stride=2, indice_key="a", bias=False),
            layers.SubMConv3d(6, 6, 3, bias=False),
            layers.SparseConv3d(6, 6, 2, stride=2, indice_key="b", bias=False),
            layers.SparseInverseConv3d(6, 6, 2, indice_key="b", bias=False),
            layers.SparseInverseConv3d(6, 4, 2, indice_key="a", bias=False),
        )
        assert torch.equal(net(SparseConvTensor(features, indices, [1, 1, 1], 1)).features, torch.zeros(1, 4))


def test_weights_that_are_exchanged_behind_autograds_back_are_seen():
    """By ``.data``, as averages of weights, ``vector_to_parameters`` and ``Module.half`` do it."""
    features, indices = scattered()
    layer = mmcv.ops.SubMConv3d(5, 4, 3, bias=False)

    def run(dtype=torch.float32):
        return layer(SparseConvTensor(features.to(dtype), indices, list(SHAPE), 2)).features

    with torch.no_grad():
        before = run()
        layer.weight.data = layer.weight.data * 2
        torch.testing.assert_close(run(), 2 * before)
        layer.weight.data.mul_(2)
        torch.testing.assert_close(run(), 4 * before)
        layer.half()
        torch.testing.assert_close(run(torch.float16).float(), 4 * before, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("inference", [False, True])
def test_a_buffer_of_indices_that_holds_the_next_scan_is_seen(inference):
    layer = mmcv.ops.SubMConv3d(5, 4, 3, bias=False)
    (first, a), (second, b) = scattered(seed=0), scattered(seed=1)
    buffer = a.numpy().copy()
    with torch.inference_mode(inference):
        indices = torch.from_numpy(buffer)
        layer(SparseConvTensor(first, indices, list(SHAPE), 2))
        buffer[:] = b.numpy()
        out = layer(SparseConvTensor(second, indices, list(SHAPE), 2))
        expected = layer(SparseConvTensor(second, b, list(SHAPE), 2))
    assert torch.equal(out.features, expected.features)
