"""The direction of imports: kernelgraft_core <- kernelgraft_<host> <- kernelgraft."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOTS = ("core_kernels", "plugins", "integrations")
SOURCES = {init.parent.name: init.parent for root in ROOTS for init in (ROOT / root).glob("*/__init__.py")}
OWN_HOSTS = {
    "kernelgraft_vllm": {"vllm"},
    "kernelgraft_transformers": {"transformers", "accelerate"},
    "kernelgraft_openmmlab": {"mmcv", "mmengine", "mmdet", "mmdet3d", "mmseg"},
    "kernelgraft_pyg": {"torch_geometric"},
}
HOSTS = set().union(*OWN_HOSTS.values())
OURS = {"kernelgraft", "kernelgraft_core", *OWN_HOSTS}
INTEGRATIONS = sorted(package for package in SOURCES if package in OWN_HOSTS)


def imports(tree: ast.AST, *, inside_functions: bool) -> Iterator[tuple[int, str]]:
    """Line and top-level name of every absolute import, those by ``importlib.import_module("...")`` included."""
    for node in ast.iter_child_nodes(tree):
        if not inside_functions and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue  # never runs
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            name = node.args[0] if node.args else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value.partition(".")[0]
        if inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(node, inside_functions=inside_functions)


def offences(package: str, forbidden: set[str], *, inside_functions: bool = True) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sorted(SOURCES[package].rglob("*.py"))
        for line, name in imports(ast.parse(path.read_text()), inside_functions=inside_functions)
        if name in forbidden
    ]


def test_every_package_is_known_to_this_test():
    assert set(SOURCES) <= OURS


def test_the_core_knows_no_host_and_no_plugin():
    assert offences("kernelgraft_core", HOSTS | {"pluggy", "typer"} | OURS - {"kernelgraft_core"}) == []


@pytest.mark.parametrize("package", INTEGRATIONS)
def test_an_integration_knows_the_core_and_its_own_host(package):
    allowed = {package, "kernelgraft_core", *OWN_HOSTS[package]}
    assert offences(package, (HOSTS | OURS | {"pluggy", "typer"}) - allowed) == []


def test_the_face_imports_hosts_and_integrations_inside_functions_only():
    assert offences("kernelgraft", HOSTS | set(OWN_HOSTS) | {"torch"}, inside_functions=False) == []


def test_the_walk_sees_what_it_should():
    source = """
import a.b, c
from d import e
from . import f
if True:
    import g
if TYPE_CHECKING:
    import t
def function():
    import h
    importlib.import_module("i.j")
"""
    tree = ast.parse(source)
    assert [name for _, name in imports(tree, inside_functions=False)] == ["a", "c", "d", "g"]
    assert [name for _, name in imports(tree, inside_functions=True)] == ["a", "c", "d", "g", "t", "h", "i"]
