"""Quantizes a directory and prints the most memory that this process ever held, in KiB.

python peak_memory.py SOURCE OUT
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from kernelgraft_transformers import shards
from kernelgraft_transformers.quantize import load_source, quantize_checkpoint
from kernelgraft_transformers.texts import Calibration

torch.set_num_threads(1)
shards.SHARD_BYTES = 4 << 20
source, out = load_source(sys.argv[1]), Path(sys.argv[2])
text = " ".join(f"w{i % 96}" for i in range(200))
quantize_checkpoint(source, out, text, recipe="rtn", calibration=Calibration(2, 16), offload=True)
# Not ru_maxrss: that begins with the peak of the process that started this one.
print(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
