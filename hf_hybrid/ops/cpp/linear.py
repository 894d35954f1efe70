"""Linear attention through the kernels: same signatures and results as `naive`, fp32 and bf16 on a CPU.

A kernel reads tensors where they lie, computes in fp32 a chunk at a time, and writes outputs and states; here its
arguments are put together.
"""

import ctypes
import functools

import torch

from .arguments import BLOCK, LinearArguments, LinearStep, address, dense, view, whole
from .build import library
from .eligible import DTYPES, MAPS


def linear_attention(
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
    """[`naive.naive_linear_attention`]."""
    weights = [*(() if f is None else f.weights() for f in (feature_map_q, feature_map_k))]
    weight_q, weight_k = (w[0] if w else None for w in weights)
    tensors = (query, key, value, initial_state, weight_q, weight_k)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        output, state = _LinearAttention.apply(feature_map_k, valid, normalize, *tensors)
        return output, (state if output_final_state else None)
    if query.shape[1] == 1:
        return _linear_step(feature_map_k, valid, normalize, *tensors, output_final_state, inplace_final_state)
    output, state, *_ = _linear_forward(
        feature_map_k, valid, normalize, *tensors, output_final_state=output_final_state
    )
    return output, state


def linear_arguments(feature_map, valid, normalize, query, key, value, state, weight_q, weight_k, output):
    """
    The structure, and the tensors it points to: they must outlive the call. A backward pass writes no `output`:
    anything will do.
    """
    batch, tokens, heads, key_dim = query.shape
    query, key, value = dense(query), dense(key), dense(value)
    keep = [query, key, value, output, whole(valid), whole(state), whole(weight_q), whole(weight_k)]
    feature_dim, projected, kind = key_dim, key_dim, 0
    if feature_map is not None:
        kind, feature_dim = MAPS[feature_map.compiled], feature_map.output_dim
        projected = key_dim if weight_k is None else weight_k.shape[-1]
    structure = LinearArguments(
        batch=batch,
        tokens=tokens,
        heads=heads,
        kv_heads=key.shape[2],
        key_dim=key_dim,
        value_dim=value.shape[3],
        feature_dim=feature_dim,
        projected_dim=projected,
        map=kind,
        dtype=DTYPES[query.dtype],
        weight_dtype=0 if weight_k is None else DTYPES[weight_k.dtype],
        threads=torch.get_num_threads(),
        normalize=normalize,
        scale=key_dim**-0.25,
        query=view(query),
        key=view(key),
        value=view(value),
        output=view(output),
        valid=address(keep[4]),
        initial_state=address(keep[5]),
        weight_q=address(keep[6]),
        weight_k=address(keep[7]),
    )
    return structure, keep


def _linear_forward(
    feature_map, valid, normalize, query, key, value, state, weight_q, weight_k, output_final_state, keep=False
):
    """`(output, final state, states before the blocks)`; the last for the backward pass, with `keep`."""
    batch, tokens, heads, key_dim = query.shape
    num_kv_heads, value_dim = value.shape[2:]
    feature_dim = key_dim if feature_map is None else feature_map.output_dim
    output = query.new_empty(batch, tokens, heads, value_dim if normalize else value_dim + 1)
    state = None if state is None else state.float()
    final = (
        query.new_empty(batch, num_kv_heads, feature_dim, value_dim + 1, dtype=torch.float32)
        if output_final_state
        else None
    )
    num_blocks = -(-tokens // BLOCK)
    block_states = (
        query.new_empty(batch, num_kv_heads, num_blocks, feature_dim, value_dim + 1, dtype=torch.float32)
        if keep
        else None
    )
    structure, alive = linear_arguments(
        feature_map, valid, normalize, query, key, value, state, weight_q, weight_k, output
    )
    structure.final_state, structure.block_states = address(final), address(block_states)
    library().hf_hybrid_linear_forward(ctypes.byref(structure))
    del alive
    return output, final, block_states


class _LinearAttention(torch.autograd.Function):
    """
    Keeps the inputs and a state per block of tokens; the backward pass makes features, scores and the other states
    again.
    """

    @staticmethod
    def forward(ctx, feature_map, valid, normalize, query, key, value, state, weight_q, weight_k):
        ctx.set_materialize_grads(False)
        output, final, block_states = _linear_forward(
            feature_map,
            valid,
            normalize,
            query,
            key,
            value,
            state,
            weight_q,
            weight_k,
            output_final_state=True,
            keep=True,
        )
        ctx.feature_map, ctx.normalize = feature_map, normalize
        ctx.save_for_backward(query, key, value, state, weight_q, weight_k, valid, block_states)
        return output, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output, grad_state):
        query, key, value, state, weight_q, weight_k, valid, block_states = ctx.saved_tensors
        if grad_output is None:
            grad_output = query.new_zeros(*query.shape[:3], value.shape[3] + (not ctx.normalize))
        grad_output = dense(grad_output)
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
        grad_first = (
            None
            if state is None
            else torch.empty_like(state, dtype=torch.float32, memory_format=torch.contiguous_format)
        )
        # per sequence: tasks must not write to the same numbers
        grad_weights = [
            None if w is None else w.new_empty(query.shape[0], *w.shape, dtype=torch.float32)
            for w in (weight_q, weight_k)
        ]
        wide_state = None if state is None else state.float()
        structure, alive = linear_arguments(
            ctx.feature_map, valid, ctx.normalize, query, key, value, wide_state, weight_q, weight_k, grad_output
        )
        grad_state = None if grad_state is None else grad_state.contiguous()
        structure.block_states, structure.grad_output = address(block_states), view(grad_output)
        structure.grad_query, structure.grad_key, structure.grad_value = map(view, grads)
        structure.grad_final_state, structure.grad_initial_state = address(grad_state), address(grad_first)
        structure.grad_weight_q, structure.grad_weight_k = map(address, grad_weights)
        library().hf_hybrid_linear_backward(ctypes.byref(structure))
        del alive
        if grad_first is not None:
            grad_first = grad_first.to(state.dtype)
        sums = [
            None if g is None else g.sum(0).to(w.dtype) for g, w in zip(grad_weights, (weight_q, weight_k), strict=True)
        ]
        return None, None, None, *grads, grad_first, *sums


def bidirectional_linear_attention(query, key, value, *, feature_map_q=None, feature_map_k=None, valid=None):
    """[`naive.naive_bidirectional_linear_attention`]. No gradients."""
    weight_q, weight_k = (None if f is None or not (w := f.weights()) else w[0] for f in (feature_map_q, feature_map_k))
    output = query.new_empty(*query.shape[:3], value.shape[3])
    structure, alive = linear_arguments(feature_map_k, valid, True, query, key, value, None, weight_q, weight_k, output)
    library().hf_hybrid_bidirectional_forward(ctypes.byref(structure))
    del alive
    return output


@functools.lru_cache(maxsize=64)
def _linear_step_structure(
    batch, heads, num_kv_heads, key_dim, value_dim, feature_dim, projected, kind, dtype, weight_dtype, normalize
):
    structure = LinearStep(
        batch,
        heads,
        num_kv_heads,
        key_dim,
        value_dim,
        feature_dim,
        projected,
        kind,
        dtype,
        weight_dtype,
        normalize,
        key_dim**-0.25,
    )
    return ctypes.byref(structure)


def _linear_step(
    feature_map, valid, normalize, query, key, value, state, weight_q, weight_k, output_final_state, inplace
):
    batch, _, heads, key_dim = query.shape
    num_kv_heads, value_dim = value.shape[2:]
    kind, feature_dim = 0, key_dim
    if feature_map is not None:
        kind, feature_dim = MAPS[feature_map.compiled], feature_map.output_dim
    has_weight = weight_k is not None
    structure = _linear_step_structure(
        batch,
        heads,
        num_kv_heads,
        key_dim,
        value_dim,
        feature_dim,
        weight_k.shape[-1] if has_weight else key_dim,
        kind,
        DTYPES[query.dtype],
        DTYPES[weight_k.dtype] if has_weight else 0,
        normalize,
    )
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    output = query.new_empty(batch, 1, heads, value_dim if normalize else value_dim + 1)
    if state is None:
        new_state = query.new_empty(batch, num_kv_heads, feature_dim, value_dim + 1, dtype=torch.float32)
    else:
        state = state.float().contiguous()
        new_state = state if inplace else torch.empty_like(state)
    if has_weight:
        weight_q, weight_k = weight_q.contiguous(), weight_k.contiguous()
    if valid is not None:
        valid = valid.contiguous()
    library().hf_hybrid_linear_step(
        structure,
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        address(valid),
        address(weight_q),
        address(weight_k),
        address(state),
        new_state.data_ptr(),
        output.data_ptr(),
    )
    return output, (new_state if output_final_state else None)
