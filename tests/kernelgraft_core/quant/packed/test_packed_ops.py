"""The ops of packed weights, 3 and 4 bits alike: what torch and callers may rely on, whichever backend runs."""

import importlib

import pytest
import torch

from kernelgraft_core.quant.packed import reference
from kernelgraft_core.quant.w3a16 import W3A16Weight, dequantize_w3a16, w3a16_linear
from kernelgraft_core.quant.w3a16.ops import w3a16_linear_dgrad
from kernelgraft_core.quant.w4a16 import W4A16Weight, dequantize_w4a16, w4a16_linear
from kernelgraft_core.quant.w4a16.ops import w4a16_linear_dgrad
from kernelgraft_core.quant.weights import linear, pack_weight
from kernelgraft_core.runtime.errors import NoBackendError
from kernelgraft_core.runtime.op import registered_ops
from kernelgraft_core.runtime.testing import assert_close

# bfloat16 where the processor multiplies it: weights are rounded to 8 bits too.
RATIO = {torch.float32: 6e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float64: 1e-12}
DTYPES = pytest.mark.parametrize("dtype", [pytest.param(t, id=str(t).removeprefix("torch.")) for t in RATIO])
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])
KINDS = {3: W3A16Weight, 4: W4A16Weight}
LINEAR = {3: w3a16_linear, 4: w4a16_linear}
DGRAD = {3: w3a16_linear_dgrad, 4: w4a16_linear_dgrad}
DEQUANTIZE = {3: dequantize_w3a16, 4: dequantize_w4a16}


@pytest.fixture(params=[3, 4], ids=["3bits", "4bits"])
def bits(request):
    return request.param


@pytest.fixture
def forced(monkeypatch):
    """Make one backend run what it can, and the reference the rest."""

    def force(backend, dtype):
        monkeypatch.setenv("KERNELGRAFT_BACKEND", "reference" if dtype == torch.float64 else backend)

    return force


def examples(bits, **sizes):
    return importlib.import_module(f"kernelgraft_core.quant.w{bits}a16.examples").example_args("cpu", **sizes)


class Layer:
    """A random weight, packed, and what it stands for in float64 ``(N, K)``."""

    def __init__(self, bits, n, k, group):
        q, zeros = torch.randint(0, 1 << bits, (n, k)), torch.randint(0, 1 << bits, (n, k // group))
        scales = ((torch.rand(n, k // group) + 0.5) * 0.02).half()
        self.bits, self.weight = bits, pack_weight(q, scales, zeros, bits)
        self.tensors = self.weight.tensors
        self.dense = (q - zeros.repeat_interleave(group, 1)) * scales.double().repeat_interleave(group, 1)

    def __call__(self, x, bias=None):
        return LINEAR[self.bits](x, *self.tensors, bias)

    def expected(self, x, bias=None):
        return x.double() @ self.dense.T + (0 if bias is None else bias.double())


@BACKENDS
@DTYPES
@pytest.mark.parametrize(
    ("n", "k", "group"),
    [(1, 32, 32), (37, 32, 32), (64, 64, 32), (5, 96, 96), (40, 192, 64), (33, 288, 96), (12, 512, 128), (4, 640, 640)],
)
def test_equals_the_product_with_the_dequantized_weight(bits, backend, dtype, n, k, group, forced):
    forced(backend, dtype)
    layer, bias = Layer(bits, n, k, group), torch.randn(n).to(dtype)
    for tokens in (0, 1, 2, 5, 49):
        x = torch.randn(tokens, k).to(dtype)
        out = layer(x, bias)
        assert (out.dtype, tuple(out.shape)) == (dtype, (tokens, n))
        assert_close(f"M = {tokens}", layer.expected(x, bias), out, RATIO[dtype])


@BACKENDS
@DTYPES
def test_every_integer_and_zero_point_takes_part(bits, backend, dtype, forced):
    forced(backend, dtype)
    largest = (1 << bits) - 1
    zeros = torch.arange(largest + 1).unsqueeze(1)
    q = torch.arange(64).expand(largest + 1, 64) % (largest + 1)
    weight = pack_weight(q, torch.ones(largest + 1, 1), zeros, bits)
    assert torch.equal(DEQUANTIZE[bits](*weight.tensors, dtype), (q - zeros).to(dtype))
    x = torch.eye(64).to(dtype)
    assert_close("columns", (q - zeros).T.double(), linear(x, weight), 1e-4)


@BACKENDS
@DTYPES
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (0,)], ids=str)
def test_gradients_equal_those_of_the_whole_weight(bits, backend, dtype, lead, forced):
    forced(backend, dtype)
    layer = Layer(bits, 37, 192, 32)
    x, bias = torch.randn(*lead, 192).to(dtype).requires_grad_(), torch.randn(37).to(dtype).requires_grad_()
    grad = torch.randn(*lead, 37).to(dtype)

    layer(x, bias).backward(grad)

    assert_close("grad_x", grad.double() @ layer.dense, x.grad, RATIO[dtype])
    assert_close("grad_bias", grad.double().reshape(-1, 37).sum(0), bias.grad, RATIO[dtype])


@BACKENDS
@DTYPES
def test_dequantizing_is_exact_up_to_the_dtype(bits, backend, dtype, forced):
    forced(backend, dtype)
    layer = Layer(bits, 37, 192, 96)
    weight = DEQUANTIZE[bits](*layer.tensors, dtype)
    assert weight.is_contiguous()
    # float16 and bfloat16 may round twice: the scale first, then the product.
    ratio = {torch.float64: 0, torch.float32: 1e-7, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    assert_close("weight", layer.dense, weight, ratio)


@BACKENDS
def test_leading_axes_and_strides_do_not_matter(bits, backend, forced):
    forced(backend, torch.float32)
    layer, x = Layer(bits, 40, 128, 64), torch.randn(2, 3, 256)
    for name, view in {
        "1-D": x[0, 0, :128],
        "sliced": x[..., ::2],
        "transposed": x[..., :128].transpose(0, 1),
        "expanded": x[:1, :1, :128].expand(4, 5, 128),
        "column-major": x[0, :, :128].T.contiguous().T,
    }.items():
        out = layer(view)
        assert out.shape == (*view.shape[:-1], 40)
        assert out.is_contiguous()
        assert_close(name, layer.expected(view), out, 6e-5)
    strided = [t.T.contiguous().T for t in layer.tensors]
    assert not any(t.is_contiguous() for t in strided)
    assert torch.equal(LINEAR[bits](x[..., :128], *strided), layer(x[..., :128]))
    assert torch.equal(DGRAD[bits](x[..., :40], *strided), DGRAD[bits](x[..., :40], *layer.tensors))
    assert torch.equal(DEQUANTIZE[bits](*strided), DEQUANTIZE[bits](*layer.tensors))


@BACKENDS
def test_a_slice_of_rows_or_columns_is_a_weight(bits, backend, forced):
    forced(backend, torch.float32)
    layer, x = Layer(bits, 24, 256, 32), torch.randn(3, 256)
    rows = [t[8:16] for t in layer.tensors]
    assert_close("rows", layer.expected(x)[:, 8:16], LINEAR[bits](x, *rows), 6e-5)
    columns = [t[:, t.shape[1] // 4 : t.shape[1] // 2] for t in layer.tensors]
    part = x[:, 64:128]
    assert_close("columns", part.double() @ layer.dense[:, 64:128].T, LINEAR[bits](part, *columns), 6e-5)


@BACKENDS
def test_a_layer_without_rows_gives_empty_results(bits, backend, forced):
    forced(backend, torch.float32)
    layer = Layer(bits, 0, 64, 32)
    x = torch.randn(3, 64, requires_grad=True)
    out = layer(x)
    assert out.shape == (3, 0)
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros(3, 64))
    assert DEQUANTIZE[bits](*layer.tensors).shape == (0, 64)


@BACKENDS
@pytest.mark.parametrize("magnitude", [1e-20, 1e-6, 1e6, 1e20])
def test_scales_and_activations_of_any_magnitude_keep_their_precision(bits, backend, magnitude, forced):
    forced(backend, torch.float32)
    layer, x = Layer(bits, 16, 256, 64), torch.randn(4, 256) * magnitude
    *planes, scales, zeros = layer.tensors
    skewed = scales * torch.logspace(-3, 3, 16).unsqueeze(1).half()
    out = LINEAR[bits](x, *planes, skewed, zeros)
    dense = reference.dequantize(layer.weight.integers(), skewed, zeros, torch.float64)
    for row in range(16):
        assert_close(f"row {row}", x.double() @ dense[row], out[:, row], 3 * RATIO[x.dtype])


@BACKENDS
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_token(bits, backend, value, forced):
    forced(backend, torch.float32)
    layer, x = Layer(bits, 9, 192, 64), torch.randn(7, 192)
    clean = layer(x)
    x[4, 100] = value
    out = layer(x)
    assert not out[4].isfinite().any()
    others = [0, 1, 2, 3, 5, 6]
    assert torch.equal(out[others], clean[others])


def test_a_gradient_of_other_strides_is_taken(bits):
    layer, x = Layer(bits, 37, 64, 64), torch.randn(4, 64, requires_grad=True)
    layer(x).T.sum().backward()
    assert_close("grad_x", torch.ones(4, 37).double() @ layer.dense, x.grad, RATIO[x.dtype])


def test_a_second_derivative_is_refused_rather_than_wrong(bits):
    layer, x = Layer(bits, 8, 64, 64), torch.randn(2, 64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"w{bits}a16_linear_dgrad has no gradient"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["w{}a16_linear", "w{}a16_linear_dgrad", "dequantize_w{}a16"])
def test_opcheck(bits, name):
    name = name.format(bits)
    op = getattr(torch.ops.kernelgraft, name).default
    args = examples(bits)[name]
    torch.library.opcheck(op, args)
    if name.endswith("_linear"):
        x, *weight, bias = args
        torch.library.opcheck(op, (x.requires_grad_(), *weight, bias.requires_grad_()))
        torch.library.opcheck(op, (x.detach().expand(2, *x.shape).transpose(0, 1), *weight, None))


def test_compiles_without_a_graph_break_and_so_does_its_gradient(bits):
    layer = Layer(bits, 37, 192, 64)
    compiled = torch.compile(
        lambda x, bias: linear(x.sin(), layer.weight, bias) * 2, fullgraph=True, backend="aot_eager"
    )
    x, bias = torch.randn(2, 3, 192, requires_grad=True), torch.randn(37, requires_grad=True)
    out = compiled(x, bias)
    torch.testing.assert_close(out, layer(x.sin(), bias) * 2)
    found = torch.autograd.grad(out.sum(), (x, bias))
    wanted = torch.autograd.grad((layer(x.sin(), bias) * 2).sum(), (x, bias))
    torch.testing.assert_close(found, wanted)


def test_autocast_converts_activations_as_for_a_linear_layer(bits):
    layer, x, bias = Layer(bits, 37, 128, 64), torch.randn(3, 128), torch.randn(37)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x, bias)
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, layer(x.bfloat16(), bias.bfloat16()))


def test_a_forced_reference_is_the_reference(bits, monkeypatch):
    layer, x = Layer(bits, 37, 192, 64), torch.randn(5, 192)
    ours = layer(x)
    monkeypatch.setenv("KERNELGRAFT_BACKEND", "reference")
    forced = layer(x)
    dense = reference.dequantize(layer.weight.integers(), layer.weight.scales, layer.weight.zeros, torch.float32)
    assert torch.equal(forced, reference.linear(x, dense, None))
    assert_close("cpu backend", forced, ours, RATIO[x.dtype])
    monkeypatch.setenv("KERNELGRAFT_BACKEND", "triton")
    with pytest.raises(NoBackendError, match=rf"w{bits}a16_linear cannot run on cpu.*KERNELGRAFT_BACKEND is triton"):
        layer(x)


def test_float64_goes_to_the_reference_and_says_why(bits):
    args = (torch.randn(2, 64, dtype=torch.float64), *Layer(bits, 8, 64, 64).tensors, None)
    verdicts = registered_ops()[f"w{bits}a16_linear"].explain("cpu", *args)
    assert verdicts == {"cpu": "float64 is computed by the reference", "reference": "runs"}


def layer_of(bits, **changed):
    """Arguments of a linear layer with K = 64, some replaced."""
    planes = {3: {"qweight": 4, "qhigh": 2}, 4: {"qweight": 8}}[bits]
    tensors = {
        "x": torch.zeros(3, 64),
        **{name: torch.zeros(16, words, dtype=torch.int32) for name, words in planes.items()},
        "scales": torch.ones(16, 2, dtype=torch.float16),
        "zeros": torch.zeros(16, 2, dtype=torch.uint8),
        "bias": torch.zeros(16),
    }
    return tensors | changed


REFUSED = [
    pytest.param({"x": torch.zeros(3, 63)}, r"x is \(3, 63\), expected \(\.\.\., 64\)", id="x-shape"),
    pytest.param({"x": torch.tensor(1.0)}, r"x is \(\), expected \(\.\.\., 64\)", id="x-scalar"),
    pytest.param({"x": torch.zeros(3, 64).int()}, "x is torch.int32, expected one of", id="x-dtype"),
    pytest.param({"x": torch.zeros(3, 64, device="meta")}, "x is on meta, qweight on cpu", id="x-device"),
    pytest.param({"qweight": torch.zeros(16, 8)}, r"qweight is torch.float32 \(16, 8\)", id="qweight-dtype"),
    pytest.param({"qweight": torch.zeros(16, 8, 1).int()}, r"qweight is torch.int32 \(16, 8, 1\)", id="qweight-rank"),
    pytest.param({"scales": torch.ones(16, 2)}, "scales are torch.float32", id="scales-dtype"),
    pytest.param({"zeros": torch.zeros(16, 2).int()}, "zeros torch.int32", id="zeros-dtype"),
    pytest.param({"scales": torch.ones(15, 2).half()}, r"scales is \(15, 2\), expected \(16, ", id="scales-rows"),
    pytest.param({"zeros": torch.zeros(16, 4).byte()}, r"zeros is \(16, 4\), expected \(16, ", id="zeros-groups"),
    pytest.param({"scales": torch.ones(16).half()}, r"scales is \(16,\)", id="scales-rank"),
    pytest.param(
        {"zeros": torch.zeros(16, 2, device="meta").byte()}, "zeros is on meta, qweight on cpu", id="zeros-device"
    ),
    pytest.param(
        {"scales": torch.ones(16, 3).half(), "zeros": torch.zeros(16, 3).byte()},
        "K = 64 does not split into 3 groups",
        id="groups-do-not-divide",
    ),
    pytest.param(
        {"scales": torch.ones(16, 16).half(), "zeros": torch.zeros(16, 16).byte()},
        r"K = 64 does not split into 16 groups of a multiple of (8|32)",
        id="group-of-4",
    ),
    pytest.param(
        {"scales": torch.ones(16, 0).half(), "zeros": torch.zeros(16, 0).byte()}, "into 0 groups", id="no-groups"
    ),
    pytest.param(
        {"bias": torch.zeros(15)}, r"bias is torch.float32 \(15,\) on cpu, expected .*\(16,\)", id="bias-shape"
    ),
    pytest.param({"bias": torch.zeros(16).half()}, "bias is torch.float16 .*expected torch.float32", id="bias-dtype"),
    pytest.param({"bias": torch.zeros(16, device="meta")}, "bias is .* on meta", id="bias-device"),
]
REFUSED_PLANES = [
    pytest.param({"qhigh": torch.zeros(16, 2)}, r"qhigh is torch.float32 \(16, 2\), .*\(N, K / 32\)", id="dtype"),
    pytest.param({"qhigh": torch.zeros(2).int()}, r"qhigh is torch.int32 \(2,\), .*\(N, K / 32\)", id="rank"),
    pytest.param(
        {"qhigh": torch.zeros(16, 4).int()}, r"qhigh is \(16, 4\), expected \(16, 64 / 32\) beside qweight", id="words"
    ),
    pytest.param({"qhigh": torch.zeros(15, 2).int()}, r"qhigh is \(15, 2\), expected \(16, 64 / 32\)", id="rows"),
    pytest.param({"qhigh": torch.zeros(16, 2, device="meta").int()}, "qhigh is on meta, qweight on cpu", id="device"),
    pytest.param(
        {"qweight": torch.zeros(16, 3).int(), "x": torch.zeros(3, 48)},
        r"qhigh is \(16, 2\), expected \(16, 48 / 32\)",
        id="K-of-half-a-word",
    ),
    pytest.param(
        {"scales": torch.ones(16, 4).half(), "zeros": torch.zeros(16, 4).byte()},
        "K = 64 does not split into 4 groups of a multiple of 32",
        id="group-of-16",
    ),
]


def check_refused(bits, changed, message):
    x, *weight, bias = layer_of(bits, **changed).values()
    with pytest.raises(ValueError, match=message):
        LINEAR[bits](x, *weight, bias)
    if "x" not in changed and "bias" not in changed:
        with pytest.raises(ValueError, match=message):
            DEQUANTIZE[bits](*weight)
        with pytest.raises(ValueError, match=message):
            DGRAD[bits](torch.zeros(3, 16), *weight)


@pytest.mark.parametrize(("changed", "message"), REFUSED)
def test_what_does_not_fit_is_refused_with_its_value(bits, changed, message):
    check_refused(bits, changed, message)


@pytest.mark.parametrize(("changed", "message"), REFUSED_PLANES)
def test_planes_that_do_not_fit_each_other_are_refused(changed, message):
    check_refused(3, changed, message)


@pytest.mark.parametrize(
    ("grad", "message"),
    [
        pytest.param(torch.zeros(3, 64), r"grad is \(3, 64\), expected \(\.\.\., 16\)", id="shape"),
        pytest.param(torch.zeros(3, 16).long(), "grad is torch.int64, expected one of", id="dtype"),
        pytest.param(torch.zeros(3, 16, device="meta"), "grad is on meta, qweight on cpu", id="device"),
    ],
)
def test_a_gradient_that_does_not_fit_is_refused_with_its_value(bits, grad, message):
    _, *weight, _ = layer_of(bits).values()
    with pytest.raises(ValueError, match=message):
        DGRAD[bits](grad, *weight)


def test_a_weight_without_columns_is_refused(bits):
    _, *planes, _, _, _ = layer_of(bits).values()
    with pytest.raises(ValueError, match="K = 0"):
        LINEAR[bits](
            torch.zeros(3, 0), *(p[:, :0] for p in planes), torch.ones(16, 1).half(), torch.zeros(16, 1).byte()
        )


def test_a_dtype_that_is_no_float_is_refused(bits):
    with pytest.raises(ValueError, match=r"dtype is torch\.int8, expected one of"):
        DEQUANTIZE[bits](*Layer(bits, 8, 64, 64).tensors, torch.int8)


class TestWeight:
    def test_it_knows_its_sizes_and_gives_back_its_integers(self, bits):
        q = torch.randint(0, 1 << bits, (6, 96))
        weight = pack_weight(q, torch.ones(6, 3), torch.zeros(6, 3), bits)
        assert type(weight) is KINDS[bits]
        assert weight.bits == bits
        assert (weight.out_features, weight.in_features, weight.group_size) == (6, 96, 32)
        assert torch.equal(weight.integers(), q.byte())
        assert (weight.scales.dtype, weight.zeros.dtype) == (torch.float16, torch.uint8)

    def test_it_takes_its_bits_and_nothing_more(self, bits):
        weight = pack_weight(torch.zeros(4, 64), torch.ones(4, 1), torch.zeros(4, 1), bits)
        *planes, _, _ = weight.tensors
        assert sum(plane.nbytes for plane in planes) == 4 * 64 * bits // 8

    def test_arranging_changes_strides_and_nothing_else(self, bits):
        weight = Layer(bits, 12, 128, 32).weight
        other = type(weight)(*(t.T.contiguous().T for t in weight.tensors)).arranged()
        assert all(t.is_contiguous() for t in other.tensors)
        for found, wanted in zip(other.tensors, weight.tensors, strict=True):
            assert torch.equal(found, wanted)
        there = weight.to("meta")
        assert there.scales.stride() == there.zeros.stride() == (1, 12)
        assert all(plane.is_contiguous() for plane in there.tensors[:-2])

    def test_what_does_not_fit_is_refused_with_its_value(self, bits):
        largest = (1 << bits) - 1
        q, ones = torch.zeros(4, 64), torch.ones(4, 2)
        with pytest.raises(ValueError, match=rf"values span 0\.\.{largest + 1}, expected 0\.\.{largest}"):
            pack_weight(q + torch.eye(4, 64) * (largest + 1), ones, ones, bits)
        with pytest.raises(ValueError, match=rf"zeros span {largest + 1}\.\.{largest + 1}, expected 0\.\.{largest}"):
            pack_weight(q, ones, ones * (largest + 1), bits)
        with pytest.raises(ValueError, match=r"q is \(4, 64\), scales \(4, 2\), zeros \(4, 1\): they disagree"):
            pack_weight(q, ones, ones[:, :1], bits)
        with pytest.raises(ValueError, match=r"q is \(4, 64\), scales \(3, 2\)"):
            pack_weight(q, ones[:3], ones[:3], bits)
        with pytest.raises(ValueError, match="cannot pack 63 values"):
            pack_weight(q[:, :63], ones, ones, bits)

    @pytest.mark.parametrize("wrong", [0, 2, 5, 8])
    def test_other_widths_are_refused(self, wrong):
        with pytest.raises(ValueError, match=f"bits is {wrong}, expected 3 or 4"):
            pack_weight(torch.zeros(4, 64), torch.ones(4, 1), torch.zeros(4, 1), wrong)
