"""Random batches over a 4-bit cache, and their attention in float64 from the bytes, written independently."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from kernelgraft_core.quant.kv4 import kv4_append, kv4_attention, kv4_row_bytes


@dataclass
class Batch:
    """Arguments of one call; ``history`` says which slots hold each sequence's context, in order."""

    query: torch.Tensor
    key: torch.Tensor | None
    value: torch.Tensor | None
    cache: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    query_start: torch.Tensor
    softmax_scale: float
    history: list

    @property
    def tensors(self):
        return (
            self.query, self.key, self.value, self.cache, self.block_tables, self.context_lens, self.query_start,
            self.softmax_scale,
        )  # fmt: skip

    def run(self, **options):
        return kv4_attention(*self.tensors, **options)


def poisoned_cache(blocks, kv_heads, block_size, head_size, padding=0):
    """A cache whose every row is NaN; with ``padding``, of tokens between those of other layers and with gaps."""
    row = kv4_row_bytes(head_size)
    if not padding:
        return torch.full((blocks, kv_heads, block_size, row), 255, dtype=torch.uint8)
    wide = torch.full((blocks, block_size, 3, kv_heads, row + 2 * padding), 255, dtype=torch.uint8)
    return wide[:, :, 1, :, padding : padding + row].permute(0, 2, 1, 3)


def make_batch(
    contexts, queries, *, kv_heads=2, group=3, head_size=64, block_size=16, dtype=torch.float32, chunk=True,
    padding=0, seed=0, device="cpu",
):  # fmt: skip
    """Sequences of ``contexts`` tokens in the cache and ``queries`` new ones; without ``chunk`` contexts count both."""
    generator = torch.Generator().manual_seed(seed)
    tokens, batch = sum(queries), len(contexts)
    heads = kv_heads * group

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    needed = [-(-context // block_size) for context in contexts]
    blocks = sum(needed) + 2
    order = torch.randperm(blocks, generator=generator).tolist()
    width = max([*needed, 1]) + 1
    tables = torch.full((batch, width), -7, dtype=torch.int32)
    cache = poisoned_cache(blocks, kv_heads, block_size, head_size, padding).to(device)
    history = []
    for row, (context, count) in enumerate(zip(contexts, needed, strict=True)):
        own = [order.pop() for _ in range(count)]
        tables[row, :count] = torch.tensor(own, dtype=torch.int32)
        slots = [own[t // block_size] * block_size + t % block_size for t in range(context)]
        history.append(slots)
        offset = draw(kv_heads, head_size)
        key = draw(context, kv_heads, head_size) + offset
        value = draw(context, kv_heads, head_size) * 3
        kv4_append(key.to(device), value.to(device), cache, torch.tensor(slots, dtype=torch.int64, device=device))
    if padding:  # as vLLM hands slices of one projection
        joint = draw(tokens, (heads + 2 * kv_heads) * head_size).to(device)
        sizes = (heads * head_size, kv_heads * head_size, kv_heads * head_size)
        query, key, value = (part.unflatten(1, (-1, head_size)) for part in joint.split(sizes, 1))
    else:
        shapes = ((tokens, heads, head_size), (tokens, kv_heads, head_size), (tokens, kv_heads, head_size))
        query, key, value = (draw(*shape).to(device) for shape in shapes)
    return Batch(
        query, key if chunk else None, value if chunk else None, cache, tables.to(device),
        torch.tensor(contexts, dtype=torch.int32, device=device),
        torch.tensor([0, *np.cumsum(queries).tolist()], dtype=torch.int32, device=device),
        1 / math.sqrt(head_size), history,
    )  # fmt: skip


def decoded(cache, slots, kv_heads, head_size):
    """Keys and values, float64 ``(len(slots), kv_heads, head_size)``, from the bytes by definition."""
    block_size = cache.shape[2]
    rows = cache.cpu().numpy()
    key, value = np.zeros((2, len(slots), kv_heads, head_size))
    for i, slot in enumerate(slots):
        for h in range(kv_heads):
            row = rows[slot // block_size, h, slot % block_size].tobytes()
            numbers = np.frombuffer(row[head_size:], np.float16).astype(np.float64)
            for part, packed in enumerate((row[: head_size // 2], row[head_size // 2 : head_size])):
                q = [half for byte in packed for half in (byte & 15, byte >> 4)]
                (key, value)[part][i, h] = np.array(q) * numbers[2 * part] + numbers[2 * part + 1]
    return torch.from_numpy(key), torch.from_numpy(value)


def expected(batch, *, causal=True, window=None, softcap=None):
    """Attention in float64, query by query and head by head."""
    query = batch.query.detach().cpu().double()
    kv_heads, head_size = batch.cache.shape[1], query.shape[2]
    group = query.shape[1] // kv_heads
    out = torch.zeros_like(query)
    starts = batch.query_start.tolist()
    for b, context in enumerate(batch.context_lens.tolist()):
        first, last = starts[b], starts[b + 1]
        key, value = decoded(batch.cache, batch.history[b], kv_heads, head_size)
        offset = context - (last - first)
        if batch.key is not None:
            offset = context
            key = torch.cat((key, batch.key[first:last].cpu().double()))
            value = torch.cat((value, batch.value[first:last].cpu().double()))
        for t in range(first, last):
            position = offset + t - first
            low = 0 if window is None else max(0, position - window + 1)
            high = len(key) if window is None else min(len(key), position + window)
            high = min(high, position + 1) if causal else high
            for h in range(query.shape[1]):
                scores = key[low:high, h // group] @ query[t, h] * batch.softmax_scale
                if softcap is not None:
                    scores = torch.tanh(scores / softcap) * softcap
                out[t, h] = scores.softmax(0) @ value[low:high, h // group]
    return out
