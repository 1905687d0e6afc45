"""MinkUNet (arXiv 1904.08755) for semantic segmentation of voxels, in the widths of TorchSparse++'s benchmarks."""

from __future__ import annotations

from torch import Tensor, nn

from kernelgraft_core.sparse.nn import ResidualBlock, conv_block, down_block, up_block
from kernelgraft_core.sparse.tensor import SparseTensor

WIDTHS = (32, 32, 64, 128, 256, 256, 128, 96, 96)


class MinkUNet(nn.Module):
    """Four halvings and back, two residual blocks at each resolution.

    Args:
        in_channels: of a voxel.
        classes: logits of a voxel.
        width: of all layers, 1.0 or 0.5 in the paper's benchmarks.

    The forward takes a :class:`SparseTensor` and gives logits ``(N, classes)`` in its order of rows. The grid may have
    any size: it is filled up to a multiple of 16.
    """

    def __init__(self, in_channels: int, classes: int, width: float = 1.0) -> None:
        super().__init__()
        stem, *channels = (int(width * each) for each in WIDTHS)
        self.stem = nn.Sequential(conv_block(in_channels, stem), conv_block(stem, stem))
        skips, here = [stem, *channels[:3]], stem
        self.down, self.up, self.merge = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for out in channels[:4]:
            self.down.append(nn.Sequential(down_block(here, here), ResidualBlock(here, out), ResidualBlock(out, out)))
            here = out
        for out, skip in zip(channels[4:], reversed(skips), strict=True):
            self.up.append(up_block(here, out))
            self.merge.append(nn.Sequential(ResidualBlock(out + skip, out), ResidualBlock(out, out)))
            here = out
        self.head = nn.Linear(here, classes)

    def forward(self, x: SparseTensor) -> Tensor:
        x = self.stem(x.rounded(2 ** len(self.down)))
        skips = []
        for down in self.down:
            skips.append(x)
            x = down(x)
        for up, merge in zip(self.up, self.merge, strict=True):
            assert isinstance(merge, nn.Sequential)
            x = up(x).cat(skips.pop())
            for block in merge:  # one by one: a sequence would hold what it was given until its end
                x = block(x)
        logits: Tensor = self.head(x.feats)
        return logits
