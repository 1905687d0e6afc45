"""W4A8 and W8A8 on CPU: every path gives the bits of the reference, on every instruction set."""

import gc
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft_core.quant.w4a8 import (
    W4A8Weight,
    cpu_onednn,
    cpu_panels,
    cpu_products,
    quantize_activation,
    reference,
    rms_norm_quantize,
    silu_mul_quantize,
    w4a8_linear,
    w4a8_matmul,
)
from kernelgraft_core.quant.w8a8 import reference as w8a8_reference
from kernelgraft_core.quant.w8a8 import w8a8_linear, w8a8_matmul

from .w4a8_cases import FLOATS, weight_of

SHAPES = [(1, 32, 8), (5, 64, 64), (33, 48, 6), (96, 256, -1), (4, 2, 2), (0, 16, 8), (70, 72, 24), (40, 8, -1)]
BIAS = pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
WHOLE_BYTES = [(n, k, group) for n, k, group in SHAPES if k % 8 == 0 and (group == -1 or group % 8 == 0)]
needs_panels = pytest.mark.skipif(cpu_panels.byte_set() is None, reason="no kernels of ours for this processor")


@pytest.fixture(params=["kernels", "onednn"])
def installation(request, monkeypatch):
    """With kernels of our own, and as without numba."""
    if request.param == "onednn":
        if reason := cpu_onednn.unsupported():
            pytest.skip(reason)
        monkeypatch.setattr(cpu_products, "byte_set", lambda: None)
    elif cpu_panels.byte_set() is None:
        pytest.skip("no kernels of ours for this processor")
    return request.param


def tensor(dtype, *shape):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
@pytest.mark.parametrize("m", [0, 1, 3, 33])
@pytest.mark.parametrize("dtype", FLOATS)
@BIAS
def test_a_weight_expanded_to_bytes_gives_the_bits_of_the_reference(n, k, group, m, dtype, bias, installation):
    weight, wide = weight_of(n, k, group)
    x = tensor(dtype, k, m).T
    added = tensor(dtype, n) if bias else None
    found = w4a8_linear(x, *weight.tensors, added)
    assert torch.equal(found, reference.w4a8_linear(x, *weight.tensors, added))
    q, scale, _ = quantize_activation(x)
    exact = (q.long() @ wide.T).double() * scale.double().unsqueeze(-1) * weight.scale.double()
    exact = exact if added is None else exact + added.double()
    torch.testing.assert_close(found.double(), exact, rtol=2e-2 if dtype == torch.bfloat16 else 2e-3, atol=2e-3 * k)


@needs_panels
@pytest.mark.parametrize(("n", "k", "group"), WHOLE_BYTES)
@pytest.mark.parametrize("m", [1, 2, 3, 12, 25, 50])
@pytest.mark.parametrize("dtype", FLOATS)
@BIAS
def test_an_arranged_weight_gives_the_bits_of_the_reference(n, k, group, m, dtype, bias):
    weight, _ = weight_of(n, k, group)
    arranged = weight.arranged()
    assert arranged.is_arranged == (n > 0)
    x, added = tensor(dtype, m, k), tensor(dtype, n) if bias else None
    wanted = reference.w4a8_linear(x, *weight.tensors, added)
    assert torch.equal(w4a8_linear(x, *arranged.tensors, added), wanted)
    assert torch.equal(w4a8_matmul(*quantize_activation(x), *arranged.tensors, added, dtype), wanted)
    assert torch.equal(reference.w4a8_linear(x, *arranged.tensors, added), wanted)


@pytest.mark.parametrize("m", [0, 1, 2, 5, 40])
@pytest.mark.parametrize(("n", "k"), [(1, 4), (3, 7), (64, 128), (45, 100)])
@pytest.mark.parametrize("dtype", FLOATS)
@BIAS
def test_w8a8_gives_the_bits_of_the_reference(n, k, m, dtype, bias, installation):
    qweight, scale = torch.randint(-128, 128, (n, k), dtype=torch.int8), torch.rand(n).half()
    x, added = tensor(dtype, m, k), tensor(dtype, n) if bias else None
    wanted = w8a8_reference.w8a8_linear(x, qweight, scale, added)
    assert torch.equal(w8a8_linear(x, qweight, scale, added), wanted)
    assert torch.equal(w8a8_matmul(*quantize_activation(x), qweight, scale, added, dtype), wanted)


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 17), (2, 5, 64), (1, 4096)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_activations_are_quantized_to_the_bits_of_the_reference(shape, dtype):
    x = tensor(dtype, *shape)
    if x.numel():
        x[0] = 0
    for found, wanted in zip(quantize_activation(x), reference.quantize_activation(x), strict=True):
        assert torch.equal(found, wanted)
    for fused, plain, args in (
        (rms_norm_quantize, reference.rms_norm_quantize, (x, torch.ones(shape[-1]), 1e-5)),
        (silu_mul_quantize, reference.silu_mul_quantize, (torch.cat((x, x), -1),)),
    ):
        for found, wanted in zip(fused(*args), plain(*args), strict=True):
            assert torch.equal(found, wanted)


def test_halves_are_rounded_to_even_though_a_product_with_the_inverse_would_not():
    # 0.5, 1.5, ... 126.5 times a scale whose inverse is not exact
    x = torch.cat((torch.arange(127) + 0.5, torch.tensor([127.0]))) * 3
    q, scale, _ = quantize_activation(x)
    assert scale == 3
    assert q[:4].tolist() == [0, 2, 2, 4]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("m", [3, 30])
def test_a_token_that_is_not_finite_gives_a_row_of_nan_and_no_other(value, m, installation):
    weight, _ = weight_of(6, 16, 8)
    x = torch.randn(m, 16)
    x[1, 4] = value
    for held in (weight, weight.arranged()) if installation == "kernels" else (weight,):
        found = w4a8_linear(x, *held.tensors)
        assert found[1].isnan().all()
        assert found[[0, *range(2, m)]].isfinite().all()


@pytest.mark.parametrize("m", [2, 5, 30])
def test_extreme_integers_are_summed_exactly(m, installation):
    k = 4096
    full = torch.full((4, k), 15)
    highest = {"group_scale": torch.full((4, 1), 16), "group_zero": torch.full((4, 1), 113)}
    lowest = {"group_scale": torch.full((4, 1), 1), "group_zero": torch.full((4, 1), 128)}
    for q, parts, value in ((full, highest, 127), (full * 0, lowest, -128)):
        weight = W4A8Weight.from_integers(q, torch.ones(4), **parts)
        assert weight.int8().eq(value).all()
        x = torch.ones(m, k)
        x[1:] *= -1
        wanted = torch.full((m, 4), float(value * k))
        wanted[1:] *= -1
        for held in (weight, weight.arranged()) if installation == "kernels" else (weight,):
            assert torch.equal(w4a8_linear(x, *held.tensors), wanted)


def test_an_expanded_weight_follows_the_packed_one(installation):
    gc.collect()  # weights of other tests would leave the table while this one counts
    kept = cpu_products._weights
    weight, _ = weight_of(8, 32, 8)
    before, count = w4a8_linear(torch.ones(1, 32), *weight.tensors), len(kept)
    other = W4A8Weight.from_integers(torch.zeros(8, 32), weight.scale, zero=torch.full((8,), 3))
    weight.qweight.copy_(other.qweight)
    assert not torch.equal(w4a8_linear(torch.ones(1, 32), *weight.tensors), before)
    assert len(kept) == count
    del weight
    gc.collect()
    assert len(kept) == count - 1


@needs_panels
@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**16), st.integers(1, 70), st.integers(1, 6), st.sampled_from([8, 16, 24, -1]))
def test_arranging_is_undone(seed, n, groups, group):
    weight, _ = weight_of(n, groups * (8 if group == -1 else group), group, seed)
    arranged = weight.arranged()
    assert arranged.is_arranged
    assert arranged.arranged() is arranged
    arranged.check()
    assert (arranged.out_features, arranged.in_features, arranged.group_size) == (
        weight.out_features,
        weight.in_features,
        weight.group_size,
    )
    assert torch.equal(arranged.int8(), weight.int8())
    for found, wanted in zip(arranged.plain().tensors, weight.tensors, strict=True):
        assert (found is None) == (wanted is None)
        assert found is None or torch.equal(found, wanted)


@needs_panels
def test_four_bits_that_stay_take_a_quarter_of_16():
    weight, _ = weight_of(256, 1024, 128)
    size = sum(t.numel() * t.element_size() for t in weight.arranged().tensors if t is not None)
    assert size <= 0.27 * 2 * 256 * 1024


@needs_panels
@pytest.mark.parametrize(
    "weight",
    [
        weight_of(8, 36, 6)[0],
        weight_of(8, 12, -1)[0],
        W4A8Weight.from_integers(
            torch.full((1, 8), 15),
            torch.ones(1),
            group_scale=torch.full((1, 1), 17),
            group_zero=torch.full((1, 1), 200),
        ),
    ],
    ids=["group of 6", "K = 12", "beyond a byte"],
)
def test_weights_that_the_kernels_cannot_hold_in_four_bits_stay_as_they_are(weight):
    assert weight.arranged() is weight
    x = torch.randn(2, weight.in_features)
    assert torch.equal(w4a8_linear(x, *weight.tensors), reference.w4a8_linear(x, *weight.tensors, None))


@needs_panels
def test_arranged_tensors_that_do_not_belong_together_are_refused():
    words, scale, group_scale, group_zero, _ = weight_of(40, 32, 8)[0].arranged().tensors
    x = torch.randn(1, 32)
    with pytest.raises(ValueError, match=r"\(4, 4, 16, 4\), expected a contiguous arranged weight of 30 rows"):
        w4a8_linear(x, words, scale[:30], group_scale, group_zero)
    with pytest.raises(ValueError, match=r"\(1, 4, 32\), expected torch.uint8 \(2, K / group size, 32\)"):
        w4a8_linear(x, words, scale, group_scale[:1], group_zero)
    with pytest.raises(ValueError, match="K = 32 does not split into such groups"):
        w4a8_linear(x, words, scale, group_scale[:, :3].contiguous(), group_zero[:, :3].contiguous())


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_share_the_rows(threads, installation):
    before = torch.get_num_threads()
    weight, _ = weight_of(300, 64, 32)
    x = torch.randn(30, 64)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(w4a8_linear(x, *weight.tensors), reference.w4a8_linear(x, *weight.tensors, None))
    finally:
        torch.set_num_threads(before)


LOWERED = """
import torch
from kernelgraft_core.quant.w4a8 import W4A8Weight, cpu_panels, reference, w4a8_linear
known = cpu_panels.byte_set()
print(known and known.isa.name)
torch.manual_seed(0)
q, scale = torch.randint(0, 16, (70, 256)), torch.rand(70)
weights = [
    W4A8Weight.from_integers(q, scale, group_scale=torch.full((70, 4), 16), group_zero=torch.full((70, 4), 113)),
    W4A8Weight.from_integers(q * 0, scale, group_scale=torch.full((70, 4), 1), group_zero=torch.full((70, 4), 128)),
    W4A8Weight.from_integers(q, scale, zero=torch.randint(0, 16, (70,))),
]
for weight in weights:
    for m in (1, 2, 7, 30):
        x = torch.randn(m, 256).sign()
        wanted = reference.w4a8_linear(x, *weight.tensors, None)
        for held in (weight, weight.arranged()):
            assert torch.equal(w4a8_linear(x, *held.tensors), wanted), (m, held.is_arranged)
print("exact")
"""


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ATEN_CPU_CAPABILITY", "avx2"),
        ("ATEN_CPU_CAPABILITY", "default"),
        ("ONEDNN_MAX_CPU_ISA", "AVX2"),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE"),
    ],
)
def test_lowered_instruction_sets_give_the_same_bits(variable, value):
    """Ours, and where they do not run oneDNN's, whose products saturate without VNNI and are refused then."""
    done = subprocess.run(
        [sys.executable, "-c", LOWERED], env=os.environ | {variable: value}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "exact"
    if variable == "ATEN_CPU_CAPABILITY":
        assert done.stdout.split()[0] in ({"avx2": ("avx2", "avxvnni", "None"), "default": ("None",)}[value])
