r"""A window, sinks and a bounded memory of exact keys, token by token: the definition of correct.

Slow on purpose; nothing but the tests calls the naive form. Axes as in `naive`, plus `M` memory tokens and `C` tokens
per block. Positions are counted over the tokens of a row that exist, from 0: padding takes no place.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from .naive import _features, _normalized, _read, _with_one


class MemoryState(NamedTuple):
    """
    What a window with a memory leaves behind, batch first. `S` sinks, then `M` memory tokens in the order of their
    positions, then a ring of `W + C` tokens in which token `i` has place `i % (W + C)`.

    Which places are filled follows from `seen`: with `g = (seen - 1) // C` the block of the latest token, the memory
    holds `min(M, max(0, g C - W - S))` tokens.
    """

    key: torch.Tensor  # [B, H_kv, S + M + W + C, K]
    value: torch.Tensor  # [B, H_kv, S + M + W + C, V]
    # [B, H_kv, K] fp64: sum of the unit keys of all blocks that are behind. In fp64 so that the memory's choice does
    # not depend on how the sequence was cut
    key_sum: torch.Tensor
    seen: torch.Tensor  # [B] int64: tokens that exist
    recurrent: torch.Tensor | None  # [B, H_kv, F, V + 1] fp32: what is in none of the other places


def empty_memory_state(key, value, *, window_size, num_sinks, num_memory_tokens, memory_block_size) -> MemoryState:
    """State before the first token, shaped after `key` `[B, T, H_kv, K]` and `value` `[B, T, H_kv, V]`."""
    batch, _, num_kv_heads, key_dim = key.shape
    slots = num_sinks + num_memory_tokens + window_size + memory_block_size
    return MemoryState(
        key=key.new_zeros(batch, num_kv_heads, slots, key_dim),
        value=value.new_zeros(batch, num_kv_heads, slots, value.shape[-1]),
        key_sum=key.new_zeros(batch, num_kv_heads, key_dim, dtype=sum_dtype(key)),
        seen=torch.zeros(batch, dtype=torch.long, device=key.device),
        recurrent=None,
    )


def sum_dtype(x: torch.Tensor) -> torch.dtype:
    """fp64 where the device has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def unit_keys(key: torch.Tensor) -> torch.Tensor:
    """Keys of length 1 along the last axis; zero keys stay zero."""
    return F.normalize(key.detach().to(sum_dtype(key)), dim=-1)


def naive_memory_attention(
    query,
    key,
    value,
    *,
    window_size,
    num_sinks,
    num_memory_tokens,
    memory_block_size,
    scale,
    linear=None,
    valid=None,
    state=None,
):
    r"""
    Exact attention over the latest tokens, the first `S`, and up to `M` of those between, under one normaliser with
    linear attention over the rest. Every token is in exactly one place: sink, window, memory or state.

    Time runs in blocks of `C` tokens. A query of block $g$ (its position divided by $C$, rounded down) sees

    * the sinks: positions below $S$;
    * the window: positions from $g C - W$ on: at least its last $W + 1$ tokens, at most $W + C$;
    * the memory: before the first token of block $g > 0$, the $C$ tokens that leave the window join it, and of all in
      it those stay whose keys are least like the rest, the $M$ with the smallest $\hat k_j^\top \bar k$. $\hat k$ are
      keys of length 1 and $\bar k$ is their mean over all $g C$ tokens behind; of equals the earlier stays
      ([KeyDiff](https://huggingface.co/papers/2504.15364), in which all tokens but the latest compete);
    * the state, where there is a linear part: tokens that left the memory.

    The choice depends on keys alone, so that it is the same however the sequence is cut, and no gradient runs through
    it.

    Args:
        query (`torch.Tensor`): `[B, T, H, K]`.
        key, value (`torch.Tensor`): `[B, T, H_kv, K]`, `[B, T, H_kv, V]`.
        window_size (`int`): `W`.
        num_sinks (`int`): `S`.
        num_memory_tokens (`int`): `M`, at least 1.
        memory_block_size (`int`): `C`, at least 1.
        scale (`float`): Factor on the scores of the exact part.
        linear (`LinearPart`, *optional*): Without it, what leaves the memory is forgotten.
        valid (`torch.Tensor`, *optional*): bool `[B, T]`, `False` for padding, wherever it is; its outputs are zeros.
        state (`MemoryState`, *optional*): What the previous call returned for these sequences.

    Returns:
        `(output, state)`: `[B, T, H, V]` in the query's dtype, and a [`MemoryState`].
    """
    sizes = {
        "window_size": window_size,
        "num_sinks": num_sinks,
        "num_memory_tokens": num_memory_tokens,
        "memory_block_size": memory_block_size,
    }
    if state is None:
        state = empty_memory_state(key, value, **sizes)
    if linear is not None and state.recurrent is None:
        features = _features(linear.feature_map_k, key[:, :1]).shape[-1]
        shape = (key.shape[0], key.shape[2], features, value.shape[3] + 1)
        wide = torch.promote_types(query.dtype, torch.float32)
        state = state._replace(recurrent=key.new_zeros(shape, dtype=wide))
    outputs, finals = [], []
    for row in range(query.shape[0]):
        exists = None if valid is None else valid[row]
        before = MemoryState(*(None if x is None else x[row] for x in state))
        output, final = _one_row(query[row], key[row], value[row], exists, before, scale, linear, **sizes)
        outputs.append(output)
        finals.append(final)
    parts = zip(*finals, strict=True)
    return torch.stack(outputs), MemoryState(*(None if x[0] is None else torch.stack(x) for x in parts))


# Longer than most: a loop whose steps share a dozen tensors, which every part of it would have to be handed.
def _one_row(
    query,
    key,
    value,
    exists,
    state,
    scale,
    linear,
    *,
    window_size,
    num_sinks,
    num_memory_tokens,
    memory_block_size,
):
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    ring, first = window_size + memory_block_size, num_sinks + num_memory_tokens
    keys, values, sums, count, recurrent = state
    keys, values, n = keys.to(key.dtype), values.to(value.dtype), int(count)
    outputs = []
    for t in range(query.shape[0]):
        if exists is not None and not exists[t]:
            outputs.append(query.new_zeros(query.shape[1], value.shape[2]))
            continue
        if n and n % memory_block_size == 0:
            behind = [first + i % ring for i in range(n - memory_block_size, n)]
            sums = sums + unit_keys(keys[:, behind]).sum(1)
            filled = min(num_memory_tokens, max(0, n - memory_block_size - window_size - num_sinks))
            leaving = [i for i in range(n - ring, n - ring + memory_block_size) if i >= num_sinks]
            places = [*range(num_sinks, num_sinks + filled), *(first + i % ring for i in leaving)]
            likeness = (unit_keys(keys[:, places]) @ (sums / n).unsqueeze(-1)).squeeze(-1).float().tolist()
            new_keys, new_values = keys.clone(), values.clone()
            writes = []
            for head, of_head in enumerate(likeness):
                ranked = sorted(range(len(places)), key=lambda i: (of_head[i], i))  # noqa: B023 - used at once
                kept = [places[i] for i in sorted(ranked[:num_memory_tokens])]
                lost = [places[i] for i in ranked[num_memory_tokens:]]
                new_keys[head, num_sinks : num_sinks + len(kept)] = keys[head, kept]
                new_values[head, num_sinks : num_sinks + len(kept)] = values[head, kept]
                writes.append((keys[head, lost], values[head, lost]))
            if linear is not None and writes[0][0].shape[0]:
                lost_keys = torch.stack([k for k, _ in writes], dim=1)[None]  # [1, n, H_kv, K]
                features = _features(linear.feature_map_k, lost_keys)[0].to(wide)
                lost_values = _with_one(torch.stack([v for _, v in writes], dim=1).to(wide))
                recurrent = recurrent + torch.einsum("nhf,nhv->hfv", features, lost_values)
            keys, values = new_keys, new_values
        keys, values = keys.clone(), values.clone()
        for place in {first + n % ring, n if n < num_sinks else first + n % ring}:
            keys[:, place], values[:, place] = key[t], value[t]
        n += 1
        block = (n - 1) // memory_block_size * memory_block_size
        filled = min(num_memory_tokens, max(0, block - window_size - num_sinks))
        window = range(max(num_sinks, block - window_size), n)
        places = [
            *range(min(num_sinks, n)),
            *range(num_sinks, num_sinks + filled),
            *(first + i % ring for i in window),
        ]
        seen_keys, seen_values = (x[:, places].to(wide).repeat_interleave(groups, dim=0) for x in (keys, values))
        scores = (seen_keys @ query[t].to(wide).unsqueeze(-1)).squeeze(-1) * scale  # [H, places]
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        output = (weights.unsqueeze(-2) @ _with_one(seen_values)).squeeze(-2)
        if linear is not None:
            features = _features(linear.feature_map_q, query[None, t : t + 1])[0, 0].to(wide)
            output = output + linear.log_weight.to(wide).exp()[:, None] * _read(features[None], recurrent[None])[0]
        outputs.append(_normalized(output).to(query.dtype))
    return torch.stack(outputs), MemoryState(keys, values, sums, count.new_tensor(n), recurrent)
