"""Tests that need a CUDA device: all are marked ``gpu``, skipped where there is none, and see poisoned memory."""

from pathlib import Path

import pytest
import torch

from kernelgraft_core.runtime.testing import poison_empty

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    missing = None if torch.cuda.is_available() else pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if missing:
                item.add_marker(missing)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Kernels must not read memory they never wrote."""
    with poison_empty():
        yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # a fault shows in the test that caused it


@pytest.fixture
def device():
    return torch.device("cuda", torch.cuda.current_device())
