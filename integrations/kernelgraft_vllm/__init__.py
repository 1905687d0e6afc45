"""vLLM 0.32 and 0.33: quantization methods of kernelgraft, registered through vLLM's own extension points.

Importing this package does not import vLLM; calling one of its functions does.
"""

from __future__ import annotations

from kernelgraft_core.runtime.patching import Patches

AWQ_METHOD = "kernelgraft_awq"
"""What a user writes after ``--quantization``."""


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
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
    from vllm.platforms import current_platform

    from .awq import KernelgraftAWQConfig

    if AWQ_METHOD in QUANTIZATION_METHODS:
        return
    register_quantization_config(AWQ_METHOD)(KernelgraftAWQConfig)

    def unregister() -> None:
        # vLLM has no call for this. These two lists are all it looks into before it accepts a name.
        for names in (QUANTIZATION_METHODS, current_platform.supported_quantization):
            if AWQ_METHOD in names:
                names.remove(AWQ_METHOD)

    patches.on_undo(f"vLLM quantization method {AWQ_METHOD}", unregister)
