"""The exact part of a mixer: a sliding window and a few sink tokens, and the state they leave behind.

Every token is in exactly one place: a sink (the first `num_sink_tokens` valid tokens), the window (the last `window_size`
positions) or older. A token that became a sink is marked invalid in the window, so nothing is counted twice.
"""

from typing import NamedTuple

import torch


class WindowState(NamedTuple):
    """Batch first. `W` window positions, oldest first; `S` sinks."""

    window_key: torch.Tensor  # [B, W, H_kv, K]
    window_value: torch.Tensor  # [B, W, H_kv, V]
    window_valid: torch.Tensor  # [B, W] bool
    sink_key: torch.Tensor  # [B, S, H_kv, K]
    sink_value: torch.Tensor  # [B, S, H_kv, V]
    sink_count: torch.Tensor  # [B] int64


class WindowInputs(NamedTuple):
    """What the window op reads: `W` tokens of history in front of the new ones."""

    key: torch.Tensor  # [B, W + T, H_kv, K]
    value: torch.Tensor  # [B, W + T, H_kv, V]
    valid: torch.Tensor  # [B, W + T] bool, sinks excluded
    sink_key: torch.Tensor  # [B, S, H_kv, K]
    sink_value: torch.Tensor  # [B, S, H_kv, V]
    sink_position: torch.Tensor  # [B, S] int64: index among the new tokens, -1 = seen before, T = not there


def empty_window(key, value, window_size: int, num_sink_tokens: int) -> WindowState:
    """State before the first token, shaped after `key` `[B, T, H_kv, K]` and `value` `[B, T, H_kv, V]`."""
    batch = key.shape[0]
    return WindowState(
        window_key=key.new_zeros(batch, window_size, *key.shape[2:]),
        window_value=value.new_zeros(batch, window_size, *value.shape[2:]),
        window_valid=torch.zeros(batch, window_size, dtype=torch.bool, device=key.device),
        sink_key=key.new_zeros(batch, num_sink_tokens, *key.shape[2:]),
        sink_value=value.new_zeros(batch, num_sink_tokens, *value.shape[2:]),
        sink_count=torch.zeros(batch, dtype=torch.long, device=key.device),
    )


def advance_window(key, value, valid, state: WindowState) -> tuple[WindowInputs, WindowState]:
    """Sort the new tokens into sinks and window. Returns the op's inputs and the state after the last token."""
    length, num_sinks = key.shape[1], state.sink_key.shape[1]
    rank = state.sink_count[:, None] + valid.cumsum(1) - 1  # of each valid token in its sequence, from 0
    is_sink = valid & (rank < num_sinks)
    slot = torch.arange(num_sinks, device=key.device)
    match = is_sink[:, None, :] & (rank[:, None, :] == slot[:, None])  # [B, S, T]
    arrives, index = match.any(-1), match.int().argmax(-1)  # [B, S]
    known = slot < state.sink_count[:, None]

    def merge(old, new):
        picked = new.gather(1, index[..., None, None].expand(-1, -1, *new.shape[2:])) if num_sinks else old
        return torch.where(arrives[..., None, None], picked, old)

    inputs = WindowInputs(
        key=torch.cat([state.window_key.to(key.dtype), key], dim=1),
        value=torch.cat([state.window_value.to(value.dtype), value], dim=1),
        valid=torch.cat([state.window_valid, valid & ~is_sink], dim=1),
        sink_key=merge(state.sink_key.to(key.dtype), key),
        sink_value=merge(state.sink_value.to(value.dtype), value),
        sink_position=torch.where(arrives, index, torch.where(known, -1, length)),
    )
    final = WindowState(
        window_key=inputs.key[:, length:],
        window_value=inputs.value[:, length:],
        window_valid=inputs.valid[:, length:],
        sink_key=inputs.sink_key,
        sink_value=inputs.sink_value,
        sink_count=(state.sink_count + valid.sum(1)).clamp_max(num_sinks),
    )
    return inputs, final
