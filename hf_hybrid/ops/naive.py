"""Token-by-token recurrences: the definition of correct. Slow on purpose; nothing but the tests calls them.

Axes: `B` batch, `T` tokens, `H` query heads, `G` query heads per key-value head, `K` key or feature size, `V` value size,
`W` window, `S` sinks. A group of query heads reads one key-value head, in `repeat_interleave` order.
"""

import torch


def naive_linear_attention(query, key, value, *, initial_state=None, output_final_state=False, normalize=True):
    r"""
    $S_t = S_{t-1} + k_t [v_t, 1]^\top$, $[n_t, d_t] = q_t^\top S_t$, $o_t = n_t / d_t$.

    Reference: [Transformers are RNNs](https://huggingface.co/papers/2006.16236), eq. 16-20, with the normaliser carried as one
    more column of the state.

    Args:
        query (`torch.Tensor`): `[B, T, H, K]`, already through the feature map.
        key (`torch.Tensor`): `[B, T, H_kv, K]`, already through the feature map; zero rows are tokens that do not exist.
        value (`torch.Tensor`): `[B, T, H_kv, V]`.
        initial_state (`torch.Tensor`, *optional*): `[B, H_kv, K, V + 1]`, fp32.
        output_final_state (`bool`, *optional*, defaults to `False`): Whether to return the state after the last token.
        normalize (`bool`, *optional*, defaults to `True`): Divide by the last column; otherwise it is returned with the others.

    Returns:
        `(output, final_state)`: `[B, T, H, V]` (or `V + 1`) in the query's dtype, and `[B, H_kv, K, V + 1]` fp32 or `None`.
    """
    batch, length, num_heads, key_dim = query.shape
    num_kv_heads, value_dim = value.shape[2:]
    state_dtype = torch.promote_types(query.dtype, torch.float32)
    state = query.new_zeros(batch, num_kv_heads, key_dim, value_dim + 1, dtype=state_dtype)
    if initial_state is not None:
        state = initial_state.to(state_dtype)
    outputs = []
    for t in range(length):
        column = torch.cat([value[:, t], torch.ones_like(value[:, t, :, :1])], dim=-1).to(state_dtype)
        state = state + key[:, t].to(state_dtype).unsqueeze(-1) * column.unsqueeze(-2)
        grouped = query[:, t].to(state_dtype).unflatten(1, (num_kv_heads, -1))  # [B, H_kv, G, K]
        outputs.append((grouped @ state).flatten(1, 2))  # [B, H, V + 1]
    output = torch.stack(outputs, dim=1)
    if normalize:
        output = output[..., :-1] / output[..., -1:].clamp_min(1e-30)
    return output.to(query.dtype), (state if output_final_state else None)


def naive_sliding_window(query, key, value, *, valid, sink_key, sink_value, sink_position, window_size, scale):
    r"""
    Unnormalised softmax attention of each token over its window and the sinks, as one pass over tokens:
    $m_t = \max_{j} s_{tj}$, $n_t = \sum_j e^{s_{tj} - m_t} v_j$, $d_t = \sum_j e^{s_{tj} - m_t}$ with $s_{tj} = \text{scale}\, q_t^\top k_j$ and
    $j$ over the last `window_size` valid tokens (the query's own included) and the sinks not after $t$.

    Reference: [StreamingLLM](https://huggingface.co/papers/2309.17453). The sums are left unnormalised so that a linear part can
    share the denominator ([LoLCATs](https://huggingface.co/papers/2410.10254), eq. 7).

    Args:
        query (`torch.Tensor`): `[B, T, H, K]`.
        key, value (`torch.Tensor`): `[B, W + T, H_kv, K]` and `[B, W + T, H_kv, V]`: `W` tokens of history, then the new ones.
        valid (`torch.Tensor`): bool `[B, W + T]`; `False` for padding and for tokens kept as sinks.
        sink_key, sink_value (`torch.Tensor`): `[B, S, H_kv, K]`, `[B, S, H_kv, V]`.
        sink_position (`torch.Tensor`): int `[B, S]`: index among the new tokens; negative = seen before, `>= T` = not there.
        window_size (`int`): `W`, in tokens.
        scale (`float`): Factor on the scores.

    Returns:
        `(numerator, denominator)`: `[B, T, H, V]` and `[B, T, H, 1]`, fp32 or wider.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    batch, length, num_heads, _ = query.shape
    groups = num_heads // key.shape[2]
    numerators, denominators = [], []
    for t in range(length):
        here = slice(t + 1, t + 1 + window_size)  # history is W long, so token t sits at W + t
        keys = torch.cat([sink_key, key[:, here]], dim=1).to(wide).repeat_interleave(groups, dim=2)
        values = torch.cat([sink_value, value[:, here]], dim=1).to(wide).repeat_interleave(groups, dim=2)
        seen = torch.cat([sink_position <= t, valid[:, here]], dim=1)  # [B, S + W]
        scores = torch.einsum("bhk,bjhk->bhj", query[:, t].to(wide), keys) * scale
        scores = scores.masked_fill(~seen[:, None], float("-inf"))
        row_max = scores.amax(-1, keepdim=True)
        row_max = torch.where(row_max.isinf(), torch.zeros_like(row_max), row_max)
        weights = (scores - row_max).exp()
        numerators.append(torch.einsum("bhj,bjhv->bhv", weights, values))
        denominators.append(weights.sum(-1, keepdim=True))
    return torch.stack(numerators, dim=1), torch.stack(denominators, dim=1)
