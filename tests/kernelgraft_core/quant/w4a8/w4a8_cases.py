"""Random weights of W4A8 with what they stand for."""

import torch

from kernelgraft_core.quant.w4a8 import W4A8Weight

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def weight_of(n, k, group, seed=0):
    """A random weight whose integers fill their ranges, and its int8 values computed by definition in int64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, *shape):
        return torch.randint(low, high + 1, shape, generator=generator)

    q, scale = draw(0, 15, n, k), torch.rand(n, generator=generator) + 0.01
    if group == -1:
        zero = draw(0, 15, n)
        return W4A8Weight.from_integers(q, scale, zero=zero), q - zero.unsqueeze(-1)
    step = draw(1, 16, n, k // group)
    offset = (draw(0, 15, n, k // group) * step).clamp(max=121)
    top = ((127 + offset) // step).clamp(max=15).repeat_interleave(group, 1)
    q = torch.minimum(q, top)
    wide = q * step.repeat_interleave(group, 1) - offset.repeat_interleave(group, 1)
    return W4A8Weight.from_integers(q, scale, group_scale=step, group_zero=offset), wide
