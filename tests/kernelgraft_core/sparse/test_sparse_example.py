"""The example of the sparse engine runs as it is shown."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_a_scan_is_segmented(tmp_path):
    pytest.importorskip("numba")
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "sparse" / "segment_scan.py", "--steps", "10", "--voxel", "0.4"],
        env=os.environ | {"KERNELGRAFT_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, last = (float(line.split("loss ")[1].split(",")[0]) for line in done.stdout.splitlines() if "loss" in line
                   if line.startswith(("step 1:", "step 10:")))  # fmt: skip
    assert last < 0.6 * first
