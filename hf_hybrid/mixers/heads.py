"""A mixer over some of a layer's key-value heads: which part of each parameter belongs to which head.

Heads of a mixer share nothing but low-rank projections, so that a mixer over heads 0 and 2 is the whole mixer with the
other heads' rows left out. A mixer says how its parameters are laid out in one line each (`LinearMixer.head_layouts`);
everything else follows from it here.
"""

import math
from collections.abc import Mapping, Sequence

import torch


# Letters of a layout: query heads, key-value heads, states (one per key-value head or per query head).
HEAD_AXES = ("H", "G", "S")


def query_heads(heads: Sequence[int], groups: int) -> list[int]:
    """The query heads that read key-value heads `heads`, `groups` each."""
    return [head * groups + i for head in heads for i in range(groups)]


def select_heads(
    parameter: torch.Tensor, layout: str, indices: Mapping[str, torch.Tensor], sizes: Mapping[str, int]
) -> torch.Tensor:
    """
    The rows of `parameter` that belong to some heads. Differentiable.

    Args:
        parameter (`torch.Tensor`): Of a mixer over all heads.
        layout (`str`): Its axes: `"H"`, `"w G V"`, `"(S K) r"` for an axis that holds two; names other than `H`, `G`
            and `S` stand for anything.
        indices (`dict[str, torch.Tensor]`): For `H`, `G` and `S`, the rows wanted.
        sizes (`dict[str, int]`): Sizes of named axes inside brackets; one per bracket may be missing.
    """
    for axis, names in enumerate(_axes(layout)):
        if not any(name in HEAD_AXES for name in names):
            continue
        shape = _shape(names, parameter.shape[axis], sizes)
        parts = parameter.unflatten(axis, shape)
        for offset, name in enumerate(names):
            if name in HEAD_AXES:
                parts = parts.index_select(axis + offset, indices[name].to(parts.device))
        parameter = parts.flatten(axis, axis + len(names) - 1)
    return parameter


def _axes(layout: str) -> list[list[str]]:
    """`"(S K) r"` -> `[["S", "K"], ["r"]]`."""
    axes: list[list[str]] = []
    inside: list[str] | None = None
    for token in layout.replace("(", " ( ").replace(")", " ) ").split():
        if token == "(":
            inside = []
        elif token == ")":
            axes.append(inside or [])
            inside = None
        elif inside is not None:
            inside.append(token)
        else:
            axes.append([token])
    return axes


def _shape(names: list[str], size: int, sizes: Mapping[str, int]) -> list[int]:
    known = [sizes.get(name) for name in names]
    if len(names) == 1:
        return [size]
    rest = size // math.prod(n for n in known if n is not None)
    return [rest if n is None else n for n in known]
