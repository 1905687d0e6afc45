"""The encoders of SECOND (Sensors 2018) and CenterPoint (arXiv 2006.11275): voxels to a picture seen from above."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kernelgraft_core.sparse.nn import BatchNorm, Conv3d, ReLU, ResidualBlock, conv_block
from kernelgraft_core.sparse.tensor import SparseTensor

Stage = Sequence[int]


class SparseEncoder(nn.Module):
    """Stages of submanifold layers, each but the first after a strided one, then the height is folded into channels.

    Args:
        in_channels: of a voxel.
        stages: output channels of the layers of each stage.
        out_channels: after the last layer, which halves the height.
        residual: pairs of layers as residual blocks.
        paddings: of the strided layers, per axis ``(x, y, z)`` or one for all.

    The forward takes a :class:`SparseTensor` whose axes are ``(x, y, z)`` and gives ``(B, out_channels * Z, X, Y)``.
    """

    def __init__(
        self,
        in_channels: int,
        stages: Sequence[Stage],
        out_channels: int,
        residual: bool,
        paddings: Sequence[int | Sequence[int]],
    ) -> None:
        super().__init__()
        here = stages[0][0]
        self.stem = conv_block(in_channels, here)
        self.stages = nn.ModuleList()
        for i, channels in enumerate(stages):
            layers = nn.Sequential()
            if i:
                layers.append(_strided(here, channels[0], 3, 2, paddings[i - 1]))
                here = channels[0]
            for out in channels[1 if i else 0 :]:
                layers.append(ResidualBlock(here, out) if residual else conv_block(here, out))
                here = out
            self.stages.append(layers)
        self.out = _strided(here, out_channels, (1, 1, 3), (1, 1, 2), 0)

    def forward(self, x: SparseTensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        last: SparseTensor = self.out(x)
        return last.to_bev()


def second_encoder(in_channels: int = 4) -> SparseEncoder:
    """That of SECOND as mmdetection3d configures it for KITTI."""
    stages = (16,), (32, 32, 32), (64, 64, 64), (64, 64, 64)
    return SparseEncoder(in_channels, stages, 128, False, (1, 1, (1, 1, 0)))


def centerpoint_encoder(in_channels: int = 5) -> SparseEncoder:
    """That of CenterPoint's voxel models."""
    stages = (16, 16), (32, 32, 32), (64, 64, 64), (128, 128, 128)
    return SparseEncoder(in_channels, stages, 128, True, (1, 1, (1, 1, 0)))


def _strided(
    in_channels: int,
    out_channels: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
) -> nn.Sequential:
    conv = Conv3d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
    return nn.Sequential(conv, BatchNorm(out_channels), ReLU(True))
