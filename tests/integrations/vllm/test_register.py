"""register_awq: the name comes, comes once, and goes; importing the package costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kernelgraft_vllm import AWQ_METHOD, register_awq

pytest.importorskip("vllm")


class Recorder:
    def __init__(self) -> None:
        self.undos: list[tuple[str, object]] = []

    def on_undo(self, what, undo):
        self.undos.append((what, undo))


@pytest.fixture
def names():
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    before = list(QUANTIZATION_METHODS)
    yield QUANTIZATION_METHODS
    assert before == QUANTIZATION_METHODS


def test_registering_twice_is_registering_once_and_undoing_takes_the_name_away(names):
    patches = Recorder()
    register_awq(patches)
    register_awq(patches)
    assert names.count(AWQ_METHOD) == 1
    [(what, undo)] = patches.undos
    assert AWQ_METHOD in what
    undo()
    undo()
    assert AWQ_METHOD not in names


def test_a_name_that_went_can_come_back(names):
    from vllm.model_executor.layers.quantization import get_quantization_config

    from kernelgraft_vllm.awq import KernelgraftAWQConfig

    for _ in range(2):
        patches = Recorder()
        register_awq(patches)
        assert get_quantization_config(AWQ_METHOD) is KernelgraftAWQConfig
        patches.undos[0][1]()
        with pytest.raises(ValueError, match=AWQ_METHOD):
            get_quantization_config(AWQ_METHOD)


def test_importing_the_package_loads_neither_vllm_nor_torch():
    script = "import sys, kernelgraft_vllm; print([m for m in ('vllm', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
