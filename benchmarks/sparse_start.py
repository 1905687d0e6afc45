"""How long a process waits for its first sparse convolution: ``python -m benchmarks.sparse_start``.

The first process compiles the CPU kernels, the others find them in the cache. Timed from the end of imports to the end
of a forward and of a backward pass; each process is a new one with the same, at first empty, cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from kernelgraft_core.runtime.timing import environment

SCRIPT = """
import time, torch
from kernelgraft_core.sparse import SparseTensor, nn
indices = (torch.rand(1, 40, 40, 20, generator=torch.Generator().manual_seed(0)) < 0.2).nonzero()
feats, layer = torch.randn(len(indices), 16), nn.SubMConv3d(16, 32, 3)
start = time.perf_counter()
out = layer(SparseTensor(feats, indices))
forward = time.perf_counter()
out.feats.sum().backward()
print(forward - start, time.perf_counter() - forward)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for i in range(options.processes):
            done = subprocess.run(
                [sys.executable, "-c", SCRIPT],
                env=os.environ | {"KERNELGRAFT_CACHE_DIR": cache, "NUMBA_CACHE_DIR": cache},
                capture_output=True,
                text=True,
                check=True,
            )
            forward, backward = map(float, done.stdout.split())
            rows.append({"cache": "warm" if i else "empty", "forward_s": forward, "backward_s": backward})
            print(f"process {i + 1}, {rows[-1]['cache']} cache: forward {forward:.2f} s, backward {backward:.2f} s")
    if options.out is not None:
        options.out.write_text(
            json.dumps({"schema": 1, "environment": environment(), "results": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
