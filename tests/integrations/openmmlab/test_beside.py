"""The file beside mmcv-lite: for every program of an environment, and gone again."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import mmcv
import pytest
from typer.testing import CliRunner

from kernelgraft.cli import app
from kernelgraft_openmmlab import beside


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder with an mmcv of its own, found before the installed one."""
    shutil.copytree(Path(mmcv.__file__).parent, tmp_path / "mmcv", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(
        beside.importlib.util, "find_spec", lambda name: importlib_spec(name, tmp_path / name), raising=True
    )
    return tmp_path


def importlib_spec(name, folder):
    if not folder.is_dir():
        return None
    from importlib.machinery import ModuleSpec

    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations.append(str(folder))
    return spec


def run(site, code):
    environment = os.environ | {"PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment, cwd=site
    )


def test_programs_that_know_nothing_of_kernelgraft_find_the_ops(site):
    assert beside.status().state == "disabled"
    assert beside.enable().state == "enabled"
    assert beside.enable().state == "enabled"  # twice is once
    done = run(site, "import mmcv.ops, sys; print(mmcv.__file__, mmcv._ext.indice_conv_forward.__module__)")
    assert done.stdout.split() == [str(site / "mmcv" / "__init__.py"), "kernelgraft_openmmlab.ext.sparse_conv"]
    repaired = run(site, "from mmcv.ops import points_in_boxes_all as f; print(hasattr(f, '__wrapped__'))")
    assert repaired.stdout == "True\n", repaired.stderr
    assert beside.disable()
    assert not beside.disable()
    assert sorted(path.name for path in (site / "mmcv").glob("*_ext*")) == []
    assert "No module named 'mmcv._ext'" in run(site, "import mmcv.ops").stderr


def test_without_kernelgraft_it_fails_as_mmcv_lite_does(site):
    beside.enable()
    done = run(
        site,
        "import sys; sys.modules['kernelgraft'] = None\n"
        "try:\n    import mmcv.ops\nexcept ModuleNotFoundError as e: print(e.name)",
    )
    assert done.stdout.startswith("kernelgraft"), done.stderr


@pytest.mark.parametrize("text", ["", "nms = None\n", None], ids=["empty", "somebody's", "changed"])
def test_a_foreign_file_is_never_touched(site, text):
    path = site / "mmcv" / "_ext.py"
    if text is None:
        beside.enable()
        text = path.read_text() + "# mine\n"
    path.write_text(text)
    assert beside.status().state == "foreign"
    for change in (beside.enable, beside.disable):
        with pytest.raises(FileExistsError, match=r"_ext\.py was not made by kernelgraft, or was changed since"):
            change()
    assert path.read_text() == text


def test_a_compiled_mmcv_is_left_alone(site):
    (site / "mmcv" / "_ext.so").write_bytes(b"")
    assert beside.status().state == "compiled"
    with pytest.raises(FileExistsError, match="mmcv is compiled"):
        beside.enable()
    assert not beside.disable()
    assert not (site / "mmcv" / "_ext.py").exists()


def test_our_file_goes_also_after_a_compiled_mmcv_came(site):
    beside.enable()
    (site / "mmcv" / "_ext.so").write_bytes(b"")
    assert beside.status().state == "compiled"
    assert beside.disable()
    assert not (site / "mmcv" / "_ext.py").exists()


def test_a_write_that_fails_leaves_nothing(site, monkeypatch):
    monkeypatch.setattr(beside.os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError("read-only")))
    with pytest.raises(PermissionError):
        beside.enable()
    assert [path for path in (site / "mmcv").iterdir() if "_ext" in path.name] == []


def test_without_mmcv_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(beside.importlib.util, "find_spec", lambda name: None)
    for act in (beside.status, beside.enable, beside.disable):
        with pytest.raises(FileNotFoundError, match="pip install mmcv-lite"):
            act()


def test_the_commands(site):
    def invoke(*words):
        done = CliRunner().invoke(app, ["mmcv", *words])
        assert done.exit_code == 0, done.output
        return " ".join(done.output.split())

    assert "its ops are none, unless kernelgraft.mmcv is imported first" in invoke("status")
    assert invoke("enable").endswith("written")
    assert invoke("enable").endswith("was there already")
    status = invoke("status")
    assert "its ops are kernelgraft, by the file beside mmcv" in status
    assert "indice_conv_forward yes" in status
    assert invoke("disable").endswith("removed")
    assert invoke("disable").endswith("is not there: nothing to do")
