"""Chunkwise linear attention with its feature maps inside the loop, forward and backward.

The features of a whole sequence are several times larger than its keys, and a fresh allocation of that size costs a CPU
more time (page faults) than the arithmetic on it. So the maps are applied to a block of chunks at a time, in buffers
that stay in cache, and the backward pass keeps only the inputs, the output, its denominators and one state per block.

Axes inside a block: `[B, N, H, C, K]`, so that `B * N * H_kv` matrices go into each batched product, and a feature map
sees `[.., H, C, K]`.
"""

import torch

from ..matmul import matmul_mode
from ..naive import TINY, mapped
from .blocks import blocks, by_chunk, divide, running_states
from .gated import chunk_gated_linear_attention


# Tokens per chunk: the work inside chunks, quadratic in this, balances the work on the state. Of the smaller products
# of a smaller chunk two-byte types, which multiply faster, make less.
CHUNK_SIZE = {4: 32, 2: 64}  # by bytes per number
# So few tokens are one chunk: calls cost more than arithmetic.
ONE_CHUNK = 128


def chunk_size_of(x) -> int:
    return CHUNK_SIZE.get(x.element_size(), 32)


def block_bytes_per_token(query, feature_map_q) -> int:
    """Query features of one token, in bytes: what decides how long a block may be."""
    width = query.shape[-1] if feature_map_q is None else feature_map_q.output_dim
    return query.shape[0] * query.shape[2] * width * query.element_size()


def chunk_linear_attention(
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
    chunk_size=None,
):
    """
    Chunkwise [`naive_linear_attention`]: same arguments, shapes and results. State and normaliser are fp32 or wider.
    """
    weights_q, weights_k = (() if f is None else f.weights() for f in (feature_map_q, feature_map_k))
    functions = tuple(None if f is None else f.features for f in (feature_map_q, feature_map_k))
    arguments = (query, key, value, initial_state, *weights_q, *weights_k)
    length = query.shape[1]
    chunk_size = chunk_size or (length if length <= ONE_CHUNK else chunk_size_of(query))
    plan = list(blocks(length, chunk_size, block_bytes_per_token(query, feature_map_q)))
    track = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments)
    if track and torch.compiler.is_compiling():
        output, state = _traceable_form(
            query, key, value, feature_map_q, feature_map_k, valid, initial_state, normalize
        )
    elif track:
        output, state = _LinearAttention.apply(functions, len(weights_q), valid, normalize, plan, *arguments)
    else:
        output, state, _, _ = _forward(
            functions,
            weights_q,
            weights_k,
            query,
            key,
            value,
            initial_state,
            valid,
            normalize,
            plan,
            output_final_state=output_final_state,
        )
    return output, (state if output_final_state else None)


def _traceable_form(query, key, value, feature_map_q, feature_map_k, valid, state, normalize):
    """
    Left to autograd, for `torch.compile`, which cannot look into the backward pass below: gated linear attention that
    forgets nothing.
    """
    query, key = mapped(query, key, feature_map_q, feature_map_k, valid)
    output, state = chunk_gated_linear_attention(
        query,
        key,
        torch.nn.functional.pad(value, (0, 1), value=1.0),
        decay=key.new_zeros(key.shape[:3]),
        scale=1.0,
        initial_state=state,
        output_final_state=True,
    )
    if normalize:
        weight = output[..., -1:]
        output = output[..., :-1] / weight.masked_fill(weight <= TINY, torch.inf)
    return output, state


# Longer than most: a loop whose steps share a dozen tensors, which every part of it would have to be handed.
def _forward(
    functions,
    weights_q,
    weights_k,
    query,
    key,
    value,
    state,
    valid,
    normalize,
    plan,
    keep=False,
    output_final_state=True,
):
    """Returns `(output, final state, denominators, state before each block)`; the last two only with `keep`."""
    batch, length, num_heads, key_dim = query.shape
    num_kv_heads, value_dim = value.shape[2:]
    groups, columns = num_heads // num_kv_heads, value_dim + 1
    dtype, wide = query.dtype, torch.promote_types(query.dtype, torch.float32)
    # as `[B, T, H, K]` goes on to the output projection
    output = query.new_empty(batch, length, num_heads, value_dim if normalize else columns)
    denominators = query.new_empty(batch, length, num_heads, 1, dtype=wide) if keep and normalize else None
    kept = []
    state = None if state is None else state.to(wide)
    shape = None
    with matmul_mode(query, batch * length):
        for start, stop, size in plan:
            num_chunks = (stop - start) // size
            if (num_chunks, size) != shape:
                shape = num_chunks, size
                matrices = batch * num_chunks * num_kv_heads
                rows = query.new_empty(batch, num_chunks, num_heads, size, key_dim)
                columns_k = key.new_empty(batch, num_chunks, num_kv_heads, size, key_dim)
                # ones column: the normaliser
                augmented = value.new_ones(batch, num_chunks, num_kv_heads, size, columns)
                values_1 = augmented.view(matrices, size, columns)
                scores = query.new_empty(matrices, groups * size, size)
                mixed = query.new_empty(matrices, groups * size, columns)
                by_head = mixed.view(batch, num_chunks, num_heads, size, columns)
            rows.copy_(by_chunk(query, start, stop, size))
            columns_k.copy_(by_chunk(key, start, stop, size))
            augmented[..., :value_dim].copy_(by_chunk(value, start, stop, size))
            features_q = rows if functions[0] is None else functions[0](rows, *weights_q)
            features_k = columns_k if functions[1] is None else functions[1](columns_k, *weights_k)
            if valid is not None:
                features_k = features_k * by_chunk(valid[:, :, None, None], start, stop, size)
            features_q = features_q.reshape(matrices, groups * size, -1)
            features_k = features_k.reshape(matrices, size, -1)
            transposed = features_k.transpose(1, 2)
            torch.bmm(features_q, transposed, out=scores)
            scores.view(-1, groups, size, size).tril_()
            torch.bmm(scores, values_1, out=mixed)
            kept.append(state)
            if num_chunks > 1 or state is not None or stop < length or output_final_state:
                first = state is None
                increments = torch.bmm(transposed, values_1).view(batch, num_chunks, num_kv_heads, -1, columns)
                states, state = running_states(state, increments, dtype)
                if num_chunks > 1 or not first:
                    mixed.baddbmm_(features_q, states.flatten(0, 2))
            if normalize:
                weight = by_head[..., value_dim:]
                weight.masked_fill_(weight <= TINY, torch.inf)  # a query that sees nothing: 0, with gradient 0
                divide(by_head[..., :value_dim], weight, by_chunk(output, start, stop, size))
                if keep:
                    by_chunk(denominators, start, stop, size).copy_(weight)
            else:
                by_chunk(output, start, stop, size).copy_(by_head)
    return output, state, denominators, kept


class _LinearAttention(torch.autograd.Function):
    """
    The forward pass above with one reverse pass over the blocks. Features and states within a block are computed again,
    not kept.
    """

    @staticmethod
    def forward(ctx, functions, num_weights_q, valid, normalize, plan, query, key, value, state, *weights):
        ctx.set_materialize_grads(False)
        output, final_state, denominators, states = _forward(
            functions,
            weights[:num_weights_q],
            weights[num_weights_q:],
            query,
            key,
            value,
            state,
            valid,
            normalize,
            plan,
            keep=True,
        )
        ctx.settings = functions, num_weights_q, normalize, plan, state is None, len(states), valid is not None
        kept = [query, key, value, output, denominators, valid, *(states[1:] if state is None else states), *weights]
        ctx.save_for_backward(*(x for x in kept if x is not None))
        return output, final_state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output, grad_state):
        functions, num_weights_q, normalize, plan, from_start, num_blocks, padded = ctx.settings
        saved = list(ctx.saved_tensors)
        query, key, value, output = saved[:4]
        del saved[:4]
        denominators = saved.pop(0) if normalize else None
        valid = saved.pop(0) if padded else None
        states_before = [None] * from_start + saved[: num_blocks - from_start]
        weights = [x.detach().requires_grad_() for x in saved[num_blocks - from_start :]]
        weights_q, weights_k = weights[:num_weights_q], weights[num_weights_q:]
        if grad_output is None:  # only the final state was used
            grad_output = torch.zeros_like(output)

        batch, length, num_heads, key_dim = query.shape
        num_kv_heads, value_dim = value.shape[2:]
        groups, columns = num_heads // num_kv_heads, value_dim + 1
        dtype, wide = query.dtype, torch.promote_types(query.dtype, torch.float32)
        grad_query, grad_key, grad_value = (torch.empty_like(x) for x in (query, key, value))
        grad_weights = [torch.zeros_like(x, dtype=wide) for x in weights]
        grad_after = None if grad_state is None else grad_state.to(wide)  # of the state after the block
        shape = None
        with matmul_mode(query, batch * length):
            for block, (start, stop, size) in reversed(list(enumerate(plan))):
                num_chunks = (stop - start) // size
                if (num_chunks, size) != shape:
                    shape = num_chunks, size
                    matrices = batch * num_chunks * num_kv_heads
                    augmented = value.new_ones(batch, num_chunks, num_kv_heads, size, columns)
                    values_1 = augmented.view(matrices, size, columns)
                    grad_by_head = query.new_empty(batch, num_chunks, num_heads, size, columns)
                    grad_mixed = grad_by_head.view(matrices, groups * size, columns)
                    scores = query.new_empty(matrices, groups * size, size)
                    grad_scores = torch.empty_like(scores)
                augmented[..., :value_dim].copy_(by_chunk(value, start, stop, size))
                grad_out = by_chunk(grad_output, start, stop, size)
                rows, features_q, raw_q = _differentiable(functions[0], by_chunk(query, start, stop, size), weights_q)
                columns_k, features_k, raw_k = _differentiable(
                    functions[1], by_chunk(key, start, stop, size), weights_k
                )
                if padded:
                    exists = by_chunk(valid[:, :, None, None], start, stop, size)
                    features_k = features_k * exists
                features_q = features_q.reshape(matrices, groups * size, -1)
                features_k = features_k.reshape(matrices, size, -1)
                if normalize:
                    weight = by_chunk(denominators, start, stop, size)
                    torch.div(grad_out, weight, out=grad_by_head[..., :value_dim])
                    inner = grad_by_head[..., :value_dim] * by_chunk(output, start, stop, size)
                    torch.sum(inner, -1, keepdim=True, out=grad_by_head[..., value_dim:]).neg_()
                else:
                    grad_by_head.copy_(grad_out)
                torch.bmm(features_q, features_k.transpose(1, 2), out=scores)
                scores.view(-1, groups, size, size).tril_()
                torch.bmm(grad_mixed, values_1.transpose(1, 2), out=grad_scores)
                grad_scores.view(-1, groups, size, size).tril_()

                first, last = states_before[block] is None, grad_after is None
                increments = torch.bmm(features_k.transpose(1, 2), values_1).view(
                    batch, num_chunks, num_kv_heads, -1, columns
                )
                states, _ = running_states(states_before[block], increments, dtype)
                # the same running sum, from the back
                increments = torch.bmm(features_q.transpose(1, 2), grad_mixed).view_as(increments)
                grads_after, grad_after = running_states(grad_after, increments.flip(1), dtype)
                grads_after = grads_after.flip(1).flatten(0, 2)

                grad_features = torch.bmm(grad_scores, features_k)
                if num_chunks > 1 or not first:
                    grad_features.baddbmm_(grad_mixed, states.flatten(0, 2).transpose(1, 2))
                grad_rows = _vjp(raw_q, rows, weights_q, grad_features, grad_weights[:num_weights_q])
                by_chunk(grad_query, start, stop, size).copy_(grad_rows.view_as(rows))

                grad_features = torch.bmm(grad_scores.transpose(1, 2), features_q)
                grad_values = torch.bmm(scores.transpose(1, 2), grad_mixed)
                if num_chunks > 1 or not last:
                    grad_features.baddbmm_(values_1, grads_after.transpose(1, 2))
                    grad_values.baddbmm_(features_k, grads_after)
                by_chunk(grad_value, start, stop, size).copy_(grad_values.view_as(augmented)[..., :value_dim])
                if padded:
                    grad_features = grad_features.view(*columns_k.shape[:-1], -1) * exists
                grad_columns = _vjp(raw_k, columns_k, weights_k, grad_features, grad_weights[num_weights_q:])
                by_chunk(grad_key, start, stop, size).copy_(grad_columns.view_as(columns_k))
        grad_weights = (g.to(w.dtype) for g, w in zip(grad_weights, weights, strict=True))
        grad_first = None if from_start else grad_after
        return None, None, None, None, None, grad_query, grad_key, grad_value, grad_first, *grad_weights


def _differentiable(function, x, weights):
    """`(input, features, features with their graph)` of one block."""
    x = x.contiguous()
    if function is None:
        return x, x, None
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        features = function(x, *weights)
    return x, features.detach(), features


def _vjp(features, x, weights, grad_features, grad_weights):
    """Gradient of the block's input; those of the weights are added to `grad_weights`."""
    if features is None:
        return grad_features
    grads = torch.autograd.grad(features, (x, *weights), grad_features.view_as(features))
    for total, grad in zip(grad_weights, grads[1:], strict=True):
        total += grad
    return grads[0]


# Rows of one product where no chunk structure is needed: large enough for fast products, small enough for the cache.
BLOCK_SIZE = 512


def bidirectional_linear_attention(query, key, value, *, feature_map_q=None, feature_map_k=None, valid=None):
    """
    Chunkwise [`naive_bidirectional_linear_attention`]: same arguments, shapes and results. Two passes over blocks of
    rows.
    """
    batch, length, num_heads, _ = query.shape
    num_kv_heads, value_dim = value.shape[2:]
    groups, num_states = num_heads // num_kv_heads, batch * num_kv_heads
    wide = torch.promote_types(query.dtype, torch.float32)
    weights_q, weights_k = (() if f is None else f.weights() for f in (feature_map_q, feature_map_k))

    def mapped(feature_map, weights, x):
        x = x.contiguous()
        return x if feature_map is None else feature_map.features(x, *weights)

    queries, keys, values = (x.transpose(1, 2) for x in (query, key, value))
    state = None
    outputs = []
    with matmul_mode(query, batch * length):
        for start in range(0, length, BLOCK_SIZE):
            here = slice(start, min(start + BLOCK_SIZE, length))
            features = mapped(feature_map_k, weights_k, keys[:, :, here])
            if valid is not None:
                features = features * valid[:, None, here, None]
            columns = torch.nn.functional.pad(values[:, :, here], (0, 1), value=1.0).flatten(0, 1)
            increment = torch.bmm(features.flatten(0, 1).transpose(1, 2), columns).to(wide)
            state = increment if state is None else state + increment
        low = state.to(query.dtype)
        for start in range(0, length, BLOCK_SIZE):
            stop = min(start + BLOCK_SIZE, length)
            rows = mapped(feature_map_q, weights_q, queries[:, :, start:stop])
            rows = rows.reshape(num_states, groups * (stop - start), -1)
            mixed = torch.bmm(rows, low).view(batch, num_heads, stop - start, value_dim + 1).transpose(1, 2)
            weight = mixed[..., -1:]
            outputs.append(mixed[..., :-1] / weight.masked_fill(weight <= TINY, torch.inf))
    return outputs[0].contiguous() if len(outputs) == 1 else torch.cat(outputs, dim=1)
