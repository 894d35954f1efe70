"""Token-by-token recurrences: the definition of correct. Slow on purpose; nothing but the tests calls them.

Axes: `B` batch, `T` tokens, `H` query heads, `G` query heads per key-value head, `K` key size, `F` feature size, `V`
value size, `W` window, `S` sinks. A group of query heads reads one key-value head, in `repeat_interleave` order. State,
sums and decays are fp32, or fp64 where the inputs are.

A feature map is anything with `weights()`, a tuple of tensors, and `features(x, *weights)`, `[B, H, T, K]` ->
`[B, H, T, F]`.
"""

from typing import Any, NamedTuple

import torch


# Below this a sum of weights counts as no weight at all: the output is 0 and so is its gradient. Nothing is ever
# *added* to a sum of weights: with sharp feature maps honest sums reach 1e-24.
TINY = 1e-30


def naive_linear_attention(
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
):
    r"""
    $S_t = S_{t-1} + \phi(k_t) [v_t, 1]^\top$, $[n_t, d_t] = \phi(q_t)^\top S_t$, $o_t = n_t / d_t$.

    Reference: [Transformers are RNNs](https://huggingface.co/papers/2006.16236), eq. 16-20, with the normaliser carried
    as one more column of the state.

    Args:
        query (`torch.Tensor`): `[B, T, H, K]`.
        key, value (`torch.Tensor`): `[B, T, H_kv, K]`, `[B, T, H_kv, V]`.
        feature_map_q, feature_map_k (*optional*): Feature maps of queries and keys; `None` means that they are features
            already.
        valid (`torch.Tensor`, *optional*): bool `[B, T]`, `False` for tokens that do not exist.
        initial_state (`torch.Tensor`, *optional*): `[B, H_kv, F, V + 1]`, fp32.
        output_final_state (`bool`, *optional*, defaults to `False`): Whether to return the state after the last token.
        normalize (`bool`, *optional*, defaults to `True`): Divide by the last column; otherwise it is returned with the
            others.

    Returns:
        `(output, final_state)`: `[B, T, H, V]` (or `V + 1`) in the query's dtype, and `[B, H_kv, F, V + 1]` fp32 or
        `None`.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    query, key = mapped(query, key, feature_map_q, feature_map_k, valid)
    batch, length, _, feature_dim = query.shape
    num_kv_heads, value_dim = value.shape[2:]
    state = query.new_zeros(batch, num_kv_heads, feature_dim, value_dim + 1, dtype=wide)
    if initial_state is not None:
        state = initial_state.to(wide)
    outputs = []
    for t in range(length):
        state = state + key[:, t].to(wide).unsqueeze(-1) * _with_one(value[:, t].to(wide)).unsqueeze(-2)
        outputs.append(_read(query[:, t].to(wide), state))
    output = torch.stack(outputs, dim=1)
    if normalize:
        output = _normalized(output)
    return output.to(query.dtype), (state if output_final_state else None)


def naive_bidirectional_linear_attention(query, key, value, *, feature_map_q=None, feature_map_k=None, valid=None):
    r"""
    $o_t = \phi(q_t)^\top S^{(v)} / \phi(q_t)^\top S^{(1)}$, $S = \sum_{j=1}^{T} \phi(k_j) [v_j, 1]^\top$: every token
    sees all tokens.

    Arguments and output as in [`naive_linear_attention`]; there is no state.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    query, key = mapped(query, key, feature_map_q, feature_map_k, valid)
    state = 0
    for t in range(query.shape[1]):
        state = state + key[:, t].to(wide).unsqueeze(-1) * _with_one(value[:, t].to(wide)).unsqueeze(-2)
    output = torch.stack([_read(query[:, t].to(wide), state) for t in range(query.shape[1])], dim=1)
    return _normalized(output).to(query.dtype)


def naive_gated_linear_attention(
    query, key, value, *, decay, scale, min_decay=None, initial_state=None, output_final_state=False
):
    r"""
    $S_t = \mathrm{diag}(e^{g_t}) S_{t-1} + k_t v_t^\top$, $o_t = \text{scale}\; S_t^\top q_t$.

    One number $g_t$ per head: lightning attention (fixed), RetNet, Mamba2, "simple GLA". One per key channel:
    [GLA](https://huggingface.co/papers/2312.06635), eq. 3.

    Args:
        query (`torch.Tensor`): `[B, T, H, K]`.
        key, value (`torch.Tensor`): `[B, T, H_kv, K]`, `[B, T, H_kv, V]`. A token that does not exist has a zero key
            and zero decay.
        decay (`torch.Tensor`): Log-decays $g \le 0$, `[B, T, H_s]` or `[B, T, H_s, K]`, with one state per key-value
            head (`H_s = H_kv`) or per query head (`H_s = H`).
        scale (`float`): Factor on the output.
        min_decay (`float`, *optional*): Log-decays below are raised to it. The chunkwise form of decays per channel is
            the faster the higher it is, see `chunk.gated`.
        initial_state (`torch.Tensor`, *optional*): `[B, H_s, K, V]`, fp32.
        output_final_state (`bool`, *optional*, defaults to `False`): Whether to return the state after the last token.

    Returns:
        `(output, final_state)`: `[B, T, H, V]` in the query's dtype, and `[B, H_s, K, V]` fp32 or `None`.
    """
    return naive_gated_delta_rule(
        query,
        key,
        value,
        decay=decay,
        beta=None,
        scale=scale,
        min_decay=min_decay,
        initial_state=initial_state,
        output_final_state=output_final_state,
    )


def naive_gated_delta_rule(
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
):
    r"""
    $\tilde S_t = \mathrm{diag}(e^{g_t}) S_{t-1}$, $S_t = \tilde S_t + \beta_t k_t (v_t - \tilde S_t^\top k_t)^\top$,
    $o_t = \text{scale}\; S_t^\top q_t$.

    One $g_t$ per head: [Gated DeltaNet](https://huggingface.co/papers/2412.06464), eq. 10; one per key channel:
    [Kimi Delta Attention](https://huggingface.co/papers/2510.26692), eq. 1.

    Args:
        query, key (`torch.Tensor`): `[B, T, H, K]`, `[B, T, H_kv, K]`, keys of length at most 1.
        beta (`torch.Tensor`): Write strengths, `[B, T, H_s]`; 0 for a token that does not exist.
        qk_l2norm (`bool`, *optional*, defaults to `False`): Bring queries and keys to length 1 first.
        value, decay, scale, min_decay, initial_state, output_final_state: As in [`naive_gated_linear_attention`].

    Returns:
        As [`naive_gated_linear_attention`].
    """
    dtype, wide = query.dtype, torch.promote_types(query.dtype, torch.float32)
    batch, length, _, key_dim = query.shape
    num_kv_heads, value_dim = value.shape[2:]
    num_states = decay.shape[2]
    key, value = (x.repeat_interleave(num_states // num_kv_heads, dim=2).to(wide) for x in (key, value))
    decay = decay.to(wide) if decay.ndim == 4 else decay.to(wide).unsqueeze(-1)
    if min_decay is not None:
        decay = decay.clamp_min(min_decay)
    if qk_l2norm:
        query, key = l2_normalized(query.to(wide)), l2_normalized(key)
    state = query.new_zeros(batch, num_states, key_dim, value_dim, dtype=wide)
    if initial_state is not None:
        state = initial_state.to(wide)
    outputs = []
    for t in range(length):
        state = decay[:, t].exp().unsqueeze(-1) * state
        write = value[:, t]
        if beta is not None:
            recalled = (key[:, t].unsqueeze(-2) @ state).squeeze(-2)
            write = beta[:, t].to(wide).unsqueeze(-1) * (write - recalled)
        state = state + key[:, t].unsqueeze(-1) * write.unsqueeze(-2)
        outputs.append(_read(query[:, t].to(wide) * scale, state))
    return torch.stack(outputs, dim=1).to(dtype), (state if output_final_state else None)


def l2_normalized(x):
    """`x` over its length along the last axis; rows near zero stay near zero, with a bounded gradient."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


class WindowState(NamedTuple):
    """
    What a window leaves behind, batch first. `S` sinks, then a ring of `W` window positions.

    Every token is in one place: a sink (the first `S` tokens that exist), the window (the last `W` positions) or older.
    A token that became a sink is not visible in the window, so that nothing is counted twice.
    """

    key: torch.Tensor  # [B, H_kv, S + W, K]
    value: torch.Tensor  # [B, H_kv, S + W, V]
    visible: torch.Tensor  # [B, S + W] bool
    # [B, 3] int64: place of the oldest position in the ring (the same for all rows), sinks found, and positions seen
    # since the last one that is not visible; the latter stops at W
    counts: torch.Tensor
    recurrent: torch.Tensor | None  # [B, H_kv, F, V + 1] fp32: what is older, where there is a linear part

    def is_settled(self, num_sinks: int, window_size: int) -> bool:
        """Whether everything is visible: all sinks are there and the window is full. Reads the counts."""
        return all(sinks >= num_sinks and run >= window_size for _, sinks, run in self.counts.tolist())


class LinearPart(NamedTuple):
    """The linear attention beside a window."""

    feature_map_q: Any
    feature_map_k: Any
    log_weight: torch.Tensor  # [H]: log of the factor on the linear weights


def empty_window_state(key, value, window_size: int, num_sinks: int) -> WindowState:
    """State before the first token, shaped after `key` `[B, T, H_kv, K]` and `value` `[B, T, H_kv, V]`."""
    batch, _, num_kv_heads, key_dim = key.shape
    slots = num_sinks + window_size
    return WindowState(
        key=key.new_zeros(batch, num_kv_heads, slots, key_dim),
        value=value.new_zeros(batch, num_kv_heads, slots, value.shape[-1]),
        visible=torch.zeros(batch, slots, dtype=torch.bool, device=key.device),
        counts=torch.zeros(batch, 3, dtype=torch.long, device=key.device),
        recurrent=None,
    )


def in_order(state: WindowState, num_sinks: int) -> WindowState:
    """The same state with the oldest position first in the ring."""
    window_size = state.key.shape[2] - num_sinks
    slots = torch.arange(num_sinks + window_size, device=state.key.device)
    turned = num_sinks + (slots - num_sinks + state.counts[0, 0]) % window_size
    index = torch.where(slots < num_sinks, slots, turned)
    counts = torch.cat([torch.zeros_like(state.counts[:, :1]), state.counts[:, 1:]], dim=1)
    key, value = state.key.index_select(2, index), state.value.index_select(2, index)
    return WindowState(key, value, state.visible.index_select(1, index), counts, state.recurrent)


# Longer than most: a loop whose steps share a dozen tensors, which every part of it would have to be handed.
def naive_window_attention(query, key, value, *, window_size, num_sinks, scale, linear=None, valid=None, state=None):
    r"""
    Exact attention over the last `window_size` positions and `num_sinks` sinks, with linear attention over everything
    older under the same normaliser. With $s_{tj} = \text{scale}\, q_t^\top k_j$ and $m_t = \max_{j \in \mathcal{W}_t}
    s_{tj}$,

    $$o_t = \frac{\sum_{j \in \mathcal{W}_t} e^{s_{tj} - m_t} v_j + e^{a}\, \phi(q_t)^\top S_{t-W}^{(v)}}{\sum_{j \in \mathcal{W}_t} e^{s_{tj} - m_t} + e^{a}\, \phi(q_t)^\top S_{t-W}^{(1)}}.$$

    References: [StreamingLLM](https://huggingface.co/papers/2309.17453) (window and sinks),
    [LoLCATs](https://huggingface.co/papers/2410.10254), eq. 7 (shared normaliser).

    Args:
        query (`torch.Tensor`): `[B, T, H, K]`.
        key, value (`torch.Tensor`): `[B, T, H_kv, K]`, `[B, T, H_kv, V]`.
        window_size (`int`): `W`, in positions, the current one included.
        num_sinks (`int`): `S`.
        scale (`float`): Factor on the scores of the exact part.
        linear (`LinearPart`, *optional*): Without it, what is older is forgotten.
        valid (`torch.Tensor`, *optional*): bool `[B, T]`, `False` for padding. Padding takes a position of the window.
        state (`WindowState`, *optional*): What the previous call returned for these sequences.

    Returns:
        `(output, state)`: `[B, T, H, V]` in the query's dtype, and a [`WindowState`].
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    batch, length, num_heads, _ = query.shape
    groups = num_heads // key.shape[2]
    if valid is None:
        valid = torch.ones(batch, length, dtype=torch.bool, device=query.device)
    if state is None:
        state = empty_window_state(key, value, window_size, num_sinks)
    keys, values, visible, counts, recurrent = in_order(state, num_sinks)
    _, sink_count, run = counts.unbind(1)
    keys, values = keys.to(key.dtype), values.to(value.dtype)
    slot = torch.arange(num_sinks, device=query.device)
    outputs = []
    for t in range(length):
        if linear is not None:
            oldest = _features(linear.feature_map_k, keys[:, :, num_sinks][:, None])[:, 0].to(wide)
            write = oldest.unsqueeze(-1) * _with_one(values[:, :, num_sinks].to(wide)).unsqueeze(-2)
            write = write * visible[:, num_sinks, None, None, None]
            recurrent = write if recurrent is None else recurrent + write
        is_sink = valid[:, t] & (sink_count < num_sinks)
        place = is_sink[:, None] & (slot == sink_count[:, None])  # [B, S]

        def moved(buffer, new, place=place):
            sinks = torch.where(place[:, None, :, None], new[:, :, None], buffer[:, :, :num_sinks])
            return torch.cat([sinks, buffer[:, :, num_sinks + 1 :], new[:, :, None]], dim=2)

        keys, values = moved(keys, key[:, t]), moved(values, value[:, t])
        window = torch.cat([visible[:, num_sinks + 1 :], (valid[:, t] & ~is_sink)[:, None]], dim=1)
        visible = torch.cat([visible[:, :num_sinks] | place, window], dim=1)
        sink_count = sink_count + is_sink
        run = torch.where(window[:, -1], (run + 1).clamp_max(window_size), 0)

        all_keys, all_values = (x.to(wide).repeat_interleave(groups, dim=1) for x in (keys, values))  # [B, H, S + W, .]
        scores = (all_keys @ query[:, t].to(wide).unsqueeze(-1)).squeeze(-1) * scale
        scores = scores.masked_fill(~visible[:, None], -torch.inf)
        row_max = scores.amax(-1, keepdim=True)
        weights = (scores - row_max.masked_fill(row_max.isinf(), 0.0)).exp()
        output = (weights.unsqueeze(-2) @ _with_one(all_values)).squeeze(-2)  # [B, H, V + 1]
        if linear is not None:
            features = _features(linear.feature_map_q, query[:, t : t + 1])[:, 0].to(wide)
            output = output + linear.log_weight.to(wide).exp()[:, None] * _read(features, recurrent)
        outputs.append(_normalized(output))
    output = torch.stack(outputs, dim=1).to(query.dtype)
    counts = torch.stack([torch.zeros_like(run), sink_count, run], dim=1)
    return output, WindowState(keys, values, visible, counts, recurrent)


def mapped(query, key, feature_map_q, feature_map_k, valid):
    """
    Features of all queries and keys, `[B, T, H, F]` and `[B, T, H_kv, F]`; those of keys that do not exist are zeros.
    """
    query, key = _features(feature_map_q, query), _features(feature_map_k, key)
    return query, (key if valid is None else key * valid[..., None, None])


def _features(feature_map, x):
    """`[B, T, H, K]` -> `[B, T, H, F]`."""
    return x if feature_map is None else feature_map.features(x.transpose(1, 2), *feature_map.weights()).transpose(1, 2)


def _with_one(value):
    return torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)


def _read(query, state):
    """`[B, H, K]` queries from `[B, H_s, K, V]` states: `[B, H, V]`."""
    return (query.unflatten(1, (state.shape[1], -1)) @ state).flatten(1, 2)


def _normalized(output):
    weight = output[..., -1:]
    return output[..., :-1] / weight.masked_fill(weight <= TINY, torch.inf)
