"""w3a16_linear and its companions on CPU: every path equals the product with the whole weight in float64."""

import logging

import pytest
import torch

from kernelgraft_core.quant.packed import cpu
from kernelgraft_core.quant.w3a16 import W3A16Weight, dequantize_w3a16, w3a16_linear
from kernelgraft_core.quant.w3a16.ops import w3a16_linear_dgrad
from kernelgraft_core.runtime import cpu_vectors
from kernelgraft_core.runtime.notices import warn_once
from kernelgraft_core.runtime.testing import assert_close

# As for four bits: 2.5e-5 of the activations' rms, and what rounding the result costs.
RATIO = {torch.float32: 6e-5, torch.float16: 5e-4, torch.bfloat16: 3e-3, torch.float64: 1e-12}
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in RATIO]
SHAPES = [
    pytest.param(k, g, id=f"K{k}-g{g}")
    for k, g in ((32, 32), (96, 32), (192, 32), (64, 64), (576, 64), (192, 96), (256, 128), (384, 192), (1024, 1024))
]


@pytest.fixture(params=["numba", "torch"])
def installation(request, monkeypatch):
    """With and without numba."""
    monkeypatch.setattr(cpu, "_HAS_NUMBA", request.param == "numba")
    return request.param


class Layer:
    """A random weight, packed, and what it stands for in float64 ``(N, K)``."""

    def __init__(self, n, k, group, seed=0):
        generator = torch.Generator().manual_seed(seed)
        q = torch.randint(0, 8, (n, k), generator=generator)
        zeros = torch.randint(0, 8, (n, k // group), generator=generator)
        scales = ((torch.rand(n, k // group, generator=generator) + 0.5) * 0.02).half()
        self.weight = W3A16Weight.from_integers(q, scales, zeros)
        self.tensors = self.weight.tensors
        self.dense = (q - zeros.repeat_interleave(group, 1)) * scales.double().repeat_interleave(group, 1)

    def __call__(self, x, bias=None):
        return w3a16_linear(x, *self.tensors, bias)

    def expected(self, x, bias=None):
        return x.double() @ self.dense.T + (0 if bias is None else bias.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "group"), SHAPES)
def test_every_group_size_and_number_of_tokens(installation, k, group, dtype):
    layer = Layer(37, k, group)
    x, bias = torch.randn(11, k).to(dtype), torch.randn(37).to(dtype)
    for tokens in (0, 1, 2, 4, 7, 11):
        out = layer(x[:tokens], bias)
        assert (out.dtype, tuple(out.shape)) == (dtype, (tokens, 37))
        assert_close(f"M = {tokens}", layer.expected(x[:tokens], bias), out, RATIO[dtype])


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 35, 64])
def test_every_number_of_rows(installation, rows):
    layer, x = Layer(rows, 192, 64), torch.randn(5, 192)
    assert_close("out", layer.expected(x), layer(x), RATIO[x.dtype])


@pytest.mark.parametrize("name", [known.name for known in cpu_vectors.INSTRUCTION_SETS])
@pytest.mark.parametrize(("k", "group"), [(192, 32), (192, 64), (256, 128)])
def test_every_instruction_set_computes_the_same(use_instructions, name, k, group):
    use_instructions(name)
    layer, x = Layer(37, k, group), torch.randn(9, k)
    x[5, 3] = 1000  # uneven
    assert cpu.choose_path(9, layer.weight, x.dtype) == "integer"
    for tokens in (1, 9):
        assert_close(f"M = {tokens}", layer.expected(x[:tokens]), layer(x[:tokens]), RATIO[x.dtype])


def test_the_largest_integers_do_not_overflow():
    for zero in (0, 7):
        q, zeros = torch.full((4, 256), 7 - zero), torch.full((4, 1), zero)
        weight = W3A16Weight.from_integers(q, torch.ones(4, 1), zeros)
        out = w3a16_linear(torch.ones(5, 256), *weight.tensors)
        assert_close("out", torch.full((5, 4), 256.0 * (7 - 2 * zero)), out, 1e-6)


def test_each_weight_meets_its_own_activation():
    # A single one in the weight, at each place of a vector in turn: any two places swapped would show.
    x = torch.arange(1, 257, dtype=torch.float32).unsqueeze(0)
    q = torch.eye(256, dtype=torch.int64) * 5  # both planes
    weight = W3A16Weight.from_integers(q, torch.ones(256, 4), torch.zeros(256, 4, dtype=torch.uint8))
    assert_close("out", 5 * x, w3a16_linear(x, *weight.tensors), 1e-4)


@pytest.mark.parametrize("tokens", [1, 6])
def test_every_token_may_be_uneven(tokens):
    layer = Layer(37, 512, 64)
    x = torch.randn(tokens, 512)
    x[torch.arange(tokens), torch.arange(tokens) * 70] = 3000.0
    dense = layer.dense.clone()
    # Without the outliers' own part, rounding of the others to a step of a block would be all there is.
    out = layer(x).double()
    for m in range(tokens):
        large = x[m, m * 70].double() * dense[:, m * 70]
        small = x[m].double() @ dense.T - large
        assert (out[m] - large - small).norm() < 1e-3 * small.norm()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_poisons_exactly_its_own_token(installation, value):
    layer, x = Layer(9, 192, 64), torch.randn(7, 192)
    clean = layer(x)
    x[4, 100] = value
    out = layer(x)
    assert not out[4].isfinite().any()
    assert torch.equal(out[[0, 1, 2, 3, 5, 6]], clean[[0, 1, 2, 3, 5, 6]])


def test_weights_of_any_strides_give_the_same_bits(installation):
    layer, x, grad = Layer(40, 128, 32), torch.randn(5, 128), torch.randn(5, 40)
    strided = [t.T.contiguous().T for t in layer.tensors]
    assert not all(t.is_contiguous() for t in strided)
    assert torch.equal(w3a16_linear(x, *strided), layer(x))
    assert torch.equal(w3a16_linear_dgrad(grad, *strided), w3a16_linear_dgrad(grad, *layer.tensors))
    assert torch.equal(dequantize_w3a16(*strided), dequantize_w3a16(*layer.tensors))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)], ids=str)
def test_gradients_equal_those_of_the_whole_weight(installation, dtype, lead):
    layer = Layer(37, 192, 32)
    x, bias = torch.randn(*lead, 192).to(dtype).requires_grad_(), torch.randn(37).to(dtype).requires_grad_()
    grad = torch.randn(*lead, 37).to(dtype)
    layer(x, bias).backward(grad)
    assert_close("grad_x", grad.double() @ layer.dense, x.grad, RATIO[dtype])
    assert_close("grad_bias", grad.double().reshape(-1, 37).sum(0), bias.grad, RATIO[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dequantized_weight_is_exact_up_to_its_dtype(installation, dtype):
    layer = Layer(37, 192, 96)
    ratio = {torch.float64: 0, torch.float32: 1e-7, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    assert_close("weight", layer.dense, dequantize_w3a16(*layer.tensors, dtype), ratio)


def test_without_numba_it_is_said_once(monkeypatch, caplog):
    warn_once.cache_clear()
    cpu._possible_paths.cache_clear()
    monkeypatch.setattr(cpu, "_HAS_NUMBA", False)
    layer, x = Layer(8, 64, 64), torch.randn(2, 64)
    with caplog.at_level(logging.WARNING, "kernelgraft"):
        layer(x), layer(x)
    assert [r.getMessage() for r in caplog.records] == ["numba is not installed: W3A16 is dequantized block by block"]


def test_compiles_without_a_graph_break():
    layer = Layer(37, 192, 64)
    compiled = torch.compile(lambda x: layer(x.sin()) * 2, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 192)
    torch.testing.assert_close(compiled(x), layer(x.sin()) * 2)
