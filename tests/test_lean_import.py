"""Importing us costs little: no host, no torch for the face, no CUDA and no compiler for the kernels."""

import json
import subprocess
import sys

HOSTS = {"vllm", "transformers", "accelerate", "mmcv", "mmengine", "mmdet3d", "mmseg", "torch_geometric"}


def loaded_by(statement, question="None"):
    """The top-level modules that a fresh interpreter has after a statement, and its answer to a question."""
    script = f"import json, sys\n{statement}\nprint(json.dumps([[m for m in sys.modules if '.' not in m], {question}]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_the_face_loads_neither_torch_nor_a_host():
    loaded, _ = loaded_by("import kernelgraft, kernelgraft_core; kernelgraft.plugins()")
    assert not (HOSTS | {"torch", "triton", "numba", "numpy"}) & set(loaded)


def test_the_ops_load_neither_a_compiler_nor_a_host_and_leave_cuda_alone():
    loaded, cuda = loaded_by("import kernelgraft_core.quant.w4a16, torch", "torch.cuda.is_initialized()")
    assert "torch" in loaded
    assert not (HOSTS | {"triton", "numba", "kernelgraft"}) & set(loaded)
    assert not cuda


def test_the_door_for_vllm_loads_neither_vllm_nor_torch():
    loaded, _ = loaded_by("import kernelgraft.vllm")
    assert not (HOSTS | {"torch", "triton"}) & set(loaded)
