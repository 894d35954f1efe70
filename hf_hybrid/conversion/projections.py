"""Trained differences to the projections around a mixer: they act where the layer is linear, and only there."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class LowRankDelta(nn.Module):
    """
    $W + B A$, `A` `[rank, columns]` random and `B` `[rows, rank]` zero, so that it starts at `W`.

    Args:
        weight (`torch.Tensor`): `W`, `[rows, columns]`; its sizes and device are taken.
        rank (`int`): Rank of the difference.
    """

    def __init__(self, weight: torch.Tensor, rank: int):
        super().__init__()
        rows, columns = weight.shape
        # fp32: bf16 would swallow small updates
        self.A = nn.Parameter(torch.empty(rank, columns, device=weight.device, dtype=torch.float32))
        self.B = nn.Parameter(torch.empty(rows, rank, device=weight.device, dtype=torch.float32))

    def init_weights(self) -> None:
        with torch.no_grad():
            self.A.normal_(std=self.A.shape[1] ** -0.5)
            self.B.zero_()

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (self.B @ self.A).to(weight.dtype)


class FullDelta(nn.Module):
    """
    $W + D$ with a `D` of the same shape that starts at zero: a copy of `W` that trains, in fp32 whatever the model's
    type.

    Args:
        weight (`torch.Tensor`): `W`.
    """

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.D = nn.Parameter(torch.empty(weight.shape, device=weight.device, dtype=torch.float32))

    def init_weights(self) -> None:
        with torch.no_grad():
            self.D.zero_()

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return (weight.float() + self.D).to(weight.dtype)


def new_deltas(attention: nn.Module, projections: str, rank: int) -> nn.ModuleDict | None:
    """
    Differences to the parameters of an attention module, by their names with `__` for dots: of `"low_rank"` to the
    weights of its projections, of `"full"` to everything; `None` for `"shared"`.
    """
    if projections == "shared":
        return None
    built: dict[str, LowRankDelta | FullDelta] = {}
    if projections == "low_rank":
        parts = {name: part for name, part in attention.named_modules() if isinstance(part, (nn.Linear, Conv1D))}
        built.update({f"{name}.weight": LowRankDelta(part.weight, rank) for name, part in parts.items()})
    else:
        built.update({name: FullDelta(weight) for name, weight in attention.named_parameters()})
    for delta in built.values():
        if not any(parameter.is_meta for parameter in delta.parameters()):
            delta.init_weights()
    return nn.ModuleDict({name.replace(".", "__"): delta for name, delta in built.items()})


def parameter_name(key: str) -> str:
    """The parameter that the difference at `key` belongs to."""
    return key.replace("__", ".")


@contextlib.contextmanager
def with_deltas(attention: nn.Module, deltas: nn.ModuleDict | None) -> Iterator[None]:
    """For the duration of the block, the module computes with its parameters and the differences to them."""
    before = []
    try:
        for key, delta in (deltas or {}).items():
            owner, _, name = parameter_name(key).rpartition(".")
            part = attention.get_submodule(owner)
            weight = part._parameters[name]
            before.append((part, name, weight))
            part._parameters[name] = delta(weight)  # a tensor that is no leaf: gradients reach the difference
        yield
    finally:
        for part, name, weight in before:
            part._parameters[name] = weight


def merge_deltas_(attention: nn.Module, deltas: nn.ModuleDict | None) -> None:
    """Add the differences to the parameters, in place."""
    with torch.no_grad():
        for key, delta in (deltas or {}).items():
            weight = attention.get_parameter(parameter_name(key))
            weight.copy_(delta(weight))


__all__ = ["FullDelta", "LowRankDelta", "merge_deltas_", "new_deltas", "parameter_name", "with_deltas"]
