"""The CPU kernels of the 4-bit cache: every instruction set, how work is cut, and what runs without numba."""

import logging

import pytest
import torch

from kernelgraft_core.quant.kv4 import cpu, cpu_work, kv4_append
from kernelgraft_core.quant.kv4.batch import Scoring, Sequence
from kernelgraft_core.quant.kv4.ops import APPEND, ATTENTION
from kernelgraft_core.runtime.testing import assert_close

from .kv4_cases import expected, make_batch, poisoned_cache


@pytest.fixture
def instructions(use_instructions):
    """``instructions(name)``: the kernels of that instruction set, where this processor has it."""

    def use(name):
        use_instructions(name)
        cpu._attention_kernels.cache_clear()

    yield use
    cpu._attention_kernels.cache_clear()


@pytest.mark.parametrize("name", ["avx512vnni", "avx512", "avxvnni", "avx2", "generic"])
@pytest.mark.parametrize("head_size", [80, 128])
def test_every_instruction_set_computes_the_same(name, head_size, instructions, monkeypatch):
    monkeypatch.setenv("KERNELGRAFT_BACKEND", "cpu")
    instructions(name)
    batch = make_batch([150, 3, 40], [1, 2, 11], head_size=head_size)
    assert_close(name, expected(batch), batch.run(), 1e-4)


SEQUENCES = [Sequence(0, 0, 1, 5000, 5000), Sequence(2, 1, 4, 0, 0), Sequence(3, 4, 44, 700, 700)]


@pytest.mark.parametrize("threads", [1, 2, 16])
@pytest.mark.parametrize("has_own", [True, False])
@pytest.mark.parametrize("window", [None, 1, 300])
def test_every_token_that_a_query_sees_is_in_one_part(threads, has_own, window, monkeypatch):
    monkeypatch.setattr(cpu_work, "available_threads", lambda: threads)
    heads, kv_heads, scoring = 8, 2, Scoring(1.0, True, window, None)
    work = cpu_work.cut_work(SEQUENCES, heads, kv_heads, scoring, has_own)
    seen = {}  # rows of partial results, by query
    for table, first, queries, offset, low, high, row in work.parts.tolist():
        assert low < high
        for query in range(first, first + queries):
            for tokens in range(low, high):
                assert seen.setdefault((table, query, tokens), row) == row, "a token is in two parts"
        assert offset >= 0
    for sequence in SEQUENCES:
        for query in range(sequence.first, sequence.last):
            low, high = scoring.sees(sequence.offset + query - sequence.first, sequence.context)
            assert all((sequence.index, query, token) in seen for token in range(low, high))
    assert work.bounds[0] == 0
    assert work.bounds[-1] == len(work.parts) * kv_heads
    assert list(work.bounds) == sorted(work.bounds)
    assert len(work.tokens) == 44
    assert [sequence.index for sequence, _ in work.own] == ([3] if has_own else [])


def test_many_threads_share_one_long_context(monkeypatch):
    monkeypatch.setattr(cpu_work, "available_threads", lambda: 16)
    work = cpu_work.cut_work(SEQUENCES[:1], 8, 1, Scoring(1.0, True, None, None), False)
    lengths = [high - low for *_, low, high, _ in work.parts.tolist()]
    assert len(lengths) == 10
    assert set(lengths) == {500}
    assert len(work.bounds) == 17


def test_without_numba_the_reference_runs_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(cpu, "_HAS_NUMBA", False)
    for op in (APPEND, ATTENTION):
        monkeypatch.setattr(op, "_told", set())
    with caplog.at_level(logging.WARNING, "kernelgraft"):
        for _ in range(2):
            batch = make_batch([30], [2])
            assert_close("out", expected(batch), batch.run(), 1e-6)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "kv4_append: backend cpu passed over: numba is not installed",
        "kv4_attention: backend cpu passed over: numba is not installed",
    ]


def test_what_the_kernels_do_not_take_is_named():
    batch = make_batch([4], [1], head_size=20, dtype=torch.float64)
    assert ATTENTION.explain("cpu", *batch.tensors, True, None, None)["cpu"] == "float64 is computed by the reference"
    batch = make_batch([4], [1], head_size=20)
    assert cpu.supports_kv4_attention(*batch.tensors) == "head size 20 is not a multiple of 8"
    assert_close("out", expected(batch), batch.run(), 1e-5)


def test_storing_a_prompt_takes_all_threads_and_every_token(monkeypatch):
    monkeypatch.setenv("KERNELGRAFT_BACKEND", "cpu")
    torch.set_num_threads(2)
    key, value = torch.randn(2, 333, 3, 32)
    caches = [poisoned_cache(24, 3, 16, 32) for _ in range(2)]
    slots = torch.randperm(384)[:333]
    kv4_append(key, value, caches[0], slots)
    monkeypatch.setenv("KERNELGRAFT_BACKEND", "reference")
    kv4_append(key, value, caches[1], slots.int())
    assert torch.equal(*caches)
