"""Chunkwise forms in plain torch: matrix products inside a chunk, a running state between chunks. Run anywhere, differentiable.

Same signatures and results as `naive`. Axes as there, plus `C` tokens per chunk and `N` chunks. A group of query heads is folded
into the rows of one matrix product, so that keys, values and state are never repeated per query head.
"""

import torch
from torch.nn import functional as F


# Tokens per chunk: at 64 the work inside chunks (quadratic in C) balances the work on the state (K x V per chunk).
CHUNK_SIZE = 64
# Chunks handled by one set of batched products. Bounds the memory of long sequences; 16 x 64 tokens keep the products large.
CHUNKS_PER_BLOCK = 16


def chunk_linear_attention(
    query, key, value, *, initial_state=None, output_final_state=False, normalize=True, chunk_size=CHUNK_SIZE
):
    """Chunkwise [`naive_linear_attention`]: same arguments, shapes and results. State and normaliser are fp32 or wider."""
    length = query.shape[1]
    span = chunk_size * CHUNKS_PER_BLOCK
    state, outputs = initial_state, []
    for start in range(0, length, span):
        part = slice(start, min(start + span, length))
        output, state = _linear_block(query[:, part], key[:, part], value[:, part], state, chunk_size)
        outputs.append(output)
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    if normalize:
        output = output[..., :-1] / output[..., -1:].clamp_min(1e-30)
    return output.to(query.dtype), (state if output_final_state else None)


def _linear_block(query, key, value, state, chunk_size):
    batch, length, num_heads, key_dim = query.shape
    num_kv_heads, value_dim = value.shape[2:]
    groups, num_chunks = num_heads // num_kv_heads, -(-length // chunk_size)
    wide = torch.promote_types(query.dtype, torch.float32)
    rows = _group_rows(query, num_kv_heads, chunk_size)  # [B, H_kv, N, G * C, K]
    keys = _chunks(key, chunk_size)  # [B, H_kv, N, C, K]
    values = F.pad(_chunks(value, chunk_size), (0, 1), value=1.0)  # ones column: the normaliser

    scores = torch.matmul(rows, keys.transpose(-1, -2)).unflatten(3, (groups, chunk_size)).tril_().flatten(3, 4)
    output = torch.matmul(scores, values).to(wide)
    increments = torch.matmul(keys.transpose(-1, -2), values).to(wide)  # [B, H_kv, N, K, V + 1]
    first = torch.zeros_like(increments[:, :, :1]) if state is None else state.to(wide).unsqueeze(2)
    # summed from the front, never "total minus own": the difference of two large sums would cost digits
    states = torch.cat([first, increments], dim=2).cumsum(dim=2)
    if num_chunks > 1 or state is not None:
        output = output + torch.matmul(rows, states[:, :, :-1].to(rows.dtype)).to(wide)
    return _ungroup_rows(output, groups, chunk_size, length), states[:, :, -1]


def chunk_sliding_window(
    query, key, value, *, valid, sink_key, sink_value, sink_position, window_size, scale, chunk_size=CHUNK_SIZE
):
    """Chunkwise [`naive_sliding_window`]: same arguments, shapes and results. Scores and sums are fp32 or wider."""
    length, outputs = query.shape[1], []
    span = chunk_size * CHUNKS_PER_BLOCK
    for start in range(0, length, span):
        stop = min(start + span, length)
        seen = slice(start, stop + window_size)
        outputs.append(
            _window_block(
                query[:, start:stop], key[:, seen], value[:, seen], valid[:, seen],
                sink_key, sink_value, sink_position - start, window_size, scale, chunk_size,
            )
        )  # fmt: skip
    if len(outputs) == 1:
        return outputs[0]
    return tuple(torch.cat(parts, dim=1) for parts in zip(*outputs, strict=True))


def _window_block(query, key, value, valid, sink_key, sink_value, sink_position, window_size, scale, chunk_size):
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
    offset = (
        torch.arange((back + 1) * chunk_size, device=query.device) - back * chunk_size
    )  # of each key, from the chunk's start
    band = (offset <= token[:, None]) & (offset > token[:, None] - window_size)  # [C, R]
    mask = (
        (in_reach[:, :, :, None, None] & band).expand(-1, -1, -1, groups, -1, -1).flatten(3, 4)
    )  # [B, 1, N, G * C, R]
    scores = torch.matmul(rows, keys.transpose(-1, -2)).masked_fill(~mask, float("-inf"))

    flat = rows.flatten(2, 3)  # [B, H_kv, N * G * C, K]
    sink_keys = sink_key.to(wide).transpose(1, 2)  # [B, H_kv, S, K]
    position = torch.arange(num_chunks * chunk_size, device=query.device).view(num_chunks, 1, chunk_size)
    position = position.expand(-1, groups, -1).reshape(-1)  # of each row
    sink_seen = sink_position[:, None, None, :] <= position[:, None]  # [B, 1, N * G * C, S]
    sink_scores = torch.matmul(flat, sink_keys.transpose(-1, -2)).masked_fill(~sink_seen, float("-inf"))

    row_max = scores.amax(-1, keepdim=True)
    if sink_scores.shape[-1]:
        row_max = torch.maximum(row_max, sink_scores.amax(-1, keepdim=True).view_as(row_max))
    row_max = row_max.masked_fill(row_max.isinf(), 0.0)  # a row that sees nothing: all weights become exp(-inf) = 0
    weights = (scores - row_max).exp()
    sink_weights = (sink_scores - row_max.flatten(2, 3)).exp()
    numerator = torch.matmul(weights.to(value.dtype), values).to(wide)
    numerator = numerator + torch.matmul(sink_weights, sink_value.to(wide).transpose(1, 2)).view_as(numerator)
    denominator = weights.sum(-1, keepdim=True) + sink_weights.sum(-1, keepdim=True).view_as(row_max)
    return tuple(_ungroup_rows(x, groups, chunk_size, length) for x in (numerator, denominator))


def _chunks(x, chunk_size):
    """`[B, T, H, K]` -> `[B, H, N, C, K]`, the last chunk filled with zeros."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk_size))
    return x.unflatten(1, (-1, chunk_size)).permute(0, 3, 1, 2, 4)


def _group_rows(query, num_kv_heads, chunk_size):
    """`[B, T, H, K]` -> `[B, H_kv, N, G * C, K]`: the query heads that read one key-value head become rows of one product."""
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
