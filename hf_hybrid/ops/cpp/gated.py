"""Gated linear attention and the gated delta rule through the kernels."""

import ctypes
import functools

import torch

from .arguments import BLOCK, GatedArguments, GatedStep, address, dense, view, whole
from .build import library
from .eligible import DTYPES


def gated(
    query,
    key,
    value,
    *,
    decay,
    scale,
    beta=None,
    qk_l2norm=False,
    min_decay=None,
    initial_state=None,
    output_final_state=False,
    inplace_final_state=False,
):
    """[`naive.naive_gated_linear_attention`], and with `beta` [`naive.naive_gated_delta_rule`]."""
    decay, beta = decay.float(), None if beta is None else beta.float()
    state = None if initial_state is None else initial_state.float().contiguous()
    settings = (scale, qk_l2norm, LOWEST if min_decay is None else min_decay)
    tensors = (query, key, value, decay, beta, state)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        output, final = _Gated.apply(settings, *tensors)
        return output, (final if output_final_state else None)
    if query.shape[1] == 1:
        output, final = _step(settings, *tensors, inplace=inplace_final_state)
        return output, (final if output_final_state else None)
    output, final, _ = _forward(settings, *tensors, output_final_state=output_final_state)
    return output, final


# no bound on decays
LOWEST = -3e38


def _arguments(settings, query, key, value, decay, beta, state, output):
    """The structure, and the tensors it points to: they must outlive the call."""
    scale, qk_l2norm, min_decay = settings
    query, key, value, per_channel = dense(query), dense(key), dense(value), decay.ndim == 4
    decay, state = dense(decay) if per_channel else decay, whole(state)
    structure = GatedArguments(
        batch=query.shape[0],
        tokens=query.shape[1],
        heads=query.shape[2],
        kv_heads=key.shape[2],
        state_heads=decay.shape[2],
        key_dim=key.shape[3],
        value_dim=value.shape[3],
        dtype=DTYPES[query.dtype],
        threads=torch.get_num_threads(),
        per_channel=per_channel,
        l2norm=qk_l2norm,
        scale=scale,
        min_decay=min_decay,
        query=view(query),
        key=view(key),
        value=view(value),
        output=view(output),
        decay=view(decay),
        initial_state=address(state),
    )
    if beta is not None:
        structure.beta = view(beta)
    return structure, [query, key, value, decay, beta, state, output]


def _forward(settings, query, key, value, decay, beta, state, output_final_state, keep=False):
    """`(output, final state, states before the blocks)`; the last for the backward pass, with `keep`."""
    batch, tokens, heads, key_dim = query.shape
    shape = (batch, decay.shape[2], key_dim, value.shape[3])
    output = query.new_empty(batch, tokens, heads, value.shape[3])
    final = query.new_empty(shape, dtype=torch.float32) if output_final_state else None
    blocks = query.new_empty(*shape[:2], -(-tokens // BLOCK), *shape[2:], dtype=torch.float32) if keep else None
    structure, alive = _arguments(settings, query, key, value, decay, beta, state, output)
    structure.final_state, structure.block_states = address(final), address(blocks)
    library().hf_hybrid_gated_forward(ctypes.byref(structure))
    del alive
    return output, final, blocks


class _Gated(torch.autograd.Function):
    """Nothing is kept but the inputs and a state per block; the backward pass makes the rest again."""

    @staticmethod
    def forward(ctx, settings, query, key, value, decay, beta, state):
        ctx.set_materialize_grads(False)
        output, final, blocks = _forward(
            settings, query, key, value, decay, beta, state, output_final_state=True, keep=True
        )
        ctx.settings = settings
        ctx.save_for_backward(query, key, value, decay, beta, state, blocks)
        return output, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output, grad_final):
        query, key, value, decay, beta, state, blocks = ctx.saved_tensors
        batch, tokens, heads, _ = query.shape
        num_states, num_kv_heads = decay.shape[2], key.shape[2]
        if grad_output is None:  # only the final state was used
            grad_output = query.new_zeros(batch, tokens, heads, value.shape[3])
        grad_output, grad_final = dense(grad_output), whole(grad_final)
        grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        # one per state: tasks must not write to the same numbers
        grad_key, grad_value = (x.new_empty(batch, tokens, num_states, x.shape[3]) for x in (key, value))
        grad_decay = torch.empty_like(decay, memory_format=torch.contiguous_format)
        grad_beta = None if beta is None else torch.empty_like(beta, memory_format=torch.contiguous_format)
        grad_state = None if state is None else torch.empty_like(state)
        structure, alive = _arguments(ctx.settings, query, key, value, decay, beta, state, grad_output)
        structure.block_states, structure.grad_final_state = address(blocks), address(grad_final)
        structure.grad_output, structure.grad_query = view(grad_output), view(grad_query)
        structure.grad_key, structure.grad_value, structure.grad_decay = map(view, (grad_key, grad_value, grad_decay))
        if grad_beta is not None:
            structure.grad_beta = view(grad_beta)
        structure.grad_initial_state = address(grad_state)
        library().hf_hybrid_gated_backward(ctypes.byref(structure))
        del alive
        if num_states != num_kv_heads:
            grad_key, grad_value = (x.unflatten(2, (num_kv_heads, -1)).sum(3) for x in (grad_key, grad_value))
        return None, grad_query, grad_key, grad_value, grad_decay, grad_beta, grad_state


@functools.lru_cache(maxsize=64)
def _step_structure(*fields):
    return ctypes.byref(GatedStep(*fields))


def _step(settings, query, key, value, decay, beta, state, inplace):
    scale, qk_l2norm, min_decay = settings
    batch, _, heads, key_dim = query.shape
    num_kv_heads, value_dim, num_states = value.shape[2], value.shape[3], decay.shape[2]
    structure = _step_structure(
        batch,
        heads,
        num_kv_heads,
        num_states,
        key_dim,
        value_dim,
        DTYPES[query.dtype],
        decay.ndim == 4,
        qk_l2norm,
        scale,
        min_decay,
    )
    query, key, value, decay, beta = (
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        decay.contiguous(),
        whole(beta),
    )
    output = query.new_empty(batch, 1, heads, value_dim)
    if state is None:
        final = query.new_empty(batch, num_states, key_dim, value_dim, dtype=torch.float32)
    else:
        final = state if inplace else torch.empty_like(state)
    library().hf_hybrid_gated_step(
        structure,
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        decay.data_ptr(),
        address(beta),
        address(state),
        final.data_ptr(),
        output.data_ptr(),
    )
    return output, final
