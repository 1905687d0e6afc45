"""Compiling for GPUs that are not there: one Triton cache for the session, so that tests share compiled kernels."""

import pytest

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def pinned_fusion(monkeypatch):
    """Triton's default for fusing multiplication and addition is about to change."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
