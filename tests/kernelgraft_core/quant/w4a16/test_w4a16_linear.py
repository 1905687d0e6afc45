"""w4a16_linear and its companions on CPU: every path equals the product with the whole weight in float64."""

import gc
import logging
import os
import platform
import subprocess
import sys
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernelgraft_core.quant.packed import cpu, cpu_aten
from kernelgraft_core.quant.w4a16 import W4A16Weight, dequantize_w4a16, reference, w4a16_linear
from kernelgraft_core.quant.w4a16.ops import w4a16_linear_dgrad
from kernelgraft_core.runtime import cpu_vectors
from kernelgraft_core.runtime.notices import warn_once
from kernelgraft_core.runtime.testing import assert_close

# 16-bit block floating point costs 2.5e-5 of the activations' rms; rounding the result costs float16 and bfloat16 more.
RATIO = {torch.float32: 6e-5, torch.float16: 5e-4, torch.bfloat16: 3e-3, torch.float64: 1e-12}
# PyTorch's int4 kernel holds scales and zero points in the activations' dtype.
ROUNDED_SCALES = {torch.float32: 6e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in RATIO]
TOKENS = (0, 1, 2, 3, 4, 5, 8, 50)
ROWS = (1, 2, 3, 4, 5, 37, 64)
SHAPES = [
    pytest.param(k, g, id=f"K{k}-g{g}")
    for k, g in (
        (8, 8), (40, 8), (48, 16), (96, 32), (128, 32), (64, 64), (192, 64), (192, 96), (256, 128), (384, 128),
        (192, 192), (384, 192), (256, 256), (512, 256), (320, 320), (1024, 512), (1024, 1024),
    )
]  # fmt: skip


@pytest.fixture
def without_numba(monkeypatch):
    monkeypatch.setattr(cpu, "_HAS_NUMBA", False)


@pytest.fixture(params=["numba", "torch"])
def installation(request, monkeypatch):
    """With and without numba: our kernels, or PyTorch's alone."""
    monkeypatch.setattr(cpu, "_HAS_NUMBA", request.param == "numba")
    return request.param


class Layer:
    """A random weight, packed, and what it stands for in float64 ``(N, K)``."""

    def __init__(self, n, k, group, scale=0.02, seed=0):
        generator = torch.Generator().manual_seed(seed)
        q = torch.randint(0, 16, (n, k), generator=generator)
        zeros = torch.randint(0, 16, (n, k // group), generator=generator)
        scales = ((torch.rand(n, k // group, generator=generator) + 0.5) * scale).half()
        packed = W4A16Weight.from_integers(q, scales, zeros)
        self.tensors = (packed.qweight, packed.scales, packed.zeros)
        self.dense = (q - zeros.repeat_interleave(group, 1)) * scales.double().repeat_interleave(group, 1)

    def __call__(self, x, bias=None):
        return w4a16_linear(x, *self.tensors, bias)

    def expected(self, x, bias=None):
        return x.double() @ self.dense.T + (0 if bias is None else bias.double())


def use_path(monkeypatch, path):
    monkeypatch.setattr(cpu, "choose_path", lambda *_: path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "group"), SHAPES)
def test_every_group_size_and_number_of_tokens(installation, k, group, dtype):
    layer = Layer(37, k, group)
    x = torch.randn(max(TOKENS), k).to(dtype)
    for tokens in TOKENS:
        out = layer(x[:tokens])
        assert (out.dtype, tuple(out.shape)) == (dtype, (tokens, 37))
        assert_close(f"M = {tokens}", layer.expected(x[:tokens]), out, RATIO[dtype])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("group", [32, 64])
def test_every_number_of_rows_and_tokens(installation, rows, group):
    layer = Layer(rows, 192, group)
    x, bias = torch.randn(max(TOKENS), 192), torch.randn(rows)
    for tokens in TOKENS:
        assert_close(f"M = {tokens}", layer.expected(x[:tokens], bias), layer(x[:tokens], bias), RATIO[x.dtype])


@pytest.mark.parametrize("dtype", ROUNDED_SCALES)
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_without_numba_few_tokens_run_on_pytorchs_kernel(without_numba, dtype, group):
    layer, x = Layer(96, 512, group), torch.randn(16, 512).to(dtype)
    few = cpu.choose_path(16, W4A16Weight(*layer.tensors), dtype)
    assert few == ("dequantize" if dtype == torch.float32 else "int4pack")
    for tokens in (1, 3, 16):
        assert_close(f"M = {tokens}", layer.expected(x[:tokens]), layer(x[:tokens]), ROUNDED_SCALES[dtype])


def test_pytorchs_copy_of_a_weight_dies_with_it(without_numba):
    layer, x = Layer(64, 128, 64), torch.randn(2, 128).bfloat16()
    before = len(cpu_aten._copies)
    layer(x), layer(x.half())
    assert len(cpu_aten._copies) == before + 1
    del layer
    gc.collect()
    assert len(cpu_aten._copies) == before


@pytest.mark.parametrize("path", ["integer", "dequantize"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_both_ways_of_computing_give_the_same(monkeypatch, path, dtype, tokens):
    use_path(monkeypatch, path)
    layer, x = Layer(70, 256, 64), torch.randn(tokens, 256).to(dtype)
    assert_close("out", layer.expected(x), layer(x), RATIO[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_blocks_are_multiplied_in_the_activations_dtype_where_that_is_fast(monkeypatch, dtype):
    monkeypatch.setattr(cpu, "_gemm_dtype", lambda dtype: dtype)
    layer, x = Layer(70, 256, 64), torch.randn(128, 256).to(dtype)
    weight = W4A16Weight(*layer.tensors)
    assert [cpu.choose_path(tokens, weight, dtype) for tokens in (8, 128)] == ["integer", "dequantize"]
    assert_close("out", layer.expected(x), layer(x), 2 * RATIO[dtype])
    grad = torch.randn(128, 70).to(dtype)
    assert_close("grad", grad.double() @ layer.dense, w4a16_linear_dgrad(grad, *layer.tensors), 2 * RATIO[dtype])


@pytest.mark.parametrize(
    ("tokens", "rows", "k", "group", "path"),
    [
        pytest.param(1, 64, 128, 64, "integer", id="one-token"),
        pytest.param(500, 64, 128, 32, "integer", id="many-tokens"),
        pytest.param(0, 64, 128, 64, "dequantize", id="no-tokens"),
        pytest.param(1, 3, 128, 64, "dequantize", id="three-rows"),
        pytest.param(1, 64, 96, 32, "dequantize", id="half-a-chunk"),
        pytest.param(1, 64, 192, 96, "dequantize", id="group-of-96"),
    ],
)
def test_the_path_depends_on_shapes(monkeypatch, tokens, rows, k, group, path):
    monkeypatch.setattr(cpu, "_gemm_dtype", lambda _: torch.float32)
    assert cpu.choose_path(tokens, W4A16Weight(*Layer(rows, k, group).tensors), torch.float32) == path


def test_a_slower_path_is_said_once(monkeypatch, caplog):
    warn_once.cache_clear()
    cpu._possible_paths.cache_clear()
    layer, x = Layer(3, 64, 64), torch.randn(1, 64)
    with caplog.at_level(logging.WARNING, "kernelgraft"):
        layer(x), layer(x)
        monkeypatch.setattr(cpu, "_HAS_NUMBA", False)
        layer(x), layer(x)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "N = 3, K = 64 and group size 64 is dequantized block by block" in messages[0]
    assert "numba is not installed" in messages[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_leading_axes_and_strides_of_x_do_not_matter(installation, dtype):
    layer, ratio = Layer(40, 128, 64), RATIO[dtype]
    x = torch.randn(2, 3, 256).to(dtype)
    for name, view in {
        "3-D": x[..., :128].contiguous(),
        "1-D": x[0, 0, :128].clone(),
        "sliced": x[..., ::2],
        "transposed": x[..., :128].transpose(0, 1),
        "expanded": x[:1, :1, :128].expand(4, 5, 128),
        "column-major": x[0, :, :128].T.contiguous().T,
    }.items():
        out = layer(view)
        assert out.shape == (*view.shape[:-1], 40)
        assert out.is_contiguous()
        assert_close(name, layer.expected(view), out, ratio)
    assert layer(x[:, :0, :128]).shape == (2, 0, 40)


def test_weights_of_any_strides_give_the_same_bits(installation):
    layer, x, grad = Layer(40, 128, 32), torch.randn(5, 128), torch.randn(5, 40)
    strided = [t.T.contiguous().T for t in layer.tensors]
    assert not any(t.is_contiguous() for t in strided)
    assert torch.equal(w4a16_linear(x, *strided), layer(x))
    assert torch.equal(w4a16_linear_dgrad(grad, *strided), w4a16_linear_dgrad(grad, *layer.tensors))
    assert torch.equal(dequantize_w4a16(*strided), dequantize_w4a16(*layer.tensors))


def test_a_layer_without_rows_gives_empty_results(installation):
    layer = Layer(0, 64, 32)
    x = torch.randn(3, 64, requires_grad=True)
    out = layer(x)
    assert out.shape == (3, 0)
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros(3, 64))
    assert dequantize_w4a16(*layer.tensors).shape == (0, 64)


@pytest.mark.parametrize("tokens", [1, 4, 6])
def test_outliers_cost_others_no_more_than_a_step_of_their_block(tokens):
    k, group = 512, 128
    layer = Layer(33, k, group)
    x = torch.randn(tokens, k) * 1e-3
    x[:, 5], x[:, 300] = 1e4, -3e3
    step = x.abs().view(tokens, -1, 128).amax(-1) / 32767
    bound = (step / 2) @ layer.dense.abs().view(33, -1, 128).sum(-1).T.float()
    rounding = 1e-6 * x.abs().double() @ layer.dense.abs().T
    error = (layer(x).double() - layer.expected(x)).abs()
    assert (error <= 1.01 * bound + rounding).all()


def test_rows_and_tokens_of_any_magnitude_keep_their_own_precision(installation):
    magnitudes = torch.tensor([1e-20, 1e-6, 1.0, 1e6, 1e20])
    layer = Layer(6, 256, 64)
    x = torch.randn(5, 256) * magnitudes.unsqueeze(1)
    for token, wanted, out in zip(range(5), layer.expected(x), layer(x), strict=True):
        assert_close(f"token {token}", wanted, out, RATIO[x.dtype])

    qweight, _, zeros = layer.tensors
    scales = torch.logspace(-4, 4, 6).half().unsqueeze(1).expand(6, 4).contiguous()
    dense = reference.dequantize_w4a16(qweight, scales, zeros, torch.float64)
    out = w4a16_linear(x[2:3], qweight, scales, zeros)
    for row in range(6):
        assert_close(f"row {row}", x[2:3].double() @ dense[row], out[:, row], 3 * RATIO[x.dtype])


def test_the_largest_integers_do_not_overflow():
    scales = torch.ones(4, 1, dtype=torch.float16)
    for zero in (0, 15):
        q = torch.full((4, 256), 15 - zero)
        layer = W4A16Weight.from_integers(q, scales, torch.full((4, 1), zero))
        out = w4a16_linear(torch.ones(5, 256), layer.qweight, layer.scales, layer.zeros)
        assert_close("out", torch.full((5, 4), 256.0 * (15 - 2 * zero)), out, 1e-6)


@pytest.mark.parametrize("group", [32, 64, 96])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_poisons_exactly_its_own_token(installation, group, value):
    layer, x = Layer(9, 192, group), torch.randn(7, 192)
    clean = layer(x)
    for token in (1, 4, 6):  # inside a tile of four, and among the tokens after it
        poisoned = x.clone()
        poisoned[token, 100] = value
        out = layer(poisoned)
        assert not out[token].isfinite().any()
        others = [t for t in range(7) if t != token]
        assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("value", [0.0, 1e-35])
def test_tokens_too_small_to_matter_become_zeros_beside_others_that_do(value):
    layer, x = Layer(9, 128, 64), torch.randn(5, 128)
    clean = layer(x)
    x[2] = value
    out = layer(x)
    assert out[2].abs().max() < 1e-30
    assert torch.equal(out[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "group"), [(48, 8), (192, 96), (256, 64)])
def test_the_dequantized_weight_is_exact_up_to_its_dtype(installation, k, group, dtype):
    layer = Layer(37, k, group)
    weight = dequantize_w4a16(*layer.tensors, dtype)
    assert weight.dtype is dtype
    assert weight.is_contiguous()
    # float16 and bfloat16 may round twice: the scale first, then the product.
    ratio = {torch.float64: 0, torch.float32: 1e-7, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    assert_close("weight", layer.dense, weight, ratio)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (0,)], ids=str)
def test_gradients_equal_those_of_the_whole_weight(installation, dtype, lead):
    layer = Layer(37, 192, 32)
    x, bias = torch.randn(*lead, 192).to(dtype).requires_grad_(), torch.randn(37).to(dtype).requires_grad_()
    grad = torch.randn(*lead, 37).to(dtype)

    layer(x, bias).backward(grad)

    assert_close("grad_x", grad.double() @ layer.dense, x.grad, RATIO[dtype])
    assert_close("grad_bias", grad.double().reshape(-1, 37).sum(0), bias.grad, RATIO[dtype])


def test_one_thread_and_two_give_the_same_bits(installation):
    layer, x, grad = Layer(150, 256, 64), torch.randn(50, 256), torch.randn(50, 150)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        few, many = layer(x[:3]), layer(x)
        results.append((few, many, w4a16_linear_dgrad(grad, *layer.tensors), dequantize_w4a16(*layer.tensors)))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


class LargestTensor(TorchDispatchMode):
    """Watches what operators allocate."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_never_dequantized_whole(installation, monkeypatch, dtype):
    n, k = 4096, 2048  # 32 MiB in float32
    layer = W4A16Weight(
        torch.zeros(n, k // 8, dtype=torch.int32),
        torch.ones(n, k // 64, dtype=torch.float16),
        torch.zeros(n, k // 64, dtype=torch.uint8),
    )
    use_path(monkeypatch, "dequantize")
    copies = len(cpu_aten._copies)
    with LargestTensor() as largest:
        w4a16_linear(torch.ones(2, k, dtype=dtype), layer.qweight, layer.scales, layer.zeros, None)
        w4a16_linear_dgrad(torch.ones(2, n, dtype=dtype), layer.qweight, layer.scales, layer.zeros)
    assert 0 < largest.bytes <= 16 << 20
    assert len(cpu_aten._copies) == copies


@pytest.mark.parametrize(("rows", "k"), [(1, 8), (5000, 4096), (4096, 11008), (3, 1 << 22)])
def test_blocks_cover_the_rows_and_stay_small(rows, k):
    weight = W4A16Weight(*(torch.empty(rows, width, device="meta") for width in (k // 8, 1, 1)))
    blocks = cpu._blocks(weight)
    assert [first for first, _ in blocks] == [0, *(last for _, last in blocks[:-1])]
    assert blocks[-1][1] == rows
    assert all((last - first) * k * 4 <= max(cpu.SCRATCH_BYTES, 4 * k) for first, last in blocks)


@pytest.mark.parametrize("name", [known.name for known in cpu_vectors.INSTRUCTION_SETS])
@pytest.mark.parametrize(("k", "group"), [(192, 32), (192, 64), (576, 64), (256, 128), (384, 192)])
def test_every_instruction_set_computes_the_same(use_instructions, name, k, group):
    use_instructions(name)
    layer, x = Layer(37, k, group), torch.randn(9, k)
    x[5, 3] = 1000  # uneven
    bias = torch.randn(37)
    assert cpu.choose_path(9, W4A16Weight(*layer.tensors), x.dtype) == "integer"
    for tokens in (1, 9):
        assert_close(f"M = {tokens}", layer.expected(x[:tokens], bias), layer(x[:tokens], bias), RATIO[x.dtype])


@pytest.mark.parametrize(("capability", "names"), [("avx2", ("avx2", "avxvnni")), ("default", ("generic",))])
def test_torchs_capability_lowers_the_instruction_set(capability, names):
    if platform.machine() not in ("x86_64", "AMD64") or torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("nothing to lower")
    script = "from kernelgraft_core.runtime.cpu_vectors import instruction_set; print(instruction_set().name)"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() in names


def test_a_target_without_the_instructions_is_never_given_them(monkeypatch):
    # NUMBA_CPU_NAME may name an older processor than this one; LLVM would stop the process at what it does not have.
    monkeypatch.setattr(cpu_vectors, "target_features", lambda: frozenset({"avx2", "fma"}))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(cpu_vectors.platform, "machine", lambda: "x86_64")
    assert cpu_vectors.instruction_set.__wrapped__().name == "avx2"
    monkeypatch.setattr(cpu_vectors, "target_features", frozenset)
    assert cpu_vectors.instruction_set.__wrapped__().name == "generic"


def test_bias_of_another_type_is_added_before_rounding():
    layer, x, bias = Layer(37, 128, 64), torch.randn(5, 128).bfloat16(), torch.randn(37)
    out = torch.ops.kernelgraft.w4a16_linear(x, *layer.tensors, bias)
    assert out.dtype == torch.bfloat16
    assert_close("out", layer.expected(x, bias), out, RATIO[x.dtype])


def test_activations_of_another_width_are_refused_by_the_op_itself():
    # What the public function checks, the kernel would read beyond the array.
    with pytest.raises(ValueError, match=r"x is \(2, 64\), expected \(\.\.\., 128\)"):
        torch.ops.kernelgraft.w4a16_linear(torch.randn(2, 64), *Layer(8, 128, 64).tensors, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [3.0e38, 65520.0, 1.00390625, -1.01171875, 1e-6])
def test_results_round_to_the_nearest_as_torch_does(dtype, value):
    # One weight of one: the result is the activation, exactly, before it is rounded.
    q = torch.zeros(4, 64, dtype=torch.int64)
    q[:, 0] = 1
    weight = W4A16Weight.from_integers(q, torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.uint8))
    x, bias = torch.zeros(1, 64, dtype=dtype), torch.full((4,), value)
    out = torch.ops.kernelgraft.w4a16_linear(x, *weight.tensors, bias)
    assert torch.equal(out, bias.to(dtype).expand(1, 4))


def test_threads_may_call_at_once_with_scratch_of_their_own():
    layer = Layer(150, 512, 64)
    inputs = [torch.randn(tokens, 512) for tokens in (1, 9, 2, 300)]  # the last one's scratch is not kept
    expected = [layer(x) for x in inputs]
    wrong = []

    def work():
        for _ in range(20):
            wrong.extend(
                len(x) for x, wanted in zip(inputs, expected, strict=True) if not torch.equal(layer(x), wanted)
            )

    callers = [threading.Thread(target=work) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.parametrize("outlier", [10.0, 100.0, 1000.0, 5000.0])
@pytest.mark.parametrize("tokens", [1, 5])
def test_an_outlier_that_the_weight_ignores_costs_less_than_bfloat16_does(outlier, tokens):
    # The worst case of block floating point: one huge activation whose own weights are zero.
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (64, 256), generator=generator)
    zeros = torch.randint(0, 16, (64, 2), generator=generator)
    q[:, 5] = zeros[:, 0]
    weight = W4A16Weight.from_integers(q, torch.rand(64, 2, generator=generator) * 0.01 + 0.001, zeros)
    arguments = (weight.qweight, weight.scales, weight.zeros)
    x = torch.randn(tokens, 256, generator=generator)
    x[0, 5] = outlier
    exact = reference.w4a16_linear(x.double(), *arguments, None)
    plain = x.bfloat16() @ reference.dequantize_w4a16(*arguments, torch.bfloat16).T

    def error(out):
        return float((out[0].double() - exact[0]).norm() / exact[0].norm())

    assert error(w4a16_linear(x, *arguments)) < error(plain) / 10
