"""What every test gets: fixed seeds and threads, cache directories of its own, and poisoned memory for the kernels."""

import contextlib
import os
from pathlib import Path

import pytest
import torch

from kernelgraft_core.runtime import testing

KERNEL_TESTS = Path(__file__).parent / "kernelgraft_core"


@pytest.fixture(scope="session", autouse=True)
def own_cache_directories(tmp_path_factory):
    """Nothing a test compiles, measures or remembers touches the user's files, nor depends on them."""
    root = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERNELGRAFT_CACHE_DIR", str(root / "kernelgraft"))
        patch.setenv("TRITON_CACHE_DIR", str(root / "triton"))
        patch.delenv("KERNELGRAFT_BACKEND", raising=False)
        patch.delenv("KERNELGRAFT_PLANS", raising=False)
        yield root


@pytest.fixture(autouse=True)
def reproducible(request):
    """Seeded generators, and the session's number of threads again after a test that changes it."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    # Kernels must not read memory they never wrote; hosts are not ours to test for that.
    poisoned = KERNEL_TESTS in request.path.parents
    with testing.poison_empty() if poisoned else contextlib.nullcontext():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def rng():
    return testing.rng()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_configure():
    # Two threads show what one hides, and more would only wait for each other on a small machine.
    torch.set_num_threads(min(2, os.cpu_count() or 1))
