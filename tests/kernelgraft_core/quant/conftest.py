"""Small products on a busy machine wait longer for a second thread than they take."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(reproducible):
    """``reproducible`` puts the session's number of threads back."""
    torch.set_num_threads(1)


@pytest.fixture
def use_instructions(monkeypatch):
    """``use_instructions(name)``: CPU kernels of that instruction set, where this processor has it."""
    cpu_vectors = pytest.importorskip("kernelgraft_core.runtime.cpu_vectors")
    from kernelgraft_core.quant.packed import cpu_integer

    def use(name: str) -> None:
        wanted = cpu_vectors.BY_NAME[name]
        features = cpu_vectors.target_features()
        # The narrow form of AVX-512's instruction is the one that AVX-VNNI has under another name.
        features |= {"avxvnni"} if {"avx512vnni", "avx512vl"} <= features else set()
        if not features.issuperset(wanted.needs):
            pytest.skip(f"this processor has no {name}")
        monkeypatch.setattr(cpu_vectors, "instruction_set", lambda: wanted)
        cpu_integer._call.cache_clear()

    yield use
    cpu_integer._call.cache_clear()
