"""AwqLinear: the checkpoint's layout in and out, bit for bit, whatever happens to the module in between."""

import copy
import pickle

import pytest
import torch
from torch import nn

from kernelgraft_core.quant.formats.autoawq import unpack_gemm
from kernelgraft_core.quant.w4a16 import reference
from kernelgraft_core.quant.w4a16.linear import AwqLinear
from kernelgraft_core.runtime.testing import assert_close

K, N, GROUP = 128, 48, 32
NAMES = ("qweight", "qzeros", "scales")


def checkpoint(bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    words = [torch.randint(-(2**31), 2**31, (rows, N // 8), generator=generator).int() for rows in (K, K // GROUP)]
    scales = (torch.rand(K // GROUP, N, generator=generator) * 0.02 + 0.01).half()
    state = dict(zip(NAMES, (*words, scales), strict=True))
    return state | ({"bias": torch.randn(N, generator=generator)} if bias else {})


def loaded(bias=True, seed=0):
    layer = AwqLinear(K, N, GROUP, bias=bias)
    layer.load_state_dict(checkpoint(bias, seed))
    return layer


def dense(state):
    weight = unpack_gemm(*(state[name] for name in NAMES))
    return reference.dequantize_w4a16(weight.qweight, weight.scales, weight.zeros, torch.float64)


def assert_same_state(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype is tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prepared", [False, True])
def test_what_was_loaded_is_saved(bias, prepared):
    layer = loaded(bias)
    if prepared:
        layer.prepare()
    assert layer.prepared is prepared
    assert_same_state(layer.state_dict(), checkpoint(bias))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_computes_with_the_weight_it_loaded(bias, dtype):
    state, x = checkpoint(bias), torch.randn(2, 3, K).to(dtype)
    expected = x.double() @ dense(state).T + state.get("bias", torch.zeros(N)).to(dtype).double()
    layer = loaded(bias)
    out = layer(x)
    assert layer.prepared
    assert out.dtype is dtype
    assert_close("out", expected, out, {torch.float32: 6e-5, torch.float16: 5e-4, torch.bfloat16: 3e-3}[dtype])


@pytest.mark.parametrize("prepared", [False, True])
def test_loading_again_replaces_the_weight(prepared):
    layer, x = loaded(), torch.randn(2, K)
    if prepared:
        layer(x)
    layer.load_state_dict(checkpoint(seed=1))
    assert_same_state(layer.state_dict(), checkpoint(seed=1))
    assert torch.equal(layer(x), loaded(seed=1)(x))


def test_loading_works_inside_a_model_and_strictly():
    model = nn.Sequential(nn.Linear(K, K), loaded())
    model[1].prepare()
    other = nn.Sequential(nn.Linear(K, K), loaded(seed=1))
    model.load_state_dict(other.state_dict())
    assert_same_state(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_is_missing_is_named(prepared, name):
    layer = loaded()
    if prepared:
        layer.prepare()
    state = checkpoint(seed=1)
    del state[name]
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{name}"'):
        layer.load_state_dict(state)


@pytest.mark.parametrize(("k", "n", "group"), [(K, N, 64), (K, 56, GROUP), (96, N, GROUP)])
def test_a_weight_of_other_sizes_is_refused(k, n, group):
    layer, other = loaded(bias=False), AwqLinear(k, n, group)
    layer.prepare()
    message = rf"the weight is {k} x {n} with group size {group}; this layer has in_features=128, .* group_size=32"
    if group != GROUP:
        message = r"qzeros is int32 \(2, 6\), but qweight \(128, 6\) with group size 32 goes with int32 \(4, 6\)"
    with pytest.raises(ValueError, match=message):
        layer.load_state_dict(other.state_dict())
    assert_same_state(layer.state_dict(), checkpoint(bias=False))

    fresh = AwqLinear(K, N, GROUP)
    for name in NAMES:
        setattr(fresh, name, other.get_buffer(name))  # as a loader does that does not look
    with pytest.raises(ValueError, match=message):
        fresh.prepare()
    assert not fresh.prepared


CASTS = [
    pytest.param(nn.Module.half, id="half"),
    pytest.param(nn.Module.bfloat16, id="bfloat16"),
    pytest.param(nn.Module.float, id="float"),
    pytest.param(nn.Module.double, id="double"),
    pytest.param(lambda m: m.to(torch.bfloat16), id="to-dtype"),
    pytest.param(lambda m: m.to("cpu", torch.float64), id="to-device-and-dtype"),
    pytest.param(lambda m: m.bfloat16().float(), id="there-and-back"),
]


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("prepared", [False, True])
def test_casting_the_module_never_rounds_its_scales(cast, prepared):
    layer = loaded()
    if prepared:
        layer.prepare()
    wanted = checkpoint()
    cast(layer)
    found = layer.state_dict()
    assert found.pop("bias").dtype is cast(nn.Linear(1, 1)).bias.dtype
    del wanted["bias"]
    assert_same_state(found, wanted)
    layer(torch.randn(2, K))  # a bias of another dtype is converted


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_copy_is_whole_and_its_own(duplicate, prepared):
    layer, x = loaded(), torch.randn(2, K)
    if prepared:
        layer.prepare()
    twin = duplicate(layer)
    assert torch.equal(twin(x), layer(x))
    twin.load_state_dict(checkpoint(seed=1))  # its hooks are its own
    assert_same_state(layer.state_dict(), checkpoint())
    assert_same_state(twin.state_dict(), checkpoint(seed=1))


def test_prepared_buffers_are_seen_and_take_half_a_byte_per_weight():
    layer = loaded(bias=False)
    before = sum(b.nbytes for b in layer.buffers())
    layer.prepare()
    layer.prepare()
    sizes = {name: b.nbytes for name, b in layer.named_buffers()}
    groups = N * K // GROUP
    assert sizes == {"words": N * K // 2, "group_scales": 2 * groups, "group_zeros": groups}
    assert before == N * K // 2 + 2 * groups + groups // 2
    assert list(layer.parameters()) == []


def test_the_weight_is_given_in_the_kernels_layout():
    layer = loaded()
    weight = layer.weight
    assert (weight.out_features, weight.in_features, weight.group_size) == (N, K, GROUP)
    assert torch.equal(weight.integers(), unpack_gemm(*(checkpoint()[name] for name in NAMES)).integers())


def test_gradients_reach_the_input():
    layer, x = loaded(), torch.randn(2, K, requires_grad=True)
    layer(x).sum().backward()
    assert_close("grad_x", torch.ones(2, N).double() @ dense(checkpoint()), x.grad, 6e-5)


def test_a_layer_on_the_meta_device_takes_its_weight_by_assignment():
    layer = AwqLinear(K, N, GROUP, bias=True, device="meta")
    layer.load_state_dict(checkpoint(), assign=True)
    x = torch.randn(2, K)
    assert torch.equal(layer(x), loaded()(x))


@pytest.mark.parametrize("group", [-1, K])
def test_minus_one_is_the_whole_row(group):
    layer = AwqLinear(K, N, group)
    assert (layer.group_size, tuple(layer.scales.shape)) == (K, (1, N))


@pytest.mark.parametrize(
    ("k", "n", "group"), [(128, 48, 48), (128, 48, 0), (128, 48, -2), (128, 48, 256), (128, 44, 32)]
)
def test_sizes_that_the_format_cannot_hold_are_refused(k, n, group):
    with pytest.raises(ValueError, match=f"an AWQ layer of {k} x {n} cannot have group size {group}"):
        AwqLinear(k, n, group)


def test_it_prints_what_it_is():
    assert repr(loaded()) == "AwqLinear(in_features=128, out_features=48, bits=4, group_size=32, bias=True)"
