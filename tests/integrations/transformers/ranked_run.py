"""One rank of a quantization over several processes; started with the variables that torchrun sets.

    python ranked_run.py SOURCE OUT RESULT SETTINGS

Writes what this rank decided to ``RESULT.<rank>``. SETTINGS are JSON: arguments of ``quantize_checkpoint`` and
``die_after``, the block after which the last rank kills itself.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import distributed

from kernelgraft_transformers.quantize import load_source, quantize_checkpoint
from kernelgraft_transformers.texts import Calibration

TEXT = " ".join(f"w{(i * i + 7 * i) % 96}" for i in range(400))


def main() -> None:
    torch.set_num_threads(1)
    source, out, result, settings = sys.argv[1], Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
    if "WORLD_SIZE" in os.environ:
        distributed.init_process_group("gloo")
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    die_after, blocks = settings.pop("die_after", None), []

    def seen(block):
        weights = {
            name: [None if t is None else t.tolist() for t in weight.tensors]
            for name, weight in block.outcome.weights.items()
        }
        blocks.append({"index": block.index, "weights": weights, "outcome": [asdict(r) for r in block.outcome.reports]})
        blocks[-1]["searches"] = [asdict(search) for search in block.outcome.searches]
        if block.index == die_after and rank == distributed.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    quantize_checkpoint(
        load_source(source), out, TEXT, calibration=Calibration(samples=4, length=16), on_block=seen, **settings
    )
    Path(f"{result}.{rank}").write_text(json.dumps(blocks))


if __name__ == "__main__":
    main()
