"""The plugin ``mmcv`` and the doors to it, as far as they go without OpenMMLab; its host is tested elsewhere."""

import importlib.util
import subprocess
import sys

import pytest

import kernelgraft
from kernelgraft.errors import IncompatibleHost
from kernelgraft.run import main

needs_mmcv = pytest.mark.skipif(importlib.util.find_spec("mmcv") is None, reason="mmcv is not installed")


def run(*arguments, **options):
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(
        "import sys, kernelgraft, beside_program\n"
        "print(sys.argv[1:], __name__, [p.name for p in kernelgraft.plugins() if p.loaded])\n"
    )
    (tmp_path / "beside_program.py").write_text("")
    return path


@needs_mmcv
def test_a_program_runs_as_python_would_with_the_plugin_loaded(program):
    done = run("-m", "kernelgraft.run", program, "config.py", "--work-dir", "x")
    assert done.stdout == "['config.py', '--work-dir', 'x'] __main__ ['mmcv']\n", done.stderr
    module = run("-m", "kernelgraft.run", "-m", "program", "-m", cwd=program.parent)
    assert module.stdout == "['-m'] __main__ ['mmcv']\n", module.stderr


def test_dashes_are_the_programs(program):
    for words in (["--", "b"], ["a", "--", "b"], ["--"]):
        done = run("-m", "kernelgraft.run", "-p", "sparse-conv", program, *words)
        assert done.stdout == f"{words} __main__ ['sparse-conv']\n", done.stderr


def test_other_plugins_and_their_options(program):
    done = run("-m", "kernelgraft.run", "-p", "sparse-conv:facade=torchsparse", program)
    assert done.stdout == "[] __main__ ['sparse-conv']\n", done.stderr


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ("nothing", "kernelgraft: plugin 'nothing' is not installed"),
        ("sparse-conv:facade", "option 'facade' of plugin 'sparse-conv' has no value: write facade=VALUE"),
        ("sparse-conv:colour=red", "plugin 'sparse-conv' has no option 'colour'"),
    ],
)
def test_a_plugin_that_cannot_be_loaded_ends_it(program, plugin, message, capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["-p", plugin, str(program)])
    assert message in capsys.readouterr().err


def test_a_script_that_is_not_there_is_wrong_usage(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["no/such/script.py"])
    assert "there is no script no/such/script.py" in capsys.readouterr().err


def test_a_program_that_fails_fails_as_it_would(tmp_path):
    path = tmp_path / "fails.py"
    path.write_text("raise SystemExit(7)\n")
    assert run("-m", "kernelgraft.run", "-p", "sparse-conv", path).returncode == 7


@pytest.mark.parametrize("version", ["1.7.2", "2.2.0"])
def test_other_versions_of_mmcv_are_refused_and_not_touched(monkeypatch, version):
    from kernelgraft import hosts

    monkeypatch.setattr(hosts, "installed_version", lambda name: version if name == "mmcv" else None)
    before = list(sys.meta_path)
    with pytest.raises(IncompatibleHost, match=rf"plugin 'mmcv' needs mmcv or mmcv-lite >=2\.0,<2\.2: mmcv {version}"):
        kernelgraft.load_plugin("mmcv")
    assert sys.meta_path == before


def test_an_option_that_means_nothing_is_refused():
    if importlib.util.find_spec("mmcv") is None:
        pytest.skip("mmcv is not installed")
    with pytest.raises(ValueError, match="plugin 'mmcv' has no option 'speed'; it takes host"):
        kernelgraft.load_plugin("mmcv", speed=11)


@needs_mmcv
def test_types_of_the_scope_work_in_any_config_without_imports():
    done = run(
        "-c",
        """
from mmengine.registry import MODELS
config = dict(type="kernelgraft.FlatFormer", in_channels=16, grid_shape=(20, 20, 1), num_heads=2, group_size=8)
model = MODELS.build(config)
layer = MODELS.build(dict(type="kernelgraft.SubMConv3d", in_channels=2, out_channels=3, kernel_size=3))
print(type(model).__module__, type(layer).__module__, sorted(MODELS.children["kernelgraft"].module_dict)[0])
""",
    )
    assert done.stdout == "kernelgraft_openmmlab.flatformer kernelgraft_openmmlab.sparse_layers FlatFormer\n", (
        done.stderr
    )


@needs_mmcv
def test_custom_imports_put_our_layers_under_mmcvs_names_and_unloading_takes_them_off(tmp_path):
    config = tmp_path / "config.py"
    config.write_text("custom_imports = dict(imports=['kernelgraft.openmmlab'], allow_failed_imports=False)\n")
    done = run(
        "-c",
        """
import sys, kernelgraft
from mmengine.config import Config
from mmengine.registry import MODELS
Config.fromfile(sys.argv[1])
ours = MODELS.get("SubMConv3d")
assert ours.__module__ == "kernelgraft_openmmlab.sparse_layers", ours
assert MODELS.get("SparseInverseConv3d").__module__ == ours.__module__
kernelgraft.unload_plugin("sparse-conv")
assert MODELS.get("SubMConv3d").__module__ == "mmcv.ops.sparse_conv"
kernelgraft.unload_plugin("mmcv")
print("done")
""",
        config,
    )
    assert done.stdout == "done\n", done.stderr


@needs_mmcv
def test_flatformer_in_plain_torch_and_under_the_originals_name():
    done = run(
        "-c",
        """
import kernelgraft
plain = kernelgraft.load_plugin("flatformer")
assert plain.FlatFormer(16, 2, 1, (9, 9, 1)).block_list[0].block[0].fc1.out_features == 32
hosted = kernelgraft.load_plugin("flatformer", host="mmdet3d")
from mmengine.registry import MODELS
assert MODELS.build(dict(type="FlatFormer", in_channels=16, num_heads=2)).output == "bev"
try:
    MODELS.build(dict(type="FlatFormer", in_channels=16, num_heads=2, grid_shape=(20, 20, 4)))
except ValueError as error:
    assert "a picture has one place for all z; set output='rows'" in str(error)
else:
    raise AssertionError("pillars above each other cannot all be in a picture")
kernelgraft.unload_plugin("flatformer")
assert "FlatFormer" not in MODELS.module_dict
print("done")
""",
    )
    assert done.stdout == "done\n", done.stderr


@needs_mmcv
def test_untested_versions_of_what_runs_on_mmcv_are_told(monkeypatch, caplog, fresh_manager):
    from kernelgraft import hosts

    real = hosts.installed_version
    monkeypatch.setattr(hosts, "installed_version", lambda name: "1.9.0" if name == "mmdet3d" else real(name))
    with caplog.at_level("WARNING", "kernelgraft"), kernelgraft.load_plugin("mmcv"):
        pass
    assert (
        "mmdet3d 1.9.0 is outside the tested range, >=1.4,<1.5: repairs that do not fit it are left out" in caplog.text
    )


@needs_mmcv
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_processes_that_the_program_starts_have_the_plugin_too(tmp_path, method):
    path = tmp_path / "program.py"
    path.write_text(
        f"""
import multiprocessing, sys
import mmcv.ops  # fails without the plugin, in this process and in the others, which import this file again
def provided(_):
    return "kernelgraft" in sys.modules["mmcv._ext"].nms.__module__
if __name__ == "__main__":
    with multiprocessing.get_context({method!r}).Pool(1) as pool:
        print(pool.map(provided, [0]))
"""
    )
    done = run("-m", "kernelgraft.run", path)
    assert done.stdout == "[True]\n", done.stderr


@needs_mmcv
def test_a_door_opens_again_after_its_plugin_was_taken_off():
    done = run(
        "-c",
        """
import importlib, kernelgraft
from mmengine.registry import MODELS
for _ in range(2):
    importlib.import_module("kernelgraft.openmmlab")
    assert MODELS.get("SubMConv3d").__module__ == "kernelgraft_openmmlab.sparse_layers"
    kernelgraft.unload_plugin("sparse-conv")
    assert MODELS.get("SubMConv3d").__module__ == "mmcv.ops.sparse_conv"
for _ in range(2):
    importlib.import_module("kernelgraft.mmcv")
    assert [p.loaded for p in kernelgraft.plugins() if p.name == "mmcv"] == [("mmcv",)]
    kernelgraft.unload_plugin("mmcv")
print("done")
""",
    )
    assert done.stdout == "done\n", done.stderr
