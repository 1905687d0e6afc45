"""The GPU kernel of two normalizations with a feed-forward network between them: one pass over memory."""

import triton
import triton.language as tl


@triton.jit
def _normalized(values, weight, bias, there, channels, eps):
    """Layer normalization of rows, float32; columns that are not there are 0."""
    mean = tl.sum(values, 1) / channels
    centred = tl.where(there[None, :], values - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / channels + eps)
    return centred * scale[:, None] * weight[None, :] + bias[None, :]


@triton.jit
def norm_ffn_kernel(x, update, norm1_weight, norm1_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm2_weight,
                    norm2_bias, out, rows, channels, hidden, eps, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
                    INNER: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A block of rows; the feed-forward network is done ``INNER`` hidden channels at a time.

    ``WHOLE``: channels and hidden fill their blocks, so that weights are loaded without masks.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    there = channel < channels
    at = row.to(tl.int64)[:, None] * channels + channel[None, :]
    mask = (row < rows)[:, None] & there[None, :]
    values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    values += tl.load(update + at, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(norm1_weight + channel, mask=there, other=0.0).to(tl.float32)
    bias = tl.load(norm1_bias + channel, mask=there, other=0.0).to(tl.float32)
    normal = _normalized(values, weight, bias, there, channels, eps)
    operand = normal.to(fc1_weight.dtype.element_ty)
    addend = tl.load(fc2_bias + channel, mask=there, other=0.0).to(tl.float32)
    total = normal + addend[None, :]
    for begin in range(0, hidden, INNER):
        inner = begin + tl.arange(0, INNER)
        inner_there = inner < hidden
        first_at = inner[None, :] * channels + channel[:, None]  # both weights transposed
        second_at = channel[None, :] * hidden + inner[:, None]
        if WHOLE:
            first = tl.load(fc1_weight + first_at)
            second = tl.load(fc2_weight + second_at)
            first_bias = tl.load(fc1_bias + inner).to(tl.float32)
        else:
            first = tl.load(fc1_weight + first_at, mask=there[:, None] & inner_there[None, :], other=0.0)
            second = tl.load(fc2_weight + second_at, mask=inner_there[:, None] & there[None, :], other=0.0)
            first_bias = tl.load(fc1_bias + inner, mask=inner_there, other=0.0).to(tl.float32)
        active = tl.dot(operand, first, input_precision=PRECISION) + first_bias[None, :]
        active = 0.5 * active * (1.0 + tl.erf(active * 0.7071067811865476))
        total = tl.dot(active.to(second.dtype), second, total, input_precision=PRECISION)
    weight = tl.load(norm2_weight + channel, mask=there, other=0.0).to(tl.float32)
    bias = tl.load(norm2_bias + channel, mask=there, other=0.0).to(tl.float32)
    found = _normalized(total, weight, bias, there, channels, eps)
    tl.store(out + at, found.to(out.dtype.element_ty), mask=mask)
