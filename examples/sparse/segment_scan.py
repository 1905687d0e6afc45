"""Train a small MinkUNet to tell ground from the rest in a LiDAR scan, on a CPU or a GPU.

python examples/sparse/segment_scan.py                        # a made-up scan
python examples/sparse/segment_scan.py 000008.bin --voxel 0.1  # a KITTI scan: float32 rows x, y, z, intensity
"""

import argparse
import time

import numpy as np
import torch

from kernelgraft_core.sparse import SparseTensor, tune, voxelize
from kernelgraft_core.sparse.models import MinkUNet


def made_up_scan(points: int = 20_000) -> torch.Tensor:
    """Ground with some boxes on it, rows x, y, z, intensity."""
    generator = torch.Generator().manual_seed(0)
    xy = torch.rand(points, 2, generator=generator) * 40
    box = ((xy / 5).floor().sum(1) % 7 == 0) & (torch.rand(points, generator=generator) < 0.6)
    height = torch.where(box, torch.rand(points, generator=generator) * 2, 0.05 * (xy[:, 0] / 4).sin())
    return torch.cat((xy, height.unsqueeze(1), torch.rand(points, 1, generator=generator)), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scan", nargs="?", help="KITTI .bin file; a made-up scan without it")
    parser.add_argument("--voxel", type=float, default=0.2, help="metres")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tune", action="store_true", help="measure dataflows first")
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scan = torch.from_numpy(np.fromfile(options.scan, np.float32).reshape(-1, 4)) if options.scan else made_up_scan()
    scan = scan.to(device)
    x, row_of_point = voxelize(scan[:, :3].contiguous(), scan, options.voxel)
    labels = (x.feats[:, 2] > x.feats[:, 2].quantile(0.5) + 0.2).long()  # higher than most: not ground
    x = SparseTensor(x.feats - x.feats.mean(0), x.coordinates)
    print(f"{len(scan)} points, {len(labels)} voxels, {labels.float().mean():.0%} of them not ground")

    torch.manual_seed(0)
    model = MinkUNet(4, 2, 0.25).to(device)
    if options.tune:
        result = tune(model, [x], "training")
        result.apply(model)
        print(result.summary())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    start = time.perf_counter()
    for step in range(1, options.steps + 1):
        logits = model(x)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1 or step % 5 == 0:
            right = (logits.argmax(1) == labels).float().mean()
            print(f"step {step}: loss {loss.item():.3f}, {right:.1%} right")
    print(f"{(time.perf_counter() - start) / options.steps * 1e3:.0f} ms per step on {device.type}")

    not_ground = logits.argmax(1)[row_of_point].float().mean()
    print(f"{not_ground:.0%} of the points are not ground")


if __name__ == "__main__":
    main()
