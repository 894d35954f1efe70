"""Chunkwise gated linear attention and gated delta rule, with one log-decay per head or one per key channel.

Several chunks are prepared at a time (a block): everything that does not need the running state is a few large batched
    products. Decays
appear only as differences of cumulative sums, so that no exponent is ever far above zero. Left to autograd.
"""

import torch
from torch.nn import functional as F

from ..matmul import matmul_mode
from ..naive import l2_normalized
from .blocks import chunks_per_block


CHUNK_SIZE = 32
# A log-decay below this forgets everything a float can hold; smaller ones would only cost digits of the cumulative sum.
STRONGEST_HEAD_DECAY = -20.0
STRONGEST_CHANNEL_DECAY = -16.0
# The largest exponent of a rescaled key or query, far enough from the end of fp32 (88) for huge inputs and gradients.
LARGEST_EXPONENT = 64.0


def chunk_gated_linear_attention(
    query,
    key,
    value,
    *,
    decay,
    scale,
    min_decay=None,
    initial_state=None,
    output_final_state=False,
    chunk_size=CHUNK_SIZE,
):
    """
    Chunkwise [`naive_gated_linear_attention`]: same arguments, shapes and results.

    With decays per channel, `min_decay` decides the form, see [`sub_chunk_size_of`]: down to -2 one product per chunk
    ("direct"), down to -4 two ("safe"), else more.
    """
    block = _linear_block if decay.ndim == 3 else _channel_linear_block
    return _scan(
        block, query, key, value, decay, None, scale, False, min_decay, initial_state, output_final_state, chunk_size
    )


def chunk_gated_delta_rule(
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
    chunk_size=CHUNK_SIZE,
):
    """
    Chunkwise [`naive_gated_delta_rule`]: same arguments, shapes and results. Always computed in fp32 or wider: the
    triangular solve of nearly parallel keys multiplies rounding errors.
    """
    return _scan(
        _delta_block,
        query,
        key,
        value,
        decay,
        beta,
        scale,
        qk_l2norm,
        min_decay,
        initial_state,
        output_final_state,
        chunk_size,
    )


def sub_chunk_size_of(min_decay: float, chunk_size: int) -> int:
    """
    Rows of a chunk that may share one reference point of their decays per channel, the first of them, so that no `exp`
    overflows. Follows from the mixer, not from the data: an output must not depend on how strong some later decay is,
    not even by its rounding.
    """
    fits = (size for size in (chunk_size, 16, 8) if chunk_size % size == 0 and -min_decay * size <= LARGEST_EXPONENT)
    return next(fits, 4)  # STRONGEST_CHANNEL_DECAY fits into 4


# Longer than most: a loop whose steps share a dozen tensors, which every part of it would have to be handed.
def _scan(block, query, key, value, decay, beta, scale, qk_l2norm, min_decay, state, output_final_state, chunk_size):
    batch, length, num_heads, key_dim = query.shape
    num_kv_heads, value_dim = value.shape[2:]
    num_states_per_row = decay.shape[2]
    expand, groups = num_states_per_row // num_kv_heads, num_heads // num_states_per_row
    num_states, dtype = batch * num_states_per_row, query.dtype
    wide = torch.promote_types(dtype, torch.float32)
    compute = dtype if beta is None else wide
    # where decays differ per query head, keys and values are expanded by a view, and copied a block at a time
    queries = query.transpose(1, 2).unflatten(1, (num_kv_heads, expand, groups))  # [B, H_kv, E, G, T, K]
    keys, values = (x.transpose(1, 2).unsqueeze(2).expand(-1, -1, expand, -1, -1) for x in (key, value))
    decay = decay.to(wide).transpose(1, 2).flatten(0, 1)  # [R, T] or [R, T, K]
    strongest = STRONGEST_HEAD_DECAY if decay.ndim == 2 else STRONGEST_CHANNEL_DECAY
    min_decay = strongest if min_decay is None else max(min_decay, strongest)
    decay = decay.clamp_min(min_decay)
    if decay.ndim == 2:
        decay, sub_chunk_size = decay.unsqueeze(-1), None
        chunk_size = min(chunk_size, length)
    else:
        chunk_size = min(chunk_size, -(-length // 16) * 16)
        sub_chunk_size = sub_chunk_size_of(min_decay, chunk_size)
    if beta is not None:
        beta = beta.to(wide).transpose(1, 2).flatten(0, 1)  # [R, T]
    running = query.new_zeros(num_states, key_dim, value_dim, dtype=wide)
    if state is not None:
        running = state.to(wide).flatten(0, 1)

    itemsize = torch.empty((), dtype=compute).element_size()
    span = chunk_size * chunks_per_block(chunk_size, batch * num_heads * key_dim * itemsize)
    track = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (query, key, value, decay, beta, state)
    )
    outputs = []
    if not track:
        output = query.new_empty(batch, length, num_heads, value_dim)
        by_group = output.unflatten(2, (num_kv_heads, expand, groups))
    for start in range(0, length, span):
        here = slice(start, min(start + span, length))
        pad = -(here.stop - start) % chunk_size
        num_chunks = (here.stop - start + pad) // chunk_size

        def chunks(x, *lead, here=here, pad=pad, num_chunks=num_chunks):
            """`[.., T, K]` -> `[*lead, N, C, K]`, filled up with zeros."""
            x = x[..., here, :]
            x = F.pad(x, (0, 0, 0, pad)) if pad else x
            return x.reshape(*lead, num_chunks, chunk_size, x.shape[-1])

        # contiguous: products of strided views are slow
        rows = chunks(queries, num_states, groups).transpose(1, 2).contiguous().to(compute)  # [R, N, G, C, K]
        columns, written = (chunks(x, num_states).contiguous().to(compute) for x in (keys, values))
        if qk_l2norm:
            rows, columns = l2_normalized(rows), l2_normalized(columns)
        cumulative = chunks(decay, num_states).cumsum(2)  # [R, N, C, 1 or K]
        strength = None if beta is None else chunks(beta.unsqueeze(-1), num_states)
        mixed, running = block(
            running, rows * scale, columns, written, cumulative, strength, sub_chunk_size, in_place=not track
        )  # [R, N, G * C, V]
        mixed = mixed.view(batch, num_kv_heads, expand, num_chunks, groups, chunk_size, value_dim)
        mixed = mixed.permute(0, 3, 5, 1, 2, 4, 6)  # [B, N, C, H_kv, E, G, V]
        if track:
            outputs.append(mixed.reshape(batch, -1, num_heads, value_dim)[:, : here.stop - start].to(dtype))
        elif pad:
            by_group[:, here].copy_(mixed.flatten(1, 2)[:, : here.stop - start])
        else:
            by_group[:, here].unflatten(1, (num_chunks, chunk_size)).copy_(mixed)
    if track:
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return output, (running.view(batch, num_states_per_row, key_dim, value_dim) if output_final_state else None)


def _linear_block(state, rows, columns, values, cumulative, strength, sub_chunk_size, in_place):
    """One block, one decay per head. Returns `([R, N, G * C, V], state)`."""
    num_states, num_chunks, groups, size, key_dim = rows.shape
    dtype, matrices = rows.dtype, num_states * num_chunks
    with matmul_mode(rows, matrices * size):
        scores = torch.bmm(
            rows.reshape(matrices, groups * size, key_dim), columns.reshape(matrices, size, key_dim).transpose(1, 2)
        )
        weights = _head_decays(cumulative).to(dtype)  # [R, N, C, C]
        scores = _times(scores.view(num_states, num_chunks, groups, size, size), weights.unsqueeze(2), in_place)
        mixed = torch.bmm(scores.view(matrices, groups * size, size), values.reshape(matrices, size, -1))
        last = cumulative[:, :, -1:]
        kept = (columns * (last - cumulative).exp().to(dtype)).reshape(matrices, size, key_dim)
        increments = torch.bmm(kept.transpose(1, 2), values.reshape(matrices, size, -1))
        states, state = _run(state, last.exp(), increments.view(num_states, num_chunks, key_dim, -1))
        rows = _times(rows, cumulative.exp().unsqueeze(2).to(dtype), in_place).reshape(matrices, groups * size, key_dim)
        return torch.baddbmm(mixed, rows, states.to(dtype).flatten(0, 1)), state


def _channel_linear_block(state, rows, columns, values, cumulative, strength, sub_chunk_size, in_place):
    """One block, one decay per key channel. Returns `([R, N, G * C, V], state)`."""
    num_states, num_chunks, groups, size, key_dim = rows.shape
    dtype, matrices = rows.dtype, num_states * num_chunks
    with matmul_mode(rows, matrices * size):
        last = cumulative[:, :, -1:]
        values = values.reshape(matrices, size, -1)
        if sub_chunk_size == size:
            # one reference for the whole chunk: rows e^(b - r), columns e^(r - b); the state's rows take e^r instead of
            # the queries
            reference = cumulative[:, :, :1]
            rows = (rows * (cumulative - reference).exp().unsqueeze(2).to(dtype)).reshape(
                matrices, groups * size, key_dim
            )
            columns = (columns * (reference - cumulative).exp().to(dtype)).reshape(matrices, size, key_dim)
            scores = torch.bmm(rows, columns.transpose(1, 2)).view(num_states, num_chunks, groups, size, size)
            scores = scores.tril_() if in_place else scores.tril()
            increments = torch.bmm(columns.transpose(1, 2), values).view(num_states, num_chunks, key_dim, -1)
            states, state = _run(state, last.exp(), increments, (last - reference).exp().transpose(2, 3))
            states = states * reference.exp().transpose(2, 3)
        else:
            scores = _channel_scores(rows, columns, cumulative, sub_chunk_size)
            rows = (rows * cumulative.exp().unsqueeze(2).to(dtype)).reshape(matrices, groups * size, key_dim)
            kept = (columns * (last - cumulative).exp().to(dtype)).reshape(matrices, size, key_dim)
            increments = torch.bmm(kept.transpose(1, 2), values).view(num_states, num_chunks, key_dim, -1)
            states, state = _run(state, last.exp(), increments)
        mixed = torch.bmm(scores.reshape(matrices, groups * size, size), values)
        return torch.baddbmm(mixed, rows, states.to(dtype).flatten(0, 1)), state


def _run(state, decays, increments, factor=None):
    """
    The only sequential part. Returns `(states before each chunk [R, N, K, V], state after the last)`, fp32 or wider.
    """
    states = []
    decays = decays.transpose(2, 3)  # [R, N, 1 or K, 1]
    increments = increments.to(state.dtype)
    if factor is not None:
        increments = increments * factor
    for chunk in range(increments.shape[1]):
        states.append(state)
        state = torch.addcmul(increments[:, chunk], state, decays[:, chunk])
    return torch.stack(states, dim=1), state


def _delta_block(state, rows, columns, values, cumulative, strength, sub_chunk_size, in_place):
    r"""
    One block of the delta rule. Within a chunk the writes $u$ solve $(I + L) u = \beta (v - \tilde k^\top S)$ with
    $L_{ij} = \beta_i\, e^{b_i - b_j} k_i^\top k_j$ for $j < i$: $T = (I + L)^{-1}$ is found for all chunks at once, and
    applied where the state is known: $T (v - \tilde k^\top S)$, not $T v - (T \tilde k)^\top S$, which are large
    numbers of small difference where keys are nearly parallel. Returns `([R, N, G * C, V], state)`.
    """
    num_states, num_chunks, groups, size, key_dim = rows.shape
    matrices, split = num_states * num_chunks, groups * size
    tokens = matrices * size
    with matmul_mode(state, tokens):
        both = torch.cat([rows, columns.unsqueeze(2)], dim=2)  # [R, N, G + 1, C, K]
        if cumulative.shape[-1] == 1:
            products = torch.bmm(
                both.view(matrices, split + size, key_dim), columns.reshape(matrices, size, key_dim).transpose(1, 2)
            )
            products = products.view(num_states, num_chunks, groups + 1, size, size)
            products = _times(products, _head_decays(cumulative).unsqueeze(2), in_place)
        else:
            products = _channel_scores(both, columns, cumulative, sub_chunk_size)
    inverse = _UnitLowerInverse.apply((products[:, :, groups] * strength).flatten(0, 1))
    inverse = inverse.view(num_states, num_chunks, size, size) * strength.transpose(2, 3)
    both = _times(both, cumulative.exp().unsqueeze(2), in_place)
    keys, last = both[:, :, groups], cumulative[:, :, -1:]
    kept = (columns * (last - cumulative).exp()).transpose(2, 3)
    decays = last.exp().transpose(2, 3)
    states, writes = [], []
    # the only sequential part: few small products, which start faster without the switch
    for chunk in range(num_chunks):
        states.append(state)
        writes.append(torch.bmm(inverse[:, chunk], torch.baddbmm(values[:, chunk], keys[:, chunk], state, alpha=-1)))
        state = torch.baddbmm(state * decays[:, chunk], kept[:, chunk], writes[-1])
    with matmul_mode(state, tokens):
        scores = products[:, :, :groups].reshape(matrices, split, size)
        mixed = torch.bmm(scores, torch.stack(writes, dim=1).flatten(0, 1))
        rows = both[:, :, :groups].reshape(matrices, split, key_dim)
        mixed = torch.baddbmm(mixed, rows, torch.stack(states, dim=1).flatten(0, 1))
    return mixed.view(num_states, num_chunks, split, -1), state


def _head_decays(cumulative):
    """`[R, N, C, 1]` -> $e^{b_i - b_j}$ for $j \\le i$, else 0: `[R, N, C, C]`."""
    difference = cumulative - cumulative.transpose(2, 3)
    return difference.clamp_max(0.0).exp().tril()


def _channel_scores(rows, columns, cumulative, sub_chunk_size):
    r"""
    $\sum_c q_{ic} k_{jc} e^{b_{ic} - b_{jc}}$ for $j \le i$, else 0: `[R, N, G, C, C]`.

    Rows are taken a sub-chunk at a time, with decays relative to its first row (secondary chunking, GLA section 4.3).
    """
    num_states, num_chunks, groups, size, key_dim = rows.shape
    dtype, matrices = rows.dtype, num_states * num_chunks
    parts = []
    for start in range(0, size, sub_chunk_size):
        stop = start + sub_chunk_size
        reference = cumulative[:, :, start : start + 1]
        near = (cumulative[:, :, start:stop] - reference).exp()
        part = (rows[..., start:stop, :] * near.unsqueeze(2).to(dtype)).reshape(
            matrices, groups * sub_chunk_size, key_dim
        )
        far = (columns[:, :, :stop] * (reference - cumulative[:, :, :stop]).exp().to(dtype)).reshape(
            matrices, stop, key_dim
        )
        products = torch.bmm(part, far.transpose(1, 2)).view(num_states, num_chunks, groups, sub_chunk_size, stop)
        parts.append(F.pad(products, (0, size - stop)))
    return torch.cat(parts, dim=3).tril()


def _times(x, factor, in_place):
    return x.mul_(factor) if in_place else x * factor


class _UnitLowerInverse(torch.autograd.Function):
    """
    `(I + L)^-1` of strictly lower triangular `L` `[M, C, C]`; the diagonal and above of the argument are not read.
    """

    @staticmethod
    def forward(ctx, lower):
        eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
        inverse = torch.linalg.solve_triangular(lower, eye, upper=False, unitriangular=True)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        transposed = inverse.mT
        return -(transposed @ grad @ transposed).tril(-1)
