"""Layers of every layout, made from random integers."""

import numpy as np
import torch
from hypothesis import strategies as st

from kernelgraft_core.quant.formats.autoawq import Gemm, Gemv
from kernelgraft_core.quant.formats.compressed_tensors import PackQuantized
from kernelgraft_core.quant.formats.llm_awq import LlmAwq
from kernelgraft_core.quant.formats.native import Native
from kernelgraft_core.quant.weights import pack_weight

LAYOUTS = {
    "gemm": Gemm,
    "gemv": Gemv,
    "llm-awq": LlmAwq,
    "gptqmodel-gemv-fast": lambda **settings: LlmAwq(offsets="qzeros", **settings),
    "compressed-tensors": PackQuantized,
    "compressed-tensors-symmetric": lambda **settings: PackQuantized(symmetric=True, **settings),
    "native-4": Native,
    "native-4-symmetric": lambda **settings: Native(symmetric=True, **settings),
    "native-3": lambda **settings: Native(bits=3, **settings),
    "native-3-symmetric": lambda **settings: Native(bits=3, symmetric=True, **settings),
}
SHAPES = st.tuples(
    st.sampled_from([32, 64, 128, 192]),  # group size
    st.integers(1, 5),  # groups
    st.integers(1, 3).map(lambda words: 8 * words),  # N
)


def random_weight(layout, n, k, seed):
    """A weight that ``layout`` holds, as random as it may be."""
    random = np.random.default_rng(seed)
    groups, top = layout.groups(k), 1 << layout.bits
    zeros = np.full((n, groups), layout.zero) if layout.symmetric else random.integers(0, top, (n, groups))
    scales = (random.random((n, groups)) + 0.01).astype(np.float16)
    q = random.integers(0, top, (n, k))
    return pack_weight(*(torch.from_numpy(t) for t in (q, scales, zeros)), layout.bits)


def width(layout, size, groups):
    """K of a layer with so many groups, rounded up to whole stretches of 64 where the layout wants them."""
    return size * (groups + groups % 2) if isinstance(layout, LlmAwq) and size == 32 else size * groups


def bits(tensor):
    return tensor.view(torch.int16) if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def same_bits(a, b):
    return a.dtype is b.dtype and torch.equal(bits(a), bits(b))


def hexed(tensor, word=4):
    return tensor.numpy().tobytes().hex(" ", word)
