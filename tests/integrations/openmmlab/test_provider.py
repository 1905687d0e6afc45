"""``mmcv._ext`` without a compiler: what is there, what says that it is not, and what a compiled mmcv changes."""

import ast
import importlib.machinery
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import mmcv
import mmcv.ops
import pytest
import torch

from kernelgraft_openmmlab import ext, provider


def asked_names():
    """What mmcv's own files ask their loader for."""
    names = set()
    for path in sorted(Path(mmcv.ops.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("load_ext"):
                names |= {name.value for name in node.args[1].elts}
    return names


def test_every_name_that_mmcv_asks_for_is_there():
    asked = asked_names()
    assert len(asked) == 112
    assert asked == set(ext.NAMES)
    assert all(hasattr(sys.modules["mmcv._ext"], name) for name in asked)


def test_no_family_provides_a_name_that_mmcv_does_not_have_or_another_provides():
    seen = []
    for family in ext.FAMILIES:
        module = __import__(f"kernelgraft_openmmlab.ext.{family}", fromlist=["__all__"])
        seen += module.__all__
    assert len(seen) == len(set(seen))
    assert set(seen) <= set(ext.NAMES)
    assert set(ext.NAMES) >= ext.COMPILED_ON_CPU


def test_a_missing_op_names_itself_and_what_to_do(monkeypatch):
    monkeypatch.setattr(ext, "provided", dict)
    with pytest.raises(ext.MissingOp, match=r"mmcv op 'nms' is not provided by kernelgraft: install a compiled mmcv"):
        ext.extension().nms(1, 2)


def compiled_module(**functions):
    made = ModuleType("mmcv._ext")
    made.__file__ = "/site/mmcv/_ext.so"
    vars(made).update(functions)
    return made


def test_a_compiled_mmcv_wins_for_what_it_has_and_is_filled_in_on_a_cpu():
    compiled = compiled_module(
        nms=lambda *_: "compiled", pixel_group=lambda *_: "compiled", indice_conv_forward=lambda *_: "compiled"
    )
    module = ext.extension(compiled)
    assert module.nms() == "compiled"  # it can do that on a CPU
    assert module.pixel_group() == "compiled"
    features, filters = torch.ones(1, 2), torch.ones(1, 1, 1, 2, 3)
    pairs, counts = torch.zeros(1, 2, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    out = module.indice_conv_forward(features, filters, pairs, counts, 1, 0, 0)
    assert torch.equal(out, torch.full((1, 3), 2.0))
    meta = features.to("meta")
    assert module.indice_conv_forward(meta, filters, pairs, counts, 1, 0, 0) == "compiled"
    assert module.ball_query_forward is ext.provided()["ball_query_forward"]


def test_a_compiled_mmcv_without_gpu_ops_is_filled_in_on_a_gpu():
    names = ("nms", "indice_conv_forward", "pixel_group")
    compiled = compiled_module(
        get_compiling_cuda_version=lambda: "not available", **{name: lambda *_: "compiled" for name in names}
    )
    module = ext.extension(compiled)
    meta = torch.empty(0, device="meta")  # stands for a GPU: what is not on a CPU
    cpu = torch.empty(0, 4)
    assert module.nms(cpu, cpu[:, 0], 0.5, 0) == "compiled"
    assert module.pixel_group(meta) == "compiled"  # we have nothing better
    with pytest.raises((ValueError, NotImplementedError)):  # ours, which refuses the shape
        module.nms(meta, meta, 0.5, 0)


def test_installing_twice_changes_nothing():
    before = list(sys.meta_path)
    provider.install()()
    assert sys.meta_path == before


def run(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)


FAKE = """
import sys, types, importlib.machinery, importlib.abc
class Fake(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, origin="/site/_ext.so") if name == "mmcv._ext" else None
    def create_module(self, spec):
        made = types.ModuleType(spec.name)
        made.__file__ = "/site/_ext.so"
        made.nms = lambda *_: "compiled"
        from kernelgraft_openmmlab.ext.names import NAMES
        for name in NAMES:
            if not hasattr(made, name) and name != "knn_forward":
                setattr(made, name, lambda *_: "compiled")
        if sys.argv[1] == "late":
            made.knn_forward = made.nms
        return made
    def exec_module(self, module): pass
sys.meta_path.insert(0, Fake())
"""


@pytest.mark.parametrize("when", ["early", "late"])
def test_the_plugin_finds_a_compiled_mmcv_and_leaves_it_as_it_was(when):
    done = run(
        FAKE
        + """
import kernelgraft
if sys.argv[1] == "late":
    import mmcv.ops
    theirs = sys.modules["mmcv._ext"]
import kernelgraft.mmcv
import mmcv.ops
from mmcv.ops import sparse_ops, nms
import importlib
nms = importlib.import_module("mmcv.ops.nms")
assert nms.ext_module.nms() == "compiled"
assert sparse_ops.ext_module is sys.modules["mmcv._ext"]
assert sparse_ops.ext_module.indice_conv_forward.__wrapped__.__module__ == "kernelgraft_openmmlab.ext.sparse_conv"
kernelgraft.unload_plugin("mmcv")
if sys.argv[1] == "late":
    assert sparse_ops.ext_module is theirs is sys.modules["mmcv._ext"] is mmcv._ext
print("done")
""",
        when,
    )
    assert done.stdout == "done\n", done.stderr


def test_the_plugin_is_taken_off_without_a_trace():
    done = run("""
import sys
before = list(sys.meta_path)
import kernelgraft.mmcv, kernelgraft
kernelgraft.load_plugin("mmcv")
assert "mmcv" not in sys.modules and "mmengine" not in sys.modules  # nothing is imported before it is wanted
from mmcv.ops.furthest_point_sample import FurthestPointSampling
from mmcv.ops import points_in_boxes_all
import mmcv
import mmcv.ops.points_in_boxes as module
ours = FurthestPointSampling.forward
assert module.points_in_boxes_all is points_in_boxes_all and hasattr(points_in_boxes_all, "__wrapped__")
kernelgraft.unload_plugin("mmcv")
assert FurthestPointSampling.forward is not ours
assert mmcv.ops.points_in_boxes_all is points_in_boxes_all.__wrapped__
assert sys.meta_path == before or all("kernelgraft" not in repr(type(each).__module__) for each in sys.meta_path)
assert "mmcv._ext" not in sys.modules
print("done")
""")
    assert done.stdout == "done\n", done.stderr


def test_without_kernelgraft_mmcv_lite_has_no_ops():
    done = run("import mmcv.ops")
    assert "No module named 'mmcv._ext'" in done.stderr


def test_a_compiled_mmcv_that_does_not_load_is_told_and_replaced(tmp_path):
    shutil.copytree(Path(mmcv.__file__).parent, tmp_path / "mmcv", ignore=shutil.ignore_patterns("__pycache__"))
    broken = tmp_path / "mmcv" / f"_ext{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    broken.write_bytes(b"built for another torch")
    done = run(
        f"""
import sys, logging
logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(message)s")
sys.path.insert(0, {str(tmp_path)!r})
import kernelgraft.mmcv
import mmcv.ops
print(sys.modules["mmcv._ext"].nms.__module__)
"""
    )
    assert f"the compiled mmcv at {broken} does not load" in done.stdout, done.stderr
    assert done.stdout.endswith("kernelgraft_openmmlab.ext.nms\n")


def test_threads_may_import_at_once():
    """A finder that imports makes two threads wait for each other."""
    done = run("""
import importlib, threading
import kernelgraft.mmcv, mmcv
names = ("mmcv.ops.knn", "mmcv.ops.points_in_boxes", "mmcv.ops.sparse_structure")
threads = [threading.Thread(target=importlib.import_module, args=(name,), daemon=True) for name in names]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(60)
print([thread.is_alive() for thread in threads])
""")
    assert done.stdout == "[False, False, False]\n", done.stderr
