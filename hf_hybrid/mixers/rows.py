"""Rows that are not one whole sequence: several packed into one, and sequences with padding behind them that go on."""

from typing import Any

import torch
from torch.nn import functional as F

from ..errors import HybridConfigError


def mix_packed(mixer: Any, query, key, value, hidden_states, valid, segments, state, output_final_state):
    """Give every packed sequence a row of its own, mix, and put the tokens back. Exact for every mixer."""
    if state is not None:
        raise HybridConfigError(f"{mixer.config_class.name}: packed sequences cannot continue a cached state.")
    if valid is None:
        valid = torch.ones(query.shape[:2], dtype=torch.bool, device=query.device)
    batch, length = segments.shape
    starts = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    sequence = starts.view(-1).cumsum(0) - 1  # of each token, over all rows
    lengths = torch.bincount(sequence)
    column = torch.arange(batch * length, device=query.device) - (lengths.cumsum(0) - lengths)[sequence]
    flat = [None if x is None else x.flatten(0, 1) for x in (query, key, value, hidden_states, valid)]
    output = query.new_empty(batch * length, query.shape[2], mixer.value_dim)
    finals = {}
    last = sequence.view(batch, length)[:, -1].tolist()  # a row goes on from its last sequence
    # sequences of about one length at a time: in rows of the longest of all, many short ones would be mostly
    # padding. Those that go on, of exactly one length: padding after them would be in their windows.
    group_of = lengths.log2().floor()
    if output_final_state:
        group_of[last] = -lengths[last].to(group_of.dtype)
    for group in torch.unique(group_of).tolist():
        members = torch.nonzero(group_of == group).view(-1)
        tokens = torch.nonzero(torch.isin(sequence, members)).view(-1)
        place = torch.searchsorted(members, sequence[tokens]), column[tokens]
        shape = (len(members), int(lengths[members].max()))

        def unpack(x, place=place, tokens=tokens, shape=shape):
            return x.new_zeros(*shape, *x.shape[1:]).index_put(place, x[tokens])

        mixed, final = mixer.mix(
            *(unpack(x) for x in flat[:3]),
            None if hidden_states is None else unpack(flat[3]),
            valid=unpack(flat[4]),
            state=None,
            inplace_final_state=False,
        )
        output = output.index_put((tokens,), mixed[place])
        for index, member in enumerate(members.tolist()):
            if member in last:
                finals[member] = tuple(x[index] for x in final)
    output = output.unflatten(0, (batch, length))
    if not output_final_state:
        return output, None
    return output, tuple(torch.stack(parts) for parts in zip(*(finals[member] for member in last), strict=True))


def mix_beginning(mixer: Any, query, key, value, hidden_states, valid):
    """
    The first tokens of sequences that go on: padding after them is moved in front, where it takes no place in
    windows and convolutions, and the outputs are moved back.
    """
    length = valid.shape[1]
    place = torch.arange(length, device=valid.device)
    behind = length - ((place + 1) * valid).amax(1, keepdim=True)  # padding after the last token, [B, 1]
    if valid.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(behind.any()):
        return mixer.mix(query, key, value, hidden_states, valid=valid, state=None, inplace_final_state=False)
    there, back = (place - behind) % length, (place + behind) % length
    moved = [None if x is None else _rows_at(x, there) for x in (query, key, value, hidden_states, valid)]
    output, state = mixer.mix(*moved[:4], valid=moved[4], state=None, inplace_final_state=False)
    return _rows_at(output, back), state


def _rows_at(x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """`x[b, place[b, t]]`, `[B, T, ...]`."""
    return x.gather(1, place.view(*place.shape, *(1,) * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))


__all__ = ["mix_beginning", "mix_packed"]
