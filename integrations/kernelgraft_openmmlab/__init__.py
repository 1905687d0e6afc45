"""OpenMMLab (mmengine, mmcv, mmdet, mmdet3d, mmseg) on our kernels.

Importing this imports no host: each is adapted when it is imported itself.
"""

from __future__ import annotations

from kernelgraft_core.runtime.patching import Patches


def provide_mmcv_ops(patches: Patches) -> None:
    """Make ``mmcv._ext`` importable, and repair what keeps OpenMMLab from running on current libraries and CPUs."""
    from .fixes import repair_hosts
    from .provider import graft

    graft(patches)
    repair_hosts(patches)
