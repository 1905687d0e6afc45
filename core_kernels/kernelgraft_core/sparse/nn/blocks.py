"""What most sparse networks are made of."""

from __future__ import annotations

import torch
from torch import nn

from kernelgraft_core.sparse.tensor import SparseTensor

from .conv import Conv3d, InverseConv3d, SubMConv3d
from .pointwise import BatchNorm, ReLU


def conv_block(in_channels: int, out_channels: int, kernel_size: int = 3, dilation: int = 1) -> nn.Sequential:
    """Submanifold convolution, norm and activation."""
    return nn.Sequential(
        SubMConv3d(in_channels, out_channels, kernel_size, dilation, bias=False), BatchNorm(out_channels), ReLU(True)
    )


def down_block(in_channels: int, out_channels: int, kernel_size: int = 2, padding: int = 0) -> nn.Sequential:
    """The same with outputs at half the resolution."""
    conv = Conv3d(in_channels, out_channels, kernel_size, 2, padding, bias=False)
    return nn.Sequential(conv, BatchNorm(out_channels), ReLU(True))


def up_block(in_channels: int, out_channels: int, kernel_size: int = 2) -> nn.Sequential:
    """The same back at the sites before the last :func:`down_block`."""
    conv = InverseConv3d(in_channels, out_channels, kernel_size, bias=False)
    return nn.Sequential(conv, BatchNorm(out_channels), ReLU(True))


class ResidualBlock(nn.Module):
    """Two submanifold convolutions beside a shortcut, which is a 1x1x1 convolution where channels change."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, dilation: int = 1) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *conv_block(in_channels, out_channels, kernel_size, dilation),
            SubMConv3d(out_channels, out_channels, kernel_size, dilation, bias=False),
            BatchNorm(out_channels),
        )
        self.shortcut = nn.Sequential()
        if in_channels != out_channels:
            self.shortcut.append(SubMConv3d(in_channels, out_channels, 1, bias=False))
            self.shortcut.append(BatchNorm(out_channels))

    def forward(self, x: SparseTensor) -> SparseTensor:
        y: SparseTensor = self.net(x)
        shortcut: SparseTensor = self.shortcut(x)
        # Nobody else has what the last layer of the net gave; but it may be what autograd keeps.
        total = y.feats + shortcut.feats if torch.is_grad_enabled() else y.feats.add_(shortcut.feats)
        return y.replace(total.relu_())
