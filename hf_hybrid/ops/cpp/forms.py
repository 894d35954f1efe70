"""The ops through the compiled kernels: same signatures and results as `naive`, fp32 and bf16 on a CPU.

A kernel reads tensors where they lie, computes in fp32 a chunk at a time, and writes outputs and states; here its arguments are put together.
"""

import ctypes
import functools

import torch

from ..naive import LinearPart, WindowState, empty_window_state
from . import arguments as structures
from .arguments import address, view
from .build import library


DTYPES = {torch.float32: 0, torch.bfloat16: 1}
# `compiled` of a feature map names one of these; numbers as in feature_maps.h
MAPS = {None: 0, "relu": 1, "elu": 2, "softmax": 3, "hedgehog": 4, "dpfp": 5, "taylor": 6}


def can_run(query, key, value, *others, feature_maps=(None, None)) -> bool:
    """Whether the kernels take these inputs: plain fp32 or bf16 CPU tensors (`None` is skipped), nobody tracing, and maps they know."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    dtype = query.dtype
    if dtype not in DTYPES or key.dtype != dtype or value.dtype != dtype:
        return False
    for x in (query, key, value, *others):
        if x is not None and (type(x) not in PLAIN or not x.is_cpu or x.dtype not in READABLE):
            return False
    map_q, map_k = feature_maps
    if map_q is None and map_k is None:
        return True
    # what a subclass computes is its own business
    if type(map_q) is not type(map_k) or not type(map_k).__dict__.get("compiled"):
        return False
    return all(type(w) in PLAIN and w.is_cpu and w.dtype in DTYPES for f in feature_maps for w in f.weights())


PLAIN = (torch.Tensor, torch.nn.Parameter)
READABLE = (torch.float32, torch.bfloat16, torch.bool, torch.int64)


def linear_attention(
    query, key, value, *, feature_map_q=None, feature_map_k=None, valid=None, initial_state=None, output_final_state=False,
    normalize=True, inplace_final_state=False,
):  # fmt: skip
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


def _dense(x):
    """Last axis dense, as a kernel reads it."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _linear_arguments(feature_map, valid, normalize, query, key, value, state, weight_q, weight_k, output):
    """The structure, and the tensors it points to: they must outlive the call."""
    batch, tokens, heads, key_dim = query.shape
    query, key, value = _dense(query), _dense(key), _dense(value)
    keep = [query, key, value, output, _whole(valid), _whole(state), _whole(weight_q), _whole(weight_k)]
    feature_dim, projected, kind = key_dim, key_dim, 0
    if feature_map is not None:
        kind, feature_dim = MAPS[feature_map.compiled], feature_map.output_dim
        projected = key_dim if weight_k is None else weight_k.shape[-1]
    structure = structures.LinearArguments(
        batch=batch, tokens=tokens, heads=heads, kv_heads=key.shape[2], key_dim=key_dim, value_dim=value.shape[3], feature_dim=feature_dim,
        projected_dim=projected, map=kind, dtype=DTYPES[query.dtype], weight_dtype=0 if weight_k is None else DTYPES[weight_k.dtype],
        threads=torch.get_num_threads(), normalize=normalize, scale=key_dim**-0.25,
        query=view(query), key=view(key), value=view(value), output=view(output),
        valid=address(keep[4]), initial_state=address(keep[5]), weight_q=address(keep[6]), weight_k=address(keep[7]),
    )  # fmt: skip
    return structure, keep


def _whole(x):
    return None if x is None else x.contiguous()


def _linear_forward(
    feature_map, valid, normalize, query, key, value, state, weight_q, weight_k, output_final_state, keep=False
):
    """`(output, final state, denominators, states before the blocks)`; the last two for the backward pass, with `keep`."""
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
    denominators = query.new_empty(batch, tokens, heads, dtype=torch.float32) if keep and normalize else None
    num_blocks = -(-tokens // structures.BLOCK)
    block_states = (
        query.new_empty(batch, num_kv_heads, num_blocks, feature_dim, value_dim + 1, dtype=torch.float32)
        if keep
        else None
    )
    structure, alive = _linear_arguments(
        feature_map, valid, normalize, query, key, value, state, weight_q, weight_k, output
    )
    structure.final_state, structure.denominators, structure.block_states = map(
        address, (final, denominators, block_states)
    )
    library().hf_hybrid_linear_forward(ctypes.byref(structure))
    del alive
    return output, final, denominators, block_states


class _LinearAttention(torch.autograd.Function):
    """Nothing is kept but the inputs, the output and its denominators; the backward pass makes features, scores and states again."""

    @staticmethod
    def forward(ctx, feature_map, valid, normalize, query, key, value, state, weight_q, weight_k):
        ctx.set_materialize_grads(False)
        output, final, denominators, block_states = _linear_forward(
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
        ctx.save_for_backward(query, key, value, state, weight_q, weight_k, valid, output, denominators, block_states)
        return output, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output, grad_state):
        query, key, value, state, weight_q, weight_k, valid, output, denominators, block_states = ctx.saved_tensors
        grad_output = torch.zeros_like(output) if grad_output is None else _dense(grad_output)
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
        structure, alive = _linear_arguments(
            ctx.feature_map, valid, ctx.normalize, query, key, value, wide_state, weight_q, weight_k, output
        )
        grad_state = None if grad_state is None else grad_state.contiguous()
        structure.denominators, structure.block_states, structure.grad_output = (
            address(denominators),
            address(block_states),
            view(grad_output),
        )
        structure.grad_query, structure.grad_key, structure.grad_value = map(view, grads)
        structure.grad_final_state, structure.grad_initial_state = address(grad_state), address(grad_first)
        structure.grad_weight_q, structure.grad_weight_k = map(address, grad_weights)
        library().hf_hybrid_linear_backward(ctypes.byref(structure))
        del alive
        if grad_first is not None:
            grad_first = grad_first.to(state.dtype)
        sums = [
            None if g is None else g.sum(0).to(w.dtype)
            for g, w in zip(grad_weights, (weight_q, weight_k), strict=True)
        ]
        return None, None, None, *grads, grad_first, *sums


def bidirectional_linear_attention(query, key, value, *, feature_map_q=None, feature_map_k=None, valid=None):
    """[`naive.naive_bidirectional_linear_attention`]. No gradients."""
    weight_q, weight_k = (
        None if f is None or not (w := f.weights()) else w[0] for f in (feature_map_q, feature_map_k)
    )
    output = query.new_empty(*query.shape[:3], value.shape[3])
    structure, alive = _linear_arguments(
        feature_map_k, valid, True, query, key, value, None, weight_q, weight_k, output
    )
    library().hf_hybrid_bidirectional_forward(ctypes.byref(structure))
    del alive
    return output


@functools.lru_cache(maxsize=64)
def _linear_step_structure(
    batch, heads, num_kv_heads, key_dim, value_dim, feature_dim, projected, kind, dtype, weight_dtype, normalize
):
    structure = structures.LinearStep(
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
        batch, heads, num_kv_heads, key_dim, value_dim, feature_dim, weight_k.shape[-1] if has_weight else key_dim, kind, DTYPES[query.dtype],
        DTYPES[weight_k.dtype] if has_weight else 0, normalize,
    )  # fmt: skip
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
        structure, query.data_ptr(), key.data_ptr(), value.data_ptr(), address(valid), address(weight_q), address(weight_k), address(state),
        new_state.data_ptr(), output.data_ptr(),
    )  # fmt: skip
    return output, (new_state if output_final_state else None)


def gated(
    query, key, value, *, decay, scale, beta=None, qk_l2norm=False, min_decay=None, initial_state=None, output_final_state=False,
    inplace_final_state=False,
):  # fmt: skip
    """[`naive.naive_gated_linear_attention`], and with `beta` [`naive.naive_gated_delta_rule`]. No gradients."""
    batch, tokens, heads, key_dim = query.shape
    num_kv_heads, value_dim = value.shape[2:]
    num_states, per_channel = decay.shape[2], decay.ndim == 4
    decay, beta = decay.float(), None if beta is None else beta.float()
    state = None if initial_state is None else initial_state.float().contiguous()
    floor = -3e38 if min_decay is None else min_decay
    output = query.new_empty(batch, tokens, heads, value_dim)
    if tokens == 1:
        structure = _gated_step_structure(
            batch,
            heads,
            num_kv_heads,
            num_states,
            key_dim,
            value_dim,
            DTYPES[query.dtype],
            per_channel,
            qk_l2norm,
            scale,
            floor,
        )
        query, key, value, decay = query.contiguous(), key.contiguous(), value.contiguous(), decay.contiguous()
        beta = _whole(beta)
        if state is None:
            final = query.new_empty(batch, num_states, key_dim, value_dim, dtype=torch.float32)
        else:
            final = state if inplace_final_state else torch.empty_like(state)
        library().hf_hybrid_gated_step(
            structure, query.data_ptr(), key.data_ptr(), value.data_ptr(), decay.data_ptr(), address(beta), address(state), final.data_ptr(),
            output.data_ptr(),
        )  # fmt: skip
        return output, (final if output_final_state else None)
    final = query.new_empty(batch, num_states, key_dim, value_dim, dtype=torch.float32) if output_final_state else None
    query, key, value = _dense(query), _dense(key), _dense(value)
    decay = _dense(decay) if per_channel else decay
    structure = structures.GatedArguments(
        batch=batch, tokens=tokens, heads=heads, kv_heads=num_kv_heads, state_heads=num_states, key_dim=key_dim, value_dim=value_dim,
        dtype=DTYPES[query.dtype], threads=torch.get_num_threads(), per_channel=per_channel, l2norm=qk_l2norm, scale=scale, min_decay=floor,
        query=view(query), key=view(key), value=view(value), output=view(output), decay=view(decay),
        initial_state=address(state), final_state=address(final),
    )  # fmt: skip
    if beta is not None:
        structure.beta = view(beta)
    library().hf_hybrid_gated_forward(ctypes.byref(structure))
    return output, final


@functools.lru_cache(maxsize=64)
def _gated_step_structure(*fields):
    return ctypes.byref(structures.GatedStep(*fields))


def window_attention(
    query, key, value, *, window_size, num_sinks, scale, linear: LinearPart | None = None, valid=None, state: WindowState | None = None,
    inplace_final_state=False,
):  # fmt: skip
    """[`naive.naive_window_attention`]. No gradients."""
    batch, tokens, heads, _ = query.shape
    feature_map, weight_q, weight_k, log_weight = None, None, None, None
    if linear is not None:
        feature_map = linear.feature_map_k
        weight_q, weight_k = (
            w[0] if (w := f.weights()) else None for f in (linear.feature_map_q, linear.feature_map_k)
        )
        log_weight = linear.log_weight.detach().float().contiguous()
    output = query.new_empty(batch, tokens, heads, value.shape[3])
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
        feature_dim = key.shape[3] if feature_map is None else feature_map.output_dim
        recurrent = torch.zeros(batch, key.shape[2], feature_dim, value.shape[3] + 1, dtype=torch.float32)
        final = final._replace(recurrent=recurrent)
    common, alive = _linear_arguments(feature_map, valid, True, query, key, value, None, weight_q, weight_k, output)
    structure = structures.WindowArguments(
        common=common, window=window_size, sinks=num_sinks, score_scale=scale, log_weight=address(log_weight),
        after=structures.WindowState(*map(address, final)),
    )  # fmt: skip
    if state is not None:
        structure.before = structures.WindowState(*map(address, state))
    function = library().hf_hybrid_window_step if step else library().hf_hybrid_window_forward
    function(ctypes.byref(structure))
    del alive
    return output, final
