"""Storing keys and values in 4 bits: golden bytes, what is skipped, what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from kernelgraft_core.quant.kv4 import (
    kv4_append,
    kv4_row_bytes,
    new_cache,
    pack_rows,
    quantize_kv,
    unpack_rows,
)

from .kv4_cases import decoded, poisoned_cache

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(params=["reference", "cpu"])
def backend(request, monkeypatch):
    monkeypatch.setenv("KERNELGRAFT_BACKEND", request.param)
    return request.param


def append(key, value, cache, slots):
    kv4_append(key, value, cache, torch.tensor(slots, dtype=torch.int64))


def test_golden_bytes(backend):
    cache = new_cache(2, 1, 2, 8)
    key, value = torch.tensor([[[0.0, 15.0, 1.0, 7.4, 3.0, 0.4, 14.6, 2.0]]]), torch.full((1, 1, 8), -2.0)
    append(key, value, cache, [3])
    numbers = np.array([1.0, 0.0, 0.0, -2.0], np.float16).tobytes()
    assert bytes(cache[1, 0, 1].tolist()) == bytes([0xF0, 0x71, 0x03, 0x2F, 0, 0, 0, 0]) + numbers
    assert not cache[0].any()
    assert not cache[1, 0, 0].any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("head_size", [2, 6, 32, 80, 128, 256])
@pytest.mark.parametrize("strided", [False, True])
def test_rows_are_those_of_the_definition(backend, dtype, head_size, strided, monkeypatch):
    if dtype == torch.float64 or head_size % 8:
        monkeypatch.setenv("KERNELGRAFT_BACKEND", "reference")
    tokens, heads = 7, 3
    if strided:
        joint = torch.randn(tokens, 3 * heads * head_size).to(dtype)
        _, key, value = (x.unflatten(1, (heads, head_size)) for x in joint.chunk(3, 1))
    else:
        key, value = torch.randn(2, tokens, heads, head_size).to(dtype)
    cache = poisoned_cache(3, heads, 5, head_size, 3 * strided)
    slots = [4, -1, 14, 0, 9, -5, 7]
    before = cache.clone()
    append(key, value, cache, slots)
    rows = pack_rows(key, value)
    for t, slot in enumerate(slots):
        if slot >= 0:
            assert torch.equal(cache[slot // 5, :, slot % 5], rows[t])
    kept = [slot for slot in slots if slot >= 0]
    for slot in set(range(15)) - set(kept):
        assert torch.equal(cache[slot // 5, :, slot % 5], before[slot // 5, :, slot % 5])
    found = decoded(cache, kept, heads, head_size)
    taken = [t for t, slot in enumerate(slots) if slot >= 0]
    for name, wanted, got in zip("kv", (key[taken], value[taken]), found, strict=True):
        step = (wanted.double().amax(-1) - wanted.double().amin(-1)) / 15
        # Half a step, and what rounding step and low to float16 adds.
        allowed = (step * 0.51 + wanted.double().abs().amax(-1) * 2**-10).unsqueeze(-1)
        assert ((got - wanted.double()).abs() <= allowed).all(), name


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**16), st.floats(-6, 4), st.floats(-4, 4), st.integers(1, 9))
def test_backends_store_the_same_bytes(seed, exponent, offset, tokens):
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, tokens, 2, 64, generator=generator) * 10**exponent + offset
    caches = []
    with pytest.MonkeyPatch.context() as patch:
        for backend in ("reference", "cpu"):
            patch.setenv("KERNELGRAFT_BACKEND", backend)
            caches.append(new_cache(1, 2, 16, 64))
            append(key, value, caches[-1], list(range(tokens)))
    assert torch.equal(*caches)


def test_rows_come_back():
    key, value = torch.randn(2, 3, 4, 16)
    found = unpack_rows(pack_rows(key, value), torch.float32)
    for x, got in zip((key, value), found, strict=True):
        q, scale, low = quantize_kv(x)
        assert torch.equal(got, q * scale.float().unsqueeze(-1) + low.float().unsqueeze(-1))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_come_back_as_nan_and_no_others(backend, bad):
    key, value = torch.randn(2, 4, 2, 32)
    key[1, 0, 3], value[2, 1, 31] = bad, bad
    cache = new_cache(1, 2, 4, 32)
    append(key, value, cache, [0, 1, 2, 3])
    rows = cache[0].transpose(0, 1)
    found = unpack_rows(rows, torch.float32)
    for x, got in zip((key, value), found, strict=True):
        spoilt = ~x.isfinite().all(-1)
        assert got[spoilt].isnan().all()
        assert got[~spoilt].isfinite().all()


def test_equal_values_and_values_beyond_float16(backend):
    key = torch.full((1, 1, 32), 0.75)
    value = torch.linspace(-1e6, 1e6, 32).view(1, 1, 32)
    cache = new_cache(1, 1, 1, 32)
    append(key, value, cache, [0])
    key, value = unpack_rows(cache[0, 0], torch.float32)
    assert torch.equal(key, torch.full((1, 32), 0.75))
    assert value.isfinite().all()
    assert value[0, 0] == -65504


@pytest.mark.parametrize("slots", [[], [-1, -1]])
def test_nothing_to_store(backend, slots):
    cache = poisoned_cache(1, 2, 4, 32)
    append(torch.randn(len(slots), 2, 32), torch.randn(len(slots), 2, 32), cache, slots)
    assert (cache == 255).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(2, 3, 32)}, r"key is torch.float32 \(2, 3, 32\), expected torch.float32 \(2, 2, 32\)"),
        ({"key": torch.zeros(2, 2, 32, dtype=torch.int8)}, "key is torch.int8"),
        ({"value": torch.zeros(2, 2, 32).half()}, "value is torch.float16"),
        ({"value": torch.zeros(2, 2, 30)}, r"value is torch.float32 \(2, 2, 30\)"),
        ({"slot_mapping": torch.zeros(3, dtype=torch.int64)}, r"slot_mapping is torch.int64 \(3,\)"),
        ({"slot_mapping": torch.zeros(2)}, "slot_mapping is torch.float32"),
        ({"slot_mapping": torch.tensor([1, 4])}, r"slot_mapping\[1\] is 4, the cache has slots 0 to 3"),
        ({"cache": torch.zeros(1, 2, 4, 41, dtype=torch.uint8)}, r"cache is \(1, 2, 4, 41\)"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_stored(backend, change, message):
    cache = poisoned_cache(1, 2, 4, 32)
    arguments = {
        "key": torch.zeros(2, 2, 32), "value": torch.zeros(2, 2, 32), "cache": cache,
        "slot_mapping": torch.tensor([0, 1]),
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        kv4_append(**arguments)
    assert (cache == 255).all()


@pytest.mark.parametrize("head_size", [0, -2, 7])
def test_head_sizes_that_no_row_has_are_refused(head_size):
    with pytest.raises(ValueError, match=f"head size is {head_size}"):
        kv4_row_bytes(head_size)


def test_passes_torchs_own_checks(backend):
    key, value = torch.randn(2, 3, 2, 32)
    arguments = (key, value, new_cache(1, 2, 4, 32), torch.tensor([2, -1, 0]))
    opcheck(torch.ops.kernelgraft.kv4_append.default, arguments)


def test_keys_that_want_a_gradient_are_stored_without_one(backend):
    key, value = torch.randn(2, 1, 2, 32)
    cache = new_cache(1, 2, 4, 32)
    append(key.requires_grad_(), value, cache, [1])
    assert torch.equal(cache[0, :, 1], pack_rows(key.detach(), value)[0])
