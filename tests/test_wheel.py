"""The wheel holds every module of the three source roots, the data they read, the entry points, and nothing else."""

import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = ("core_kernels", "plugins", "integrations")
DATA = {".json", ".j2", ".typed"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools puts whatever an older ``build/`` still holds into the next wheel."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for root in SOURCE_ROOTS:
        shutil.copytree(ROOT / root, tree / root, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", out, tree], check=True, capture_output=True
    )
    (built,) = out.glob("kernelgraft-*.whl")
    with zipfile.ZipFile(built) as archive:
        yield archive


def sources():
    for root in SOURCE_ROOTS:
        for path in (ROOT / root).rglob("*"):
            if path.suffix in {".py", *DATA} and path.is_file():
                yield path.relative_to(ROOT / root).as_posix()


def test_it_holds_every_module_and_data_file_and_nothing_else(wheel):
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert shipped == set(sources())
    assert {"kernelgraft/py.typed", "kernelgraft_core/py.typed"} <= shipped


def test_every_package_has_an_init(wheel):
    folders = {Path(name).parent for name in wheel.namelist() if name.endswith(".py")}
    assert [str(folder) for folder in folders if f"{folder.as_posix()}/__init__.py" not in wheel.namelist()] == []


def test_its_entry_points_name_modules_that_it_holds(wheel):
    (path,) = [name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt")]
    points = configparser.ConfigParser()
    points.read_string(wheel.read(path).decode())
    assert points["console_scripts"]["kernelgraft"] == "kernelgraft.cli:main"
    assert points["vllm.general_plugins"]["kernelgraft"] == "kernelgraft.vllm:register"
    assert points["kernelgraft"]["awq"] == "kernelgraft.builtin.awq"
    held = set(wheel.namelist())
    for section in points.sections():
        for value in points[section].values():
            module = value.partition(":")[0].replace(".", "/")
            assert {f"{module}.py", f"{module}/__init__.py"} & held, value


def test_it_pulls_in_no_host(wheel):
    (path,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    required = [line for line in wheel.read(path).decode().splitlines() if line.startswith("Requires-Dist:")]
    hard = {line.split()[1].split(">")[0].split("=")[0] for line in required if "extra ==" not in line}
    assert hard == {"numpy", "pluggy", "packaging", "safetensors", "typer", "rich"}
