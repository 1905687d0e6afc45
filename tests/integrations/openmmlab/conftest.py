"""mmcv-lite on our ops, for every test of this folder."""

import pytest

pytest.importorskip("mmengine")
pytest.importorskip("mmcv")

from kernelgraft_openmmlab import provider

provider.install()
