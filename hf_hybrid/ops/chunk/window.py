"""Sliding-window attention with sinks, and optionally linear attention over everything older, a chunk of tokens at a
time.

A chunk of queries reaches the sinks, the chunks before it that its window covers, and itself. Of those keys each query
gives an exponential weight to the ones in its window and a linear weight (product of features) to the ones that have
just left it, side by side in one matrix of weights; keys that left the reach are in the recurrent state.
"""

import torch
from torch.nn import functional as F

from ..matmul import matmul_mode
from ..naive import TINY, WindowState, empty_window_state, in_order
from .blocks import blocks, by_chunk, divide, running_states
from .linear import chunk_linear_attention


# Measured: with a window of 64, the reach of 96 keys per query costs more than twice as many products save.
CHUNK_SIZE = 32
# Score of a key that is not there, and the lowest row maximum: with -inf a query that sees nothing would come to -inf -
# (-inf), NaN.
LOWEST = -1e30


def chunk_window_attention(
    query,
    key,
    value,
    *,
    window_size,
    num_sinks,
    scale,
    linear=None,
    valid=None,
    state=None,
    chunk_size=CHUNK_SIZE,
    linear_form=chunk_linear_attention,
):
    """
    Chunkwise [`naive_window_attention`]: same arguments, shapes and results. Scores and sums are fp32 or wider.
    `linear_form` computes the linear part where everything is done at once: under autograd, and on a GPU.
    """
    inputs = [query, key, value, *(x for x in state or () if x is not None)]
    if linear is not None:
        inputs += [linear.log_weight, *linear.feature_map_q.weights(), *linear.feature_map_k.weights()]
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if state is not None:
        state = in_order(state, num_sinks)
    sinks, final = advance_window(key, value, valid, state, window_size, num_sinks)
    settings = {"window_size": window_size, "scale": scale, "linear": linear, "chunk_size": chunk_size}
    if differentiable or query.is_cuda:
        output, recurrent = _batched_form(query, key, value, valid, state, sinks, linear_form=linear_form, **settings)
    else:
        output, recurrent = _loop_form(query, key, value, valid, state, sinks, **settings)
    return output, final._replace(recurrent=recurrent)


def advance_window(key, value, valid, state, window_size, num_sinks):
    """
    Sort the new tokens into sinks and window.

    Returns `((sink_key, sink_value, sink_position, is_sink), final state without its recurrent part)`:
    `[B, H_kv, S, K]`, `[B, H_kv, S, V]`, int `[B, S]` (index among the new tokens, -1 = seen before, T = not there) and
    bool `[B, T]`.
    """
    batch, length = key.shape[:2]
    keys, values = key.transpose(1, 2), value.transpose(1, 2)
    if state is None:
        state = empty_window_state(key, value, window_size, num_sinks)
    exists = valid if valid is not None else torch.ones(batch, length, dtype=torch.bool, device=key.device)
    old_key, old_value = state.key[:, :, :num_sinks].to(key.dtype), state.value[:, :, :num_sinks].to(value.dtype)
    if num_sinks:
        # the sinks are among the first `num_sinks` tokens unless there is padding
        head = slice(None) if valid is not None else slice(0, num_sinks)
        rank = state.counts[:, 1:2] + exists[:, head].cumsum(1) - 1  # of each valid token in its sequence, from 0
        candidates = exists[:, head] & (rank < num_sinks)
        slot = torch.arange(num_sinks, device=key.device)
        match = candidates[:, None, :] & (rank[:, None, :] == slot[:, None])  # [B, S, T]
        arrives, index = match.any(-1), match.int().argmax(-1)  # [B, S]
        known = slot < state.counts[:, 1:2]

        def merge(old, new):
            picked = new.gather(2, index[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[-1]))
            return torch.where(arrives[:, None, :, None], picked, old)

        sink_key, sink_value = merge(old_key, keys), merge(old_value, values)
        position = torch.where(arrives, index, torch.where(known, -1, length))
        is_sink = F.pad(candidates, (0, length - candidates.shape[1]))
    else:
        sink_key, sink_value, is_sink = old_key, old_value, torch.zeros_like(exists)
        position = state.counts.new_zeros(batch, 0)

    count = (state.counts[:, 1] + exists.sum(1)).clamp_max(num_sinks)
    seen = torch.cat([state.visible[:, num_sinks:], exists & ~is_sink], dim=1)[:, -window_size:]
    run = seen.flip(1).int().cumprod(1).sum(1)
    slot = torch.arange(num_sinks, device=key.device)

    def last(old, new):
        if length >= window_size:
            return new[:, :, length - window_size :]
        return torch.cat([old[:, :, num_sinks + length :].to(new.dtype), new], dim=2)

    final = WindowState(
        key=torch.cat([sink_key, last(state.key, keys)], dim=2),
        value=torch.cat([sink_value, last(state.value, values)], dim=2),
        visible=torch.cat([slot < count[:, None], seen], dim=1),
        counts=torch.stack([torch.zeros_like(count), count, run.to(count.dtype)], dim=1),
        recurrent=None,
    )
    return (sink_key, sink_value, position, is_sink), final


# Longer than most: a loop whose steps share a dozen tensors, which every part of it would have to be handed.
def _loop_form(query, key, value, valid, state, sinks, *, window_size, scale, linear, chunk_size):
    """Block by block with buffers that are used again; no gradients. Returns `(output, recurrent state)`."""
    sink_key, sink_value, sink_position, is_sink = sinks
    batch, length, num_heads, key_dim = query.shape
    num_kv_heads, value_dim = value.shape[2:]
    groups, columns, num_sinks = num_heads // num_kv_heads, value_dim + 1, sink_key.shape[2]
    dtype, wide = query.dtype, torch.promote_types(query.dtype, torch.float32)
    # whole chunks before a chunk cover its window
    back = -(-window_size // chunk_size) * chunk_size
    # the weights of a token are the widest thing there is
    bytes_per_token = batch * num_heads * (num_sinks + back + chunk_size) * 4
    plan = list(blocks(length, chunk_size, bytes_per_token))
    old_key, old_value, visible = _with_history(key, value, valid, state, is_sink, window_size, back, plan)

    token = torch.arange(chunk_size, device=query.device)[:, None]
    offset = torch.arange(back + chunk_size, device=query.device) - back
    outside = (offset > token) | (offset <= token - window_size)
    band = F.pad(query.new_zeros(outside.shape, dtype=wide).masked_fill_(outside, -torch.inf), (num_sinks, 0))

    output = query.new_empty(batch, length, num_heads, value_dim)
    recurrent = None
    if linear is not None:
        weights_q, weights_k = linear.feature_map_q.weights(), linear.feature_map_k.weights()
        # a weight of e^-80 is none, and its inverse is still a number
        inverse_factor = linear.log_weight.to(wide).clamp_min(-80.0).neg().exp().view(-1, 1, 1)
        recurrent = None if state is None else state.recurrent.to(wide)
    shape = None
    with matmul_mode(band, batch * length):
        for start, stop, size in plan:
            num_chunks = (stop - start) // size
            if (num_chunks, size) != shape:
                shape = num_chunks, size
                matrices, width = batch * num_chunks * num_kv_heads, num_sinks + back + size
                rows = query.new_empty(batch, num_chunks, num_heads, size, key_dim, dtype=wide)
                reach_key = query.new_empty(batch, num_chunks, num_kv_heads, width, key_dim, dtype=wide)
                reach_value = value.new_ones(batch, num_chunks, num_kv_heads, width, columns)
                reach_key[..., :num_sinks, :].copy_(sink_key.unsqueeze(1))
                reach_value[..., :num_sinks, :value_dim].copy_(sink_value.unsqueeze(1))
                scores = query.new_empty(matrices, groups * size, width, dtype=wide)
                weights = scores if dtype == wide else scores.to(dtype)
                mixed = query.new_empty(matrices, groups * size, columns)
                by_head = mixed.view(batch, num_chunks, num_heads, size, columns)
                bias = band[:size, :width].repeat(groups, 1).expand(matrices, -1, -1)
                older = back - window_size + size  # keys in reach that have left the window of some query of the chunk
            rows.copy_(by_chunk(query, start, stop, size))
            if linear is not None:
                features_q = linear.feature_map_q.features(rows if dtype == wide else rows.to(dtype), *weights_q)
            shift = start - back
            for buffer, old, new in ((reach_key, old_key, key), (reach_value[..., :value_dim], old_value, value)):
                source, first = (new, shift) if shift >= 0 else (old, start)
                # [B, N, H_kv, K, back + C]
                reach = source[:, first : first + back + stop - start].unfold(1, back + size, size)
                buffer[..., num_sinks:, :].copy_(reach.transpose(3, 4))
            keys_1 = reach_key.view(matrices, width, key_dim).transpose(1, 2)
            torch.baddbmm(bias, rows.view(matrices, groups * size, key_dim), keys_1, alpha=scale, out=scores)
            seen = None
            # what is not visible sits near the start, unless a mask says otherwise
            if valid is not None or shift < num_sinks:
                # [B, T', 1, 1] -> [B, N, 1, back + C]: chunks overlap
                seen = visible[:, start : stop + back].unfold(1, back + size, size).unsqueeze(2)
                position = torch.arange(start, stop, device=query.device).view(num_chunks, 1, size, 1)
                sinks_seen = sink_position.view(batch, 1, 1, 1, num_sinks) <= position  # [B, N, 1, C, S]
                both = torch.cat([sinks_seen, seen.unsqueeze(3).expand(-1, -1, -1, size, -1)], dim=-1)
                hidden = ~both.unsqueeze(3)
                by_group = scores.view(batch, num_chunks, num_kv_heads, groups, size, width)
                by_group.masked_fill_(hidden, LOWEST)  # finite: a row may have nothing else
            torch.softmax(scores, -1, out=scores)
            if seen is not None:
                by_group.masked_fill_(hidden, 0.0)
            values_1 = reach_value.view(matrices, width, columns)
            if linear is None:
                torch.bmm(scores if weights is scores else weights.copy_(scores), values_1, out=mixed)
            else:
                # The softmax divided the weights e^(s - m) by their sum. The largest of them was 1, so what is left of
                # it tells the sum. The factor of the linear part is taken to the other side: there one product does for
                # both, and for rounding.
                largest = scores.amax(-1, keepdim=True)
                if seen is not None:
                    largest.masked_fill_(largest == 0.0, 1.0)
                restore = (inverse_factor / largest.view(*by_head.shape[:-1], 1)).view_as(largest)
                scores.mul_(restore)
                if weights is not scores:
                    weights.copy_(scores)  # a product that rounds as it writes does not vectorise
                features_q = features_q.reshape(matrices, groups * size, -1)
                features_k = reach_key[..., num_sinks : num_sinks + older, :].to(dtype).contiguous()
                features_k = linear.feature_map_k.features(features_k, *weights_k)
                if seen is not None:
                    features_k = features_k * seen[..., :older].unsqueeze(-1)
                features_k = features_k.reshape(matrices, older, -1).transpose(1, 2)
                products = torch.bmm(features_q, features_k)
                products.view(-1, groups, size, older).tril_(back - window_size)
                weights[..., num_sinks : num_sinks + older] += products
                torch.bmm(weights, values_1, out=mixed)
                leaving = min(size, older)
                increments = torch.bmm(features_k[..., :leaving], values_1[:, num_sinks : num_sinks + leaving])
                increments = increments.view(batch, num_chunks, num_kv_heads, -1, columns)
                states, recurrent = running_states(recurrent, increments, dtype)
                mixed.baddbmm_(features_q, states.flatten(0, 2))
                if stop == length and older > leaving:
                    rest = torch.bmm(features_k[..., leaving:], values_1[:, num_sinks + leaving : num_sinks + older])
                    recurrent = recurrent + rest.view_as(increments)[:, -1]
            weight = by_head[..., value_dim:]
            weight.masked_fill_(weight <= TINY, torch.inf)
            divide(by_head[..., :value_dim], weight, by_chunk(output, start, stop, size))
    return output, recurrent


def _with_history(key, value, valid, state, is_sink, window_size, back, plan):
    """
    The first blocks reach back before the new tokens: `back` earlier positions, of which the last `window_size` may
    hold history, in front of the new ones. Returns keys and values of as many new tokens as such blocks have, and who
    is visible, bool `[B, back + T]`.
    """
    batch, length = key.shape[:2]
    reached = next((stop for _, stop, _ in plan if stop >= min(back, length)), length)
    visible = F.pad(~is_sink if valid is None else valid & ~is_sink, (back, 0))
    early_key, early_value = (F.pad(x[:, :reached], (0, 0, 0, 0, back, 0)) for x in (key, value))
    if state is not None:
        num_sinks = state.key.shape[2] - window_size
        early_key[:, back - window_size : back] = state.key[:, :, num_sinks:].transpose(1, 2)
        early_value[:, back - window_size : back] = state.value[:, :, num_sinks:].transpose(1, 2)
        visible[:, back - window_size : back] = state.visible[:, num_sinks:]
    return early_key, early_value, visible


def _batched_form(query, key, value, valid, state, sinks, *, window_size, scale, linear, chunk_size, linear_form):
    """All chunks of a block at once, left to autograd. Returns `(output, recurrent state)`."""
    sink_key, sink_value, sink_position, is_sink = sinks
    batch, length = query.shape[:2]
    num_sinks = sink_key.shape[2]
    if state is None:
        state = empty_window_state(key, value, window_size, num_sinks)
    visible = torch.cat([state.visible[:, num_sinks:], ~is_sink if valid is None else valid & ~is_sink], dim=1)
    keys = torch.cat([state.key[:, :, num_sinks:].transpose(1, 2).to(key.dtype), key], dim=1)
    values = torch.cat([state.value[:, :, num_sinks:].transpose(1, 2).to(value.dtype), value], dim=1)
    numerators, denominators = [], []
    span = chunk_size * CHUNKS_PER_BLOCK
    with matmul_mode(query, batch * length):
        for start in range(0, length, span):
            stop = min(start + span, length)
            seen = slice(start, stop + window_size)
            numerator, denominator = _window_block(
                query[:, start:stop],
                keys[:, seen],
                values[:, seen],
                visible[:, seen],
                sink_key,
                sink_value,
                sink_position - start,
                window_size,
                scale,
                chunk_size,
            )
            numerators.append(numerator)
            denominators.append(denominator)
    numerator, denominator = (x[0] if len(x) == 1 else torch.cat(x, dim=1) for x in (numerators, denominators))
    recurrent = None
    if linear is not None:
        # token t - w leaves the window at step t: plain linear attention over keys delayed by w
        mixed, recurrent = linear_form(
            query,
            keys[:, :length],
            values[:, :length],
            feature_map_q=linear.feature_map_q,
            feature_map_k=linear.feature_map_k,
            valid=visible[:, :length],
            initial_state=state.recurrent,
            output_final_state=True,
            normalize=False,
        )
        mixed = mixed.to(numerator.dtype) * linear.log_weight.to(numerator.dtype).exp()[:, None]
        numerator, denominator = numerator + mixed[..., :-1], denominator + mixed[..., -1:]
    return (numerator / denominator.masked_fill(denominator <= TINY, torch.inf)).to(query.dtype), recurrent


# Chunks handled by one set of batched products in the differentiable form. Bounds the memory of long sequences.
CHUNKS_PER_BLOCK = 16


def _window_block(query, key, value, valid, sink_key, sink_value, sink_position, window_size, scale, chunk_size):
    """
    `(numerator, denominator)` of the window and the sinks: `[B, T, H, V]`, `[B, T, H, 1]`; keys start `window_size`
    tokens earlier.
    """
    length, num_heads = query.shape[1:3]
    num_kv_heads = key.shape[2]
    groups, num_chunks = num_heads // num_kv_heads, -(-length // chunk_size)
    wide = torch.promote_types(query.dtype, torch.float32)
    rows = _group_rows(query.to(wide) * scale, num_kv_heads, chunk_size)  # [B, H_kv, N, G * C, K]

    # whole chunks before each chunk cover its window: [B, H_kv, N, R, K] with R = (back + 1) * C keys in reach
    back = -(-window_size // chunk_size)
    lead, tail = back * chunk_size - window_size, num_chunks * chunk_size - length
    keys = _reach(F.pad(key.to(wide), (0, 0, 0, 0, lead, tail)), back, chunk_size)
    values = _reach(F.pad(value, (0, 0, 0, 0, lead, tail)), back, chunk_size)
    in_reach = _reach(F.pad(valid, (lead, tail))[..., None, None], back, chunk_size).squeeze(-1)  # [B, 1, N, R]

    token = torch.arange(chunk_size, device=query.device)
    offset = torch.arange((back + 1) * chunk_size, device=query.device) - back * chunk_size  # from the chunk's start
    band = (offset <= token[:, None]) & (offset > token[:, None] - window_size)  # [C, R]
    mask = (in_reach[:, :, :, None, None] & band).expand(-1, -1, -1, groups, -1, -1).flatten(3, 4)
    scores = torch.matmul(rows, keys.transpose(-1, -2)).masked_fill(~mask, -torch.inf)

    flat = rows.flatten(2, 3)  # [B, H_kv, N * G * C, K]
    position = torch.arange(num_chunks * chunk_size, device=query.device).view(num_chunks, 1, chunk_size)
    position = position.expand(-1, groups, -1).reshape(-1)  # of each row
    sink_seen = sink_position[:, None, None, :] <= position[:, None]  # [B, 1, N * G * C, S]
    sink_scores = torch.matmul(flat, sink_key.to(wide).transpose(-1, -2)).masked_fill(~sink_seen, -torch.inf)

    row_max = scores.amax(-1, keepdim=True)
    if sink_scores.shape[-1]:
        row_max = torch.maximum(row_max, sink_scores.amax(-1, keepdim=True).view_as(row_max))
    row_max = row_max.clamp_min(LOWEST)
    weights = (scores - row_max).exp()
    sink_weights = (sink_scores - row_max.flatten(2, 3)).exp()
    numerator = torch.matmul(weights.to(value.dtype), values).to(wide)
    numerator = numerator + torch.matmul(sink_weights, sink_value.to(wide)).view_as(numerator)
    denominator = weights.sum(-1, keepdim=True) + sink_weights.sum(-1, keepdim=True).view_as(row_max)
    return tuple(_ungroup_rows(x, groups, chunk_size, length) for x in (numerator, denominator))


def _chunks(x, chunk_size):
    """`[B, T, H, K]` -> `[B, H, N, C, K]`, the last chunk filled with zeros."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk_size))
    return x.unflatten(1, (-1, chunk_size)).permute(0, 3, 1, 2, 4)


def _group_rows(query, num_kv_heads, chunk_size):
    """
    `[B, T, H, K]` -> `[B, H_kv, N, G * C, K]`: the query heads that read one key-value head become rows of one product.
    """
    chunks = _chunks(query, chunk_size).unflatten(1, (num_kv_heads, -1))  # [B, H_kv, G, N, C, K]
    return chunks.transpose(2, 3).flatten(3, 4)


def _ungroup_rows(x, groups, chunk_size, length):
    """`[B, H_kv, N, G * C, V]` -> `[B, T, H, V]`."""
    x = x.unflatten(3, (groups, chunk_size)).permute(0, 2, 4, 1, 3, 5)  # [B, N, C, H_kv, G, V]
    return x.flatten(3, 4).flatten(1, 2)[:, :length]


def _reach(x, back, chunk_size):
    """`[B, (back + N) * C, H, K]` -> `[B, H, N, (back + 1) * C, K]`: each chunk with the `back` chunks before it."""
    blocks = x.unflatten(1, (-1, chunk_size)).permute(0, 3, 1, 2, 4)  # [B, H, back + N, C, K]
    num_chunks = blocks.shape[2] - back
    return torch.cat([blocks[:, :, i : i + num_chunks] for i in range(back + 1)], dim=3)
