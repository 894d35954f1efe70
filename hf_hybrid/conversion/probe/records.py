"""What one dry forward of a model notes of every attention module."""

import dataclasses

import torch


@dataclasses.dataclass
class Call:
    """One call of the attention function, as the module made it."""

    query: torch.Size
    key: torch.Tensor  # kept alive: two modules that attend to one key share it
    value: torch.Size
    layer_idx: int | None  # the cache slot, where the module is told it
    causal: bool
    lost: tuple[str, ...]


@dataclasses.dataclass
class Record:
    """Forwards of one attention module."""

    calls: list[list[Call]]  # of each forward
    hidden_states: torch.Size | None = None  # the first tensor it is given
    layer_idx: int | None = None  # of the latest forward, if that is an argument
    other_sequence: bool = False
