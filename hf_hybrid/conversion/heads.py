"""
A layer some of whose key-value heads are linear: which heads are which, and how tensors over all heads are taken apart
and put together.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from ..mixers.heads import query_heads


# What hosts hand to their softmax beside the mask that has an axis of query heads, and that axis.
PER_QUERY_HEAD = {"position_bias": 1, "alibi": 1, "s_aux": 0, "sinks": 0}


@dataclasses.dataclass(frozen=True)
class HeadSplit:
    """
    Args:
        num_heads (`int`): Query heads of the layer.
        num_key_value_heads (`int`): Its key-value heads.
        linear_heads (`tuple[int, ...]`): Those of them that are linear, in order.
    """

    num_heads: int
    num_key_value_heads: int
    linear_heads: tuple[int, ...]

    @property
    def kept_heads(self) -> tuple[int, ...]:
        """The key-value heads that keep the softmax."""
        # by `==`: when it compiles a second time, dynamo takes head numbers for symbols, and evaluates `in` wrongly
        heads = range(self.num_key_value_heads)
        return tuple(head for head in heads if not any(head == linear for linear in self.linear_heads))

    def linear(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """The linear heads of `x`, which has all query heads or all key-value heads along `axis`."""
        return _take(x, self._indices(x, axis, self.linear_heads), axis)

    def kept(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """The other heads."""
        return _take(x, self._indices(x, axis, self.kept_heads), axis)

    def together(self, kept: torch.Tensor, linear: torch.Tensor, axis: int) -> torch.Tensor:
        """All query heads in the layer's order, from those that keep the softmax and those that are linear."""
        order = [*self._queries(self.kept_heads), *self._queries(self.linear_heads)]
        return _take(
            torch.cat([kept, linear.to(kept.dtype)], axis), sorted(range(len(order)), key=order.__getitem__), axis
        )

    def _indices(self, x: torch.Tensor, axis: int, heads: Sequence[int]) -> list[int]:
        return list(heads) if x.shape[axis] == self.num_key_value_heads else self._queries(heads)

    def _queries(self, heads: Sequence[int]) -> list[int]:
        return query_heads(heads, self.num_heads // self.num_key_value_heads)

    def kept_of_arguments(self, mask, kwargs: dict) -> tuple:
        """A mask and keyword arguments of the host's softmax, cut to the heads that keep it."""
        if torch.is_tensor(mask) and mask.ndim == 4 and mask.shape[1] == self.num_heads > 1:
            mask = _take(mask, self._queries(self.kept_heads), 1)
        cut = {
            name: _take(kwargs[name], self._queries(self.kept_heads), axis)
            for name, axis in PER_QUERY_HEAD.items()
            if torch.is_tensor(kwargs.get(name)) and kwargs[name].shape[axis] == self.num_heads > 1
        }
        return mask, {**kwargs, **cut}


def _take(x: torch.Tensor, indices: list[int], axis: int) -> torch.Tensor:
    """
    `x.index_select`, as a view where the indices are a run of neighbours: no copy, and no index tensor to make on a
    device.
    """
    start, count = indices[0], len(indices)
    if indices == list(range(start, start + count)):
        return x.narrow(axis, start, count)
    return torch.cat([x.narrow(axis, first, size) for first, size in _runs(indices)], axis)


def _runs(indices: list[int]) -> list[tuple[int, int]]:
    """Runs of neighbours: `[0, 1, 4]` -> `[(0, 2), (4, 1)]`."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and index == sum(runs[-1]):
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((index, 1))
    return runs


class KeptHeads:
    """
    Stands for an attention module towards its softmax, which reads learned sinks, one per query head, off it: those of
    the heads that keep it.

    Args:
        module (`nn.Module`): The attention module.
        split (`HeadSplit`): Which heads those are.
    """

    def __init__(self, module: nn.Module, split: HeadSplit):
        self._module = module
        self.sinks = split.kept(module.get_parameter("sinks"), axis=0)

    def __getattr__(self, name):
        return getattr(self._module, name)
