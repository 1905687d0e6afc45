"""vLLM 0.32 and 0.33: quantization methods of kernelgraft, registered through vLLM's own extension points.

Importing this package does not import vLLM; calling one of its functions does.
"""

from __future__ import annotations

from kernelgraft_core.runtime.patching import Patches

AWQ_METHOD = "kernelgraft_awq"
"""What a user writes after ``--quantization``."""
QOQ_METHOD = "qoq"
"""What ``quant_method`` is in the ``config.json`` of a QoQ checkpoint."""


def register_awq(patches: Patches) -> None:
    """Offer AutoAWQ checkpoints to vLLM as the quantization method :data:`AWQ_METHOD`.

    vLLM takes the method only when the user names it; ``awq`` keeps its own meaning. Calling this again changes
    nothing, as vLLM's plugins demand. Undoing takes the name away from engines built later in this process; engines
    that already run keep their layers, and vLLM holds the class until the process ends.

    Args:
        patches: receives the undo.

    Raises:
        ImportError: vLLM is not installed or cannot be imported.
    """
    from .awq import KernelgraftAWQConfig

    _register(patches, AWQ_METHOD, KernelgraftAWQConfig)


def register_qoq(patches: Patches) -> None:
    """Let vLLM serve QoQ checkpoints, method :data:`QOQ_METHOD`, and on a CPU keep keys and values in 4 bits.

    The method is chosen by a checkpoint's ``config.json`` alone; the cache by ``--kv-cache-dtype int4_per_token_head``,
    for any model. Calling this again changes nothing; undoing is as for :func:`register_awq`.

    Args:
        patches: receives the changes.

    Raises:
        ImportError: vLLM is not installed or cannot be imported.
    """
    from .qoq import KernelgraftQoQConfig

    if _register(patches, QOQ_METHOD, KernelgraftQoQConfig):
        from .kv4_selection import select_kv4

        select_kv4(patches)


def _register(patches: Patches, method: str, config: type) -> bool:
    """Add a quantization method; False when it is there already."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
    from vllm.platforms import current_platform

    if method in QUANTIZATION_METHODS:
        return False
    register_quantization_config(method)(config)

    def unregister() -> None:
        # vLLM has no call for this. These two lists are all it looks into before it accepts a name.
        for names in (QUANTIZATION_METHODS, current_platform.supported_quantization):
            if method in names:
                names.remove(method)

    patches.on_undo(f"vLLM quantization method {method}", unregister)
    return True
