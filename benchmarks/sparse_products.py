"""How many products the dataflows of a GPU make over those that count: ``python -m benchmarks.sparse_products``.

Known from the kernel map alone, without a GPU; a 3x3x3 submanifold layer on real scans.
"""

from __future__ import annotations

import argparse

from kernelgraft_core.sparse import ConvGeometry, Coordinates, KernelMap
from kernelgraft_core.sparse.conv.dataflow import MOST_SPLITS, Dataflow
from kernelgraft_core.sparse.conv.macs import overhead

from .clouds import CLOUDS, load_cloud

DATAFLOWS = (*(Dataflow("implicit_gemm", splits) for splits in range(MOST_SPLITS + 1)), Dataflow("fetch_on_demand"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128, help="outputs of a tile")
    options = parser.parse_args()
    print("scan", "sites", *DATAFLOWS, sep="\t")
    for name in CLOUDS:
        indices, grid, _ = load_cloud(name)
        known = KernelMap.of(ConvGeometry.of(3, 3, submanifold=True), Coordinates(indices, grid, 1))
        wasted = (f"{overhead(known.neighbors, dataflow, options.rows):.2f}" for dataflow in DATAFLOWS)
        print(name, len(indices), *wasted, sep="\t")


if __name__ == "__main__":
    main()
