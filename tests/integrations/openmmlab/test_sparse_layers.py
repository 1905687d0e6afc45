"""Our layers under mmcv's names: for its tensors and spconv's, from checkpoints of either, and taken off again."""

import logging
import pickle
import subprocess
import sys
import types
from collections import OrderedDict

import mmcv.ops
import pytest
import torch
from mmcv.ops import SparseConvTensor
from mmengine.registry import MODELS

from kernelgraft.patches import PatchSet
from kernelgraft_openmmlab.sparse_layers import active_sparse_module, layers_for, override_sparse_layers

from .grids import SHAPE, scattered

OURS = layers_for(mmcv.ops.SparseModule)
CASES = [
    ("SubMConv3d", {"kernel_size": 3}),
    ("SubMConv3d", {"kernel_size": 1}),
    ("SubMConv3d", {"kernel_size": 2}),
    ("SubMConv3d", {"kernel_size": 3, "dilation": 2}),
    ("SparseConv3d", {"kernel_size": 1, "stride": 2}),
    ("SubMConv2d", {"kernel_size": 3}),
    ("SparseConv3d", {"kernel_size": 3, "stride": 2, "padding": 1}),
    ("SparseConv3d", {"kernel_size": (3, 1, 1), "stride": (2, 1, 1)}),
    ("SparseConvTranspose3d", {"kernel_size": 3, "stride": 2, "padding": 1}),
]


def tensor(name="3d", **options):
    shape = SHAPE if "3d" in name else SHAPE[:2]
    features, indices = scattered(50, shape=shape, **options)
    return SparseConvTensor(features.requires_grad_(), indices, list(shape), 2)


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=str)
def test_ours_equal_mmcvs_with_every_gradient(name, arguments):
    theirs, ours = getattr(mmcv.ops, name)(5, 4, **arguments), OURS[name](5, 4, **arguments)
    ours.load_state_dict(theirs.state_dict())
    for layer in (ours, theirs):
        x = tensor(name)
        y = layer(x)
        y.features.square().sum().backward()
        layer.seen = y, x.features.grad
    (out, gradient), (expected, truth) = ours.seen, theirs.seen
    assert type(out) is SparseConvTensor
    assert torch.equal(out.indices, expected.indices)
    assert list(out.spatial_shape) == list(expected.spatial_shape)
    torch.testing.assert_close(out.features, expected.features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, truth, atol=1e-4, rtol=1e-4)
    for (key, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-3, rtol=1e-4, msg=key)


def test_an_encoder_and_decoder_in_a_container_of_mmcv():
    net = mmcv.ops.SparseSequential(
        OURS["SubMConv3d"](5, 8, 3, indice_key="s", bias=False),
        torch.nn.BatchNorm1d(8),
        torch.nn.ReLU(),
        OURS["SparseConv3d"](8, 8, 3, stride=2, padding=1, indice_key="d"),
        OURS["SparseInverseConv3d"](8, 4, 3, indice_key="d"),
    )
    x = tensor()
    out = net(x)
    assert out.indices is x.indices or torch.equal(out.indices, x.indices)
    out.features.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def spconv2_layout(state):
    turned = OrderedDict((k, v.movedim(-1, 0) if k.endswith("weight") else v) for k, v in state.items())
    turned._metadata = {"": {"version": 2}}
    return turned


@pytest.mark.parametrize("channels", [(5, 4), (3, 3)], ids=["told by shape", "told by version"])
def test_weights_of_spconv_2_are_turned_and_those_of_mmcv_are_not(channels):
    theirs, ours = mmcv.ops.SubMConv3d(*channels, 3), OURS["SubMConv3d"](*channels, 3)
    state = theirs.state_dict()
    turned = spconv2_layout(state)
    kept = {key: value.clone() for key, value in turned.items()}
    assert str(ours.load_state_dict(turned)) == "<All keys matched successfully>"
    assert torch.equal(ours.weight, theirs.weight)
    assert all(torch.equal(turned[key], value) for key, value in kept.items())  # the caller's dict is its own
    ours.weight.data.zero_()
    ours.load_state_dict(state)
    assert torch.equal(ours.weight, theirs.weight)
    ours.weight.data.zero_()
    ours.load_state_dict(dict(state))  # no metadata: mmcv's where the shape leaves it open
    assert torch.equal(ours.weight, theirs.weight)


def test_what_is_saved_is_in_mmcvs_layout():
    ours, theirs = OURS["SparseConv3d"](3, 3, 3), mmcv.ops.SparseConv3d(3, 3, 3)
    state = ours.state_dict()
    assert state._metadata[""]["version"] != 2  # which mmdet3d would take for spconv's
    theirs.load_state_dict(state)
    assert torch.equal(ours.weight, theirs.weight)


def test_a_weight_of_another_shape_and_a_missing_one_are_refused_by_name():
    ours = torch.nn.Sequential(OURS["SubMConv3d"](5, 4, 3))
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight: .*\[27, 5, 4\].*\[3, 3, 3, 5, 4\]"):
        ours.load_state_dict({"0.weight": torch.zeros(27, 5, 4), "0.bias": torch.zeros(4)})
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0\.weight"'):
        ours.load_state_dict({"0.bias": torch.zeros(4)})


def test_the_registry_is_overridden_and_restored():
    active_sparse_module()  # imports mmdet3d, which registers its own
    before = dict(MODELS._module_dict)
    patches = PatchSet("test")
    override_sparse_layers(patches)
    layer = MODELS.build({"type": "SubMConv3d", "in_channels": 2, "out_channels": 3, "kernel_size": 3})
    assert type(layer) is OURS["SubMConv3d"]
    assert isinstance(layer, mmcv.ops.SparseModule)
    patches.undo()
    assert MODELS._module_dict == before


def test_layers_of_one_key_and_different_kernels_are_reported(caplog):
    x = tensor()
    first = OURS["SubMConv3d"](5, 5, (1, 3, 3), indice_key="shared")
    second = OURS["SubMConv3d"](5, 4, (3, 1, 3), indice_key="shared")
    with caplog.at_level(logging.WARNING, "kernelgraft"):
        out = second(first(x))
    assert "indice_key = 'shared' belongs to kernel_size (1, 3, 3) and to (3, 1, 3)" in caplog.text
    alone = OURS["SubMConv3d"](5, 4, (3, 1, 3))
    alone.load_state_dict(second.state_dict())
    assert torch.equal(out.features, alone(first(tensor())).features)


def test_wrong_arguments_and_inputs_are_refused():
    with pytest.raises(ValueError, match="groups is 2"):
        OURS["SubMConv3d"](4, 4, 3, groups=2)
    with pytest.raises(ValueError, match="dataflow"):
        OURS["SubMConv3d"](4, 4, 3, dataflow="fast")
    with pytest.raises(ValueError, match="the input has 5 channels, expected 6"):
        OURS["SubMConv3d"](6, 4, 3)(tensor())
    with pytest.raises(ValueError, match="indice_key = 'nowhere': there is nothing to invert"):
        OURS["SparseInverseConv3d"](5, 4, 3, indice_key="nowhere")(tensor())


def test_under_spconv_2_they_are_modules_of_its_own():
    """The facade stands for spconv, whose class mmdet3d then asks for."""
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            """
import kernelgraft, torch
kernelgraft.load_plugin("sparse-conv", facade="spconv")
import kernelgraft.openmmlab
from mmdet3d.models.layers.spconv import IS_SPCONV2_AVAILABLE
from mmdet3d.models.layers.sparse_block import make_sparse_convmodule
from spconv.pytorch import SparseConvTensor, SparseModule
assert IS_SPCONV2_AVAILABLE
net = make_sparse_convmodule(5, 4, 3, "key", padding=1)
assert type(net[0]).__module__ == "kernelgraft_openmmlab.sparse_layers" and isinstance(net[0], SparseModule)
down = make_sparse_convmodule(4, 4, 3, "down", stride=2, padding=1, conv_type="SparseConv3d")
up = make_sparse_convmodule(4, 4, 3, "down", conv_type="SparseInverseConv3d")
indices = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4], [1, 0, 0, 0]], dtype=torch.int32)
x = SparseConvTensor(torch.randn(3, 5), indices, [4, 4, 5], 2)
out = up(down(net(x)))
assert type(out) is SparseConvTensor and torch.equal(out.indices, indices)
state = net.state_dict()
assert state["0.weight"].shape == (3, 3, 3, 5, 4)
net.load_state_dict(state)
print("done")
""",
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "done\n", done.stderr


def test_an_inverse_layer_undoes_the_first_layer_of_its_key_as_in_mmcv():
    outs = []
    for layers in (mmcv.ops, types.SimpleNamespace(**OURS)):
        torch.manual_seed(0)
        net = mmcv.ops.SparseSequential(
            layers.SparseConv3d(5, 5, 3, stride=2, padding=1, indice_key="a", bias=False),
            layers.SubMConv3d(5, 5, 3, indice_key="b", bias=False),
            layers.SparseInverseConv3d(5, 4, 3, indice_key="a", bias=False),
        )
        outs.append(net(tensor()))
    assert torch.equal(outs[0].indices, outs[1].indices)


def test_layers_can_be_pickled():
    layer = OURS["SubMConv3d"](5, 4, 3)
    copied = pickle.loads(pickle.dumps(layer))
    assert type(copied) is type(layer)
    assert torch.equal(copied(tensor()).features, layer(tensor()).features)
