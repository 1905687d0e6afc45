"""The definitions of image ops that the tests of the core compare with as well."""

import importlib.util
from pathlib import Path

_PATH = Path(__file__).parents[2] / "kernelgraft_core" / "vision" / "definitions.py"
_spec = importlib.util.spec_from_file_location("image_definitions", _PATH)
definitions = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(definitions)
