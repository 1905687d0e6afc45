"""Weights dequantized by table equal the reference bit for bit, and what cannot be done by table is not."""

import pytest
import torch

from kernelgraft_core.quant.packed import cpu, reference
from kernelgraft_core.quant.weights import pack_weight

pytest.importorskip("numba")

from kernelgraft_core.quant.packed import cpu_halves, cpu_integer
from kernelgraft_core.runtime import cpu_vectors

pytestmark = pytest.mark.skipif(
    cpu_halves.unsupported(cpu_vectors.instruction_set(), 128) is not None, reason="no AVX-512 here"
)


def weight_of(bits, n, k, group):
    q = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    zeros = torch.randint(0, 1 << bits, (n, k // group), dtype=torch.uint8)
    return q, pack_weight(q, torch.randn(n, k // group).half(), zeros, bits)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group", [64, 128, 192, 256, 640])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 5, 40])
def test_equals_the_reference(bits, group, dtype, n):
    q, weight = weight_of(bits, n, 2 * group, group)
    _, direct = cpu_integer._dequantize_launch(n, group, bits, dtype)
    assert direct
    wanted = reference.dequantize(q, weight.scales, weight.zeros, torch.float32).to(dtype)
    assert torch.equal(cpu_integer.dequantize(weight, dtype), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0, -0.0, 6e-8, 65504.0, -3.0, torch.inf, torch.nan])
def test_unusual_scales_stay_what_they_are(dtype, scale):
    q, weight = weight_of(4, 4, 128, 64)
    weight.scales[1] = scale
    wanted = reference.dequantize(q, weight.scales, weight.zeros, torch.float32).to(dtype)
    found = cpu_integer.dequantize(weight, dtype)
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(7), wanted.nan_to_num(7))


@pytest.mark.parametrize(("group", "dtype"), [(32, torch.bfloat16), (96, torch.float16), (64, torch.float32)])
def test_other_groups_and_types_go_through_float32(group, dtype):
    q, weight = weight_of(4, 5, 2 * group, group)
    assert not cpu_integer._dequantize_launch(5, group, 4, dtype)[1]
    wanted = reference.dequantize(q, weight.scales, weight.zeros, torch.float32).to(dtype)
    assert torch.equal(cpu_integer.dequantize(weight, dtype), wanted)


def test_the_gemm_takes_over_sooner_where_a_table_dequantizes():
    assert cpu._gemm_tokens(64) < cpu._gemm_tokens(32)


def test_narrower_vectors_have_no_table():
    reasons = {isa.name: cpu_halves.unsupported(isa, 128) for isa in cpu_vectors.INSTRUCTION_SETS}
    assert [name for name, reason in reasons.items() if reason is None] == ["avx512vnni", "avx512"]
    assert "avx2 looks nothing up" in reasons["avx2"]
    assert "group size 96" in cpu_halves.unsupported(cpu_vectors.INSTRUCTION_SETS[0], 96)
