"""One-token forms for decoding: no chunks, no padding, nothing that depends on how many tokens came before.

With `inplace_final_state=True` the given state is overwritten rather than copied: half the memory traffic of a decode
step. Not for a state that is still needed, nor under autograd. At this size calls cost more than arithmetic: every line
is there for fewer of them. One-row products are faster through MKL, so the fp32 switch of `matmul` stays off.
"""

import functools

import torch

from .naive import TINY, WindowState
from .naive_memory import MemoryState


def step_linear_attention(
    query,
    key,
    value,
    *,
    feature_map_q=None,
    feature_map_k=None,
    valid=None,
    initial_state=None,
    output_final_state=False,
    normalize=True,
    inplace_final_state=False,
):
    """[`naive_linear_attention`] for `T = 1`: same arguments, shapes and results."""
    batch, _, num_heads, key_dim = query.shape
    num_kv_heads, value_dim = value.shape[2:]
    dtype, wide = query.dtype, torch.promote_types(query.dtype, torch.float32)
    num_states = batch * num_kv_heads
    rows, columns = _features(feature_map_q, query), _features(feature_map_k, key)
    if valid is not None:
        columns = columns * valid[..., None, None]
    if dtype != wide:
        rows, columns, value = rows.to(wide), columns.to(wide), value.to(wide)
    written = torch.constant_pad_nd(value, (0, 1), 1.0).reshape(num_states, 1, -1)
    columns = columns.reshape(num_states, -1, 1)
    if initial_state is None:
        state = columns * written
    else:
        state = initial_state.reshape(num_states, -1, value_dim + 1)  # a view where it is changed in place
        state = state.addcmul_(columns, written) if inplace_final_state else torch.addcmul(state, columns, written)
    mixed = torch.bmm(rows.reshape(num_states, num_heads // num_kv_heads, -1), state).view(batch, 1, num_heads, -1)
    if normalize:
        # a weight of zero has a total of zero above it
        mixed = mixed[..., :value_dim] / mixed[..., value_dim:].clamp_min(TINY)
    if dtype != wide:
        mixed = mixed.to(dtype)
    if inplace_final_state:
        return mixed, initial_state
    return mixed, (state.view(batch, num_kv_heads, -1, value_dim + 1) if output_final_state else None)


def _features(feature_map, x):
    """`[B, 1, H, K]` -> `[B, 1, H, F]`."""
    return x if feature_map is None else feature_map.step_features(x)


def step_gated_linear_attention(
    query,
    key,
    value,
    *,
    decay,
    scale,
    min_decay=None,
    initial_state=None,
    output_final_state=False,
    inplace_final_state=False,
):
    """[`naive_gated_linear_attention`] for `T = 1`: same arguments, shapes and results."""
    return step_gated_delta_rule(
        query,
        key,
        value,
        decay=decay,
        beta=None,
        scale=scale,
        min_decay=min_decay,
        initial_state=initial_state,
        output_final_state=output_final_state,
        inplace_final_state=inplace_final_state,
    )


def step_gated_delta_rule(
    query,
    key,
    value,
    *,
    decay,
    beta,
    scale,
    qk_l2norm=False,
    min_decay=None,
    initial_state=None,
    output_final_state=False,
    inplace_final_state=False,
):
    """[`naive_gated_delta_rule`] for `T = 1`: same arguments, shapes and results."""
    batch, _, num_heads, key_dim = query.shape
    num_kv_heads, value_dim = value.shape[2:]
    per_row, dtype = decay.shape[2], query.dtype
    num_states, wide = batch * per_row, torch.promote_types(dtype, torch.float32)
    if dtype != wide:
        query, key, value = query.to(wide), key.to(wide), value.to(wide)
    if per_row != num_kv_heads:
        key, value = (x.repeat_interleave(per_row // num_kv_heads, dim=2) for x in (key, value))
    rows = query.reshape(num_states, num_heads // per_row, key_dim)
    columns, written = key.reshape(num_states, 1, key_dim), value.reshape(num_states, 1, value_dim)
    if qk_l2norm:
        rows, columns = _l2_normalized(rows), _l2_normalized(columns)
    if min_decay is not None:
        decay = decay.clamp_min(min_decay)
    kept = decay.to(wide).exp().reshape(num_states, -1, 1)  # [R, 1 or K, 1]
    if initial_state is None:
        state = columns.new_zeros(num_states, key_dim, value_dim)
        if kept.requires_grad:  # nothing is forgotten, but DDP wants every parameter in the graph
            state = state * kept
    else:
        state = initial_state.reshape(num_states, key_dim, value_dim)  # a view where it is changed in place
        state = state.mul_(kept) if inplace_final_state else state * kept
    if beta is not None:
        written = (written - torch.bmm(columns, state)) * beta.to(wide).reshape(num_states, 1, 1)
    columns = columns.transpose(1, 2)
    state = state.addcmul_(columns, written) if inplace_final_state else torch.addcmul(state, columns, written)
    mixed = _scaled_bmm(rows, state, scale).view(batch, 1, num_heads, value_dim)
    if dtype != wide:
        mixed = mixed.to(dtype)
    if inplace_final_state:
        return mixed, initial_state
    return mixed, (state.view(batch, per_row, key_dim, value_dim) if output_final_state else None)


# Square root of the epsilon of `l2_normalized`.
_EPSILON = torch.tensor(1e-3, dtype=torch.float64)


def _l2_normalized(x):
    """`l2_normalized` in three calls."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot(_EPSILON)


def _scaled_bmm(x, y, scale):
    """A product and its factor in one call; multiplying by a Python number costs as much as a small product."""
    return torch.baddbmm(x.new_empty(1), x, y, beta=0, alpha=scale)


def step_window_attention(
    query, key, value, *, window_size, num_sinks, scale, state, linear=None, inplace_final_state=False
):
    """
    [`naive_window_attention`] for `T = 1`, no padding, and a settled `state` (see [`WindowState.is_settled`]): same
    arguments, shapes and results. The window is a ring: the new token takes the place of the oldest, and the softmax
    does not mind the order.
    """
    batch, _, num_heads, key_dim = query.shape
    num_kv_heads, value_dim = value.shape[2:]
    num_states, groups, slots = batch * num_kv_heads, num_heads // num_kv_heads, num_sinks + window_size
    dtype, wide = query.dtype, torch.promote_types(query.dtype, torch.float32)
    if not inplace_final_state:
        state = WindowState(*(None if x is None else x.clone(memory_format=torch.contiguous_format) for x in state))
    cursor = int(state.counts[0, 0])
    place = slice(num_sinks + cursor, num_sinks + cursor + 1)
    old_key, old_value = state.key[:, :, place], state.value[:, :, place]
    if linear is not None:
        columns = (
            linear.feature_map_k.step_features(old_key.transpose(1, 2).to(dtype)).to(wide).reshape(num_states, -1, 1)
        )
        written = torch.constant_pad_nd(old_value.to(wide), (0, 1), 1.0).view(num_states, 1, value_dim + 1)
        recurrent = state.recurrent.view(num_states, -1, value_dim + 1).addcmul_(columns, written)
        features = _features(linear.feature_map_q, query).to(wide).reshape(num_states, groups, -1)
        mixed = torch.bmm(features, recurrent)
    old_key.copy_(key.transpose(1, 2))
    old_value.copy_(value.transpose(1, 2))
    state.counts[:, 0] = (cursor + 1) % window_size

    rows = query.reshape(num_states, groups, key_dim)
    all_keys, all_values = state.key.view(num_states, slots, key_dim), state.value.view(num_states, slots, value_dim)
    if dtype != wide:
        rows, all_keys, all_values = rows.to(wide), all_keys.to(wide), all_values.to(wide)
    weights = _scaled_bmm(rows, all_keys.transpose(1, 2), scale).softmax(-1)
    output = torch.bmm(weights, all_values)
    if linear is not None:
        # the largest of the weights e^(s - m) is 1; what the softmax leaves of it is 1 / sum
        share = linear.log_weight.to(wide).exp().view(num_kv_heads, groups, 1)
        share = share * weights.amax(-1, keepdim=True).view(batch, num_kv_heads, groups, 1)
        mixed = mixed.mul_(share.view(num_states, groups, 1))
        output = (output + mixed[..., :value_dim]) / (mixed[..., value_dim:] + 1.0)
    output = output.view(batch, 1, num_heads, value_dim)
    return (output if dtype == wide else output.to(dtype)), state


def step_memory_attention(
    query,
    key,
    value,
    *,
    window_size,
    num_sinks,
    num_memory_tokens,
    memory_block_size,
    scale,
    state,
    linear=None,
    inplace_final_state=False,
):
    """
    [`naive_memory_attention`] for `T = 1`, no padding, rows that have seen equally many tokens, and a token that is not
    the first of its block, so that the memory stays as it is: same arguments, shapes and results.
    """
    batch, _, num_heads, key_dim = query.shape
    num_kv_heads, value_dim = value.shape[2:]
    num_states, groups, slots = batch * num_kv_heads, num_heads // num_kv_heads, state.key.shape[2]
    dtype, wide = query.dtype, torch.promote_types(query.dtype, torch.float32)
    if not inplace_final_state:
        state = MemoryState(*(None if x is None else x.clone(memory_format=torch.contiguous_format) for x in state))
    n, first = int(state.seen[0]), num_sinks + num_memory_tokens
    place = first + n % (window_size + memory_block_size)
    for target in [place] if n >= num_sinks else [place, n]:
        state.key[:, :, target : target + 1].copy_(key.transpose(1, 2))
        state.value[:, :, target : target + 1].copy_(value.transpose(1, 2))
    state.seen.add_(1)

    rows = query.reshape(num_states, groups, key_dim)
    all_keys, all_values = state.key.view(num_states, slots, key_dim), state.value.view(num_states, slots, value_dim)
    if dtype != wide:
        rows, all_keys, all_values = rows.to(wide), all_keys.to(wide), all_values.to(wide)
    scores = _scaled_bmm(rows, all_keys.transpose(1, 2), scale)
    block = n // memory_block_size * memory_block_size
    if block < window_size + num_sinks + num_memory_tokens or n % memory_block_size != memory_block_size - 1:
        scores += _hidden_places(n, window_size, num_sinks, num_memory_tokens, memory_block_size, wide, query.device)
    weights = scores.softmax(-1)
    output = torch.bmm(weights, all_values)
    if linear is not None:
        features = _features(linear.feature_map_q, query).to(wide).reshape(num_states, groups, -1)
        mixed = torch.bmm(features, state.recurrent.view(num_states, -1, value_dim + 1))
        share = linear.log_weight.to(wide).exp().view(num_kv_heads, groups, 1)
        share = share * weights.amax(-1, keepdim=True).view(batch, num_kv_heads, groups, 1)
        mixed = mixed.mul_(share.view(num_states, groups, 1))
        output = (output + mixed[..., :value_dim]) / (mixed[..., value_dim:] + 1.0)
    output = output.view(batch, 1, num_heads, value_dim)
    return (output if dtype == wide else output.to(dtype)), state


@functools.lru_cache(maxsize=4096)
def _hidden_places(n, window_size, num_sinks, num_memory_tokens, memory_block_size, dtype, device):
    """What is added to the scores of a token at position `n`, `[S + M + W + C]`: -inf where nothing is, or not yet."""
    ring, block = window_size + memory_block_size, n // memory_block_size * memory_block_size
    filled = min(num_memory_tokens, max(0, block - window_size - num_sinks))
    seen = [False] * (num_sinks + num_memory_tokens + ring)
    for place in (*range(min(num_sinks, n + 1)), *range(num_sinks, num_sinks + filled)):
        seen[place] = True
    for position in range(max(num_sinks, block - window_size), n + 1):
        seen[num_sinks + num_memory_tokens + position % ring] = True
    return torch.zeros(len(seen), dtype=dtype, device=device).masked_fill_(
        ~torch.tensor(seen, device=device), -torch.inf
    )
