"""The Triton kernels of attention in groups in the interpreter, on CPU tensors, against the reference in float64."""

import os

import pytest
import torch

from kernelgraft_core.point_attention import TAILS, cut
from kernelgraft_core.point_attention.attention import reference
from kernelgraft_core.point_attention.norm_ffn import reference as norm_reference
from kernelgraft_core.runtime.testing import assert_close, poison_empty

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_triton_interpreter.py"),
]

if os.environ.get("TRITON_INTERPRET") == "1":
    from kernelgraft_core.point_attention.attention import triton
    from kernelgraft_core.point_attention.norm_ffn import triton as norm_triton
else:
    triton = norm_triton = None

RATIO = {torch.float32: 2e-6, torch.float16: 2e-3}
DTYPES = pytest.mark.parametrize("dtype", RATIO, ids=["fp32", "fp16"])


@DTYPES
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(("size", "channels", "heads"), [(40, 32, 2), (7, 24, 3), (3, 20, 1)], ids=str)
def test_attention_and_its_gradient_are_the_references(size, channels, heads, tail, dtype):
    groups = cut(torch.randperm(57), torch.tensor([0, 50, 50, 52, 57]), size, tail)
    qkv, grad = torch.randn(57, 3 * channels).to(dtype), torch.randn(57, channels).to(dtype)
    rest = *groups.tensors, heads, groups.size
    with poison_empty():
        found = triton.grouped_attention(qkv, *rest)
        gradient = triton.grouped_attention_grad(grad, qkv, *rest)
    assert found.dtype == gradient.dtype == dtype
    assert_close("y", reference.grouped_attention(qkv.double(), *rest), found, RATIO[dtype])
    wanted = reference.grouped_attention_grad(grad.double(), qkv.double(), *rest)
    assert_close("qkv", wanted, gradient, 2 * RATIO[dtype])


@DTYPES
@pytest.mark.parametrize(("rows", "channels", "hidden"), [(70, 32, 64), (3, 20, 37), (33, 130, 40)], ids=str)
def test_norm_ffn_is_the_reference(rows, channels, hidden, dtype):
    c, h = channels, hidden
    shapes = (rows, c), (rows, c), (c,), (c,), (h, c), (h,), (c, h), (c,), (c,), (c,)
    tensors = [torch.randn(shape).mul(0.3 if len(shape) == 2 else 1).to(dtype) for shape in shapes]
    with poison_empty():
        found = norm_triton.norm_ffn(*tensors, 1e-5)
    wanted = norm_reference.norm_ffn(*(each.double() for each in tensors), 1e-5)
    assert_close("y", wanted, found, RATIO[dtype])


def test_no_rows():
    groups = cut(torch.zeros(0, dtype=torch.int64), torch.tensor([0, 0]), 8)
    assert triton.grouped_attention(torch.zeros(0, 48), *groups.tensors, 1, 8).shape == (0, 16)
    assert triton.grouped_attention_grad(torch.zeros(0, 16), torch.zeros(0, 48), *groups.tensors, 1, 8).shape == (0, 48)
