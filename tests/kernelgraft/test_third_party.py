"""A plugin of somebody else's, installed by pip and used in a process of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "third_party_plugin"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The example, installed into a folder, beside a distribution whose plugin cannot be imported."""
    folder = tmp_path_factory.mktemp("third_party")
    source, target = folder / "source", folder / "site"
    shutil.copytree(EXAMPLE, source)  # building writes into the source tree
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    flags = ["--no-deps", "--no-build-isolation", "--target", target, source]
    subprocess.run([*pip, *flags], check=True, capture_output=True)
    info = target / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kernelgraft]\nbroken = broken_plugin\n")
    (target / "broken_plugin.py").write_text("import a_module_that_was_removed\n")
    return target


def run(installed, script, **environment):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("KERNELGRAFT_")}
    inherited["PYTHONPATH"] = os.pathsep.join([str(installed), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script], env=inherited | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_it_is_found_and_a_broken_one_beside_it_breaks_nothing(installed):
    script = """
import kernelgraft
rows = {row.name: row for row in kernelgraft.plugins()}
print(rows["example"].distribution, rows["example"].error)
print(rows["awq"].distribution, rows["awq"].error)
print(rows["broken"].error)
try:
    kernelgraft.load_plugin("broken")
except kernelgraft.PluginError as error:
    print(type(error.__cause__).__name__)
"""
    example, awq, broken, cause = run(installed, script)
    assert example == "kernelgraft-example-plugin None"
    assert awq == "kernelgraft None"
    assert broken.startswith("plugin 'broken' from broken cannot be imported: ModuleNotFoundError")
    assert cause == "ModuleNotFoundError"


def test_its_kernel_runs_while_it_is_loaded_and_not_after(installed):
    script = """
import logging
import sys
import kernelgraft
import torch
from kernelgraft.manager import manager
from kernelgraft_core.quant.w4a16 import w4a16_linear
from kernelgraft_core.quant.w4a16.examples import example_args
from kernelgraft_core.runtime.op import registered_ops

logging.basicConfig(stream=sys.stdout, format="%(name)s: %(message)s")
logging.getLogger("kernelgraft_example_plugin").setLevel(logging.INFO)
op, args = registered_ops()["w4a16_linear"], example_args("cpu")["w4a16_linear"]
before = op.backends("cpu")
plugin = kernelgraft.load_plugin("example")
out = w4a16_linear(*args)
print(op.backends("cpu") == ("example", *before))
plugin.unload()
print(op.backends("cpu") == before)
torch.testing.assert_close(w4a16_linear(*args), out)
print(*[check.ok for check in manager().examine("example")])
"""
    assert run(installed, script) == [
        "kernelgraft_example_plugin: x (3, 256), weight 96 x 256",
        "True",
        "True",
        "kernelgraft_example_plugin: x (3, 256), weight 96 x 256",
        "True",
    ]


def test_the_allow_list_hides_it(installed):
    script = """
import kernelgraft
print(*[row.name for row in kernelgraft.plugins()])
try:
    kernelgraft.load_plugin("example")
except kernelgraft.PluginNotFound as error:
    print(error)
"""
    assert run(installed, script, KERNELGRAFT_PLUGINS="awq") == [
        "awq",
        "plugin 'example' is hidden by KERNELGRAFT_PLUGINS='awq'; known: awq",
    ]
