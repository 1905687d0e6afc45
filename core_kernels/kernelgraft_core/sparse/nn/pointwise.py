"""Layers that see one site at a time, and norms: torch's own, applied to features."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class _OnFeatures(nn.Module):
    """The forward of the next base class on features; a tensor without rows stays as it is."""

    def forward(self, x: Any) -> Any:  # of a base class's own types for type checkers: each is another's
        return x.replace(super().forward(x.feats)) if len(x.feats) else x


class Linear(_OnFeatures, nn.Linear):
    """:class:`torch.nn.Linear` on the features of every site."""

    def forward(self, x: Any) -> Any:
        return x.replace(nn.functional.linear(x.feats, self.weight, self.bias))  # another width, rows or not


class ReLU(_OnFeatures, nn.ReLU):
    """:class:`torch.nn.ReLU`."""


class LeakyReLU(_OnFeatures, nn.LeakyReLU):
    """:class:`torch.nn.LeakyReLU`."""


class SiLU(_OnFeatures, nn.SiLU):
    """:class:`torch.nn.SiLU`."""


class GELU(_OnFeatures, nn.GELU):
    """:class:`torch.nn.GELU`."""


class Dropout(_OnFeatures, nn.Dropout):
    """:class:`torch.nn.Dropout`."""


class LayerNorm(_OnFeatures, nn.LayerNorm):
    """:class:`torch.nn.LayerNorm` over the channels of every site."""


class BatchNorm(_OnFeatures, nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` over all sites of all grids."""

    def forward(self, x: Any) -> Any:
        if len(x.feats) or not self.affine:
            return super().forward(x)
        return x.replace(x.feats * self.weight + self.bias)  # nothing, but a gradient of the parameters for DDP


class SyncBatchNorm(_OnFeatures, nn.SyncBatchNorm):
    """:class:`torch.nn.SyncBatchNorm`, statistics over the sites of all processes."""

    def forward(self, x: Any) -> Any:
        return x.replace(nn.SyncBatchNorm.forward(self, x.feats))  # without rows as well: the others wait for it

    @classmethod
    def convert(cls, module: nn.Module, process_group: object = None) -> nn.Module:
        """A module with these in place of :class:`BatchNorm`: torch's own conversion makes layers for dense tensors."""
        if isinstance(module, BatchNorm):
            made = cls(
                module.num_features,
                module.eps,
                module.momentum,
                module.affine,
                module.track_running_stats,
                process_group,
            )
            if module.affine:
                made.weight, made.bias = module.weight, module.bias
            made.running_mean, made.running_var = module.running_mean, module.running_var
            made.num_batches_tracked, made.training = module.num_batches_tracked, module.training
            return made
        for name, child in module.named_children():
            setattr(module, name, cls.convert(child, process_group))
        return module


class GroupNorm(nn.GroupNorm):
    """:class:`torch.nn.GroupNorm`, statistics over all sites of each grid."""

    def forward(self, x: Any) -> Any:
        grid = x.coords[:, 0].long()
        wide = torch.promote_types(x.feats.dtype, torch.float32)
        values = x.feats.to(wide).unflatten(1, (self.num_groups, -1))
        counts = torch.bincount(grid, minlength=x.batch_size).clamp(min=1).to(wide).view(-1, 1)
        zeros = values.new_zeros((x.batch_size, self.num_groups))
        mean = zeros.index_add(0, grid, values.mean(2)) / counts
        centred = values - mean[grid].unsqueeze(2)
        variance = zeros.index_add(0, grid, centred.square().mean(2)) / counts
        normal = (centred * torch.rsqrt(variance + self.eps)[grid].unsqueeze(2)).flatten(1).to(x.feats.dtype)
        if self.affine:
            normal = normal * self.weight + self.bias
        return x.replace(normal)
