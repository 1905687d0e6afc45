"""A look at each tensor before vLLM's loader takes it, which stops at an assertion without words or slices misfits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import Parameter


def checked(loader: Callable[..., Any], name: str, fits: Callable[[Tensor], bool], expected: str) -> Callable[..., Any]:
    """``loader`` for tensors that fit.

    Args:
        loader: of a parameter, as vLLM calls it: with the parameter, the tensor in the file, and which shard that is.
        name: of the tensor, for the message.
        expected: what fits, for the message.

    Returns:
        the same, raising ValueError with what was found and what was expected for a tensor that does not fit.
    """

    @functools.wraps(loader)
    def load(param: Parameter, loaded_weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not fits(loaded_weight):
            raise ValueError(
                f"{name} in the checkpoint is {loaded_weight.dtype} {tuple(loaded_weight.shape)}, expected {expected}"
            )
        return loader(param, loaded_weight, *args, **kwargs)

    return load


def on_each(ranks: int) -> str:
    """Says after a size that it is the share of one rank; nothing when there is one."""
    return f" on each of {ranks} tensor-parallel ranks" if ranks > 1 else ""
