"""mmcv-lite on our ops, for every test of this folder: tests import them, so that no fixture can provide them.

Repairs of the hosts belong to the plugin; a module that wants them asks for ``mmcv_plugin``.
"""

import pytest

pytest.importorskip("mmengine")
pytest.importorskip("mmcv")

import kernelgraft
from kernelgraft_openmmlab import provider

provider.install()


@pytest.fixture(scope="module")
def mmcv_plugin():
    """The plugin for the tests of one module."""
    with kernelgraft.load_plugin("mmcv") as plugin:
        yield plugin
