"""Windows, sinks and what is older through the kernels."""

import ctypes

import torch

from ..chunk.window import advance_window
from ..naive import LinearPart, WindowState, empty_window_state
from . import arguments as structures
from .arguments import address, dense, view, whole
from .build import library
from .linear import linear_arguments


def window_attention(
    query,
    key,
    value,
    *,
    window_size,
    num_sinks,
    scale,
    linear: LinearPart | None = None,
    valid=None,
    state: WindowState | None = None,
    inplace_final_state=False,
):
    """[`naive.naive_window_attention`]. Gradients only without a `state`."""
    feature_map, weight_q, weight_k, log_weight = None, None, None, None
    if linear is not None:
        feature_map, log_weight = linear.feature_map_k, linear.log_weight
        weight_q, weight_k = (
            w[0] if (w := f.weights()) else None for f in (linear.feature_map_q, linear.feature_map_k)
        )
    settings = (feature_map, window_size, num_sinks, scale)
    tensors = (query, key, value, valid, weight_q, weight_k, log_weight)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        output, recurrent = _WindowAttention.apply(settings, *tensors)
        _, final = advance_window(key, value, valid, None, window_size, num_sinks)
        return output, final._replace(recurrent=recurrent if linear is not None else None)

    tokens = query.shape[1]
    if state is not None:
        dtypes = (key.dtype, value.dtype, torch.bool, torch.int64, torch.float32)
        state = WindowState._make(
            None if x is None else x.to(dtype).contiguous() for x, dtype in zip(state, dtypes, strict=True)
        )
    step = tokens == 1 and state is not None
    if state is None or not step:
        final = empty_window_state(key, value, window_size, num_sinks)
    elif inplace_final_state:
        final = state
    else:
        final = WindowState._make(None if x is None else x.clone() for x in state)
    if linear is None:
        final = final._replace(recurrent=None)
    elif final.recurrent is None:
        final = final._replace(recurrent=_empty_recurrent(feature_map, key, value))
    output, structure, alive = _arguments(settings, *tensors)
    structure.after = structures.WindowState(*map(address, final))
    if state is not None:
        structure.before = structures.WindowState(*map(address, state))
    function = library().hf_hybrid_window_step if step else library().hf_hybrid_window_forward
    function(ctypes.byref(structure))
    del alive
    return output, final


def _empty_recurrent(feature_map, key, value):
    feature_dim = key.shape[3] if feature_map is None else feature_map.output_dim
    return torch.zeros(key.shape[0], key.shape[2], feature_dim, value.shape[3] + 1, dtype=torch.float32)


def _arguments(settings, query, key, value, valid, weight_q, weight_k, log_weight, output=None):
    """`(output, structure, tensors it points to)`; the last must outlive the call."""
    feature_map, window_size, num_sinks, scale = settings
    if output is None:
        output = query.new_empty(*query.shape[:3], value.shape[3])
    log_weight = None if log_weight is None else log_weight.detach().float().contiguous()
    common, alive = linear_arguments(feature_map, valid, True, query, key, value, None, weight_q, weight_k, output)
    structure = structures.WindowArguments(
        common=common, window=window_size, sinks=num_sinks, score_scale=scale, log_weight=address(log_weight)
    )
    return output, structure, [*alive, log_weight]


class _WindowAttention(torch.autograd.Function):
    """Keeps the inputs and a state per block of tokens; the backward pass makes the weights again."""

    @staticmethod
    def forward(ctx, settings, query, key, value, valid, weight_q, weight_k, log_weight):
        ctx.set_materialize_grads(False)
        tokens, blocks = query.shape[1], None
        recurrent = _empty_recurrent(settings[0], key, value)
        if log_weight is not None:
            blocks = recurrent.new_empty(*recurrent.shape[:2], -(-tokens // structures.BLOCK), *recurrent.shape[2:])
        output, structure, alive = _arguments(settings, query, key, value, valid, weight_q, weight_k, log_weight)
        structure.after.recurrent = address(recurrent)
        structure.common.block_states = address(blocks)
        library().hf_hybrid_window_forward(ctypes.byref(structure))
        del alive
        ctx.settings = settings
        ctx.save_for_backward(query, key, value, valid, weight_q, weight_k, log_weight, blocks)
        return output, recurrent

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output, grad_recurrent):
        query, key, value, valid, weight_q, weight_k, log_weight, blocks = ctx.saved_tensors
        if grad_output is None:
            grad_output = query.new_zeros(*query.shape[:3], value.shape[3])
        grad_output = dense(grad_output)
        grad_recurrent = whole(grad_recurrent)
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
        # per sequence: tasks must not write to the same numbers
        grad_weights = [
            None if w is None else w.new_empty(query.shape[0], *w.shape, dtype=torch.float32)
            for w in (weight_q, weight_k, log_weight)
        ]
        _, structure, alive = _arguments(
            ctx.settings, query, key, value, valid, weight_q, weight_k, log_weight, grad_output
        )
        common = structure.common
        common.block_states, common.grad_output = address(blocks), view(grad_output)
        common.grad_query, common.grad_key, common.grad_value = map(view, grads)
        common.grad_final_state = address(grad_recurrent)
        common.grad_weight_q, common.grad_weight_k, structure.grad_log_weight = map(address, grad_weights)
        library().hf_hybrid_window_backward(ctypes.byref(structure))
        del alive
        summed = [
            None if g is None else g.sum(0).to(w.dtype)
            for g, w in zip(grad_weights, (weight_q, weight_k, log_weight), strict=True)
        ]
        return None, *grads, None, *summed
