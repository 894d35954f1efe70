"""Windows, sinks and a memory of exact keys through the kernels."""

import ctypes

import torch

from ..naive_memory import MemoryState, empty_memory_state
from . import arguments as structures
from .arguments import address, dense, view, whole
from .build import library
from .eligible import DTYPES


def memory_attention(query, key, value, *, scale, valid=None, state=None, inplace_final_state=False, **sizes):
    """[`naive_memory.naive_memory_attention`] without a linear part. Gradients only without a `state`."""
    settings = (scale, *(sizes[n] for n in ("window_size", "num_sinks", "num_memory_tokens", "memory_block_size")))
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        output, key_sum, seen, chosen = _MemoryAttention.apply(settings, query, key, value, valid)
        index, held = _places(settings, valid, seen, chosen, key.shape[1])
        # out of the inputs, so that gradients of what goes on from here reach them
        kept = (_at(x.transpose(1, 2), index) * held[..., None].to(x.dtype) for x in (key, value))
        return output, MemoryState(*kept, key_sum, seen, None)
    if state is not None:
        dtypes = (key.dtype, value.dtype, torch.float64, torch.int64)
        state = MemoryState(*(x.to(d).contiguous() for x, d in zip(state[:4], dtypes, strict=True)), None)
    is_step = query.shape[1] == 1 and state is not None
    if not is_step:
        final = empty_memory_state(key, value, **sizes)
    else:
        final = state if inplace_final_state else MemoryState(*(x.clone() for x in state[:4]), None)
    output, structure, alive = _arguments(settings, query, key, value, valid)
    structure.after = structures.MemoryState(*map(address, final[:4]))
    if state is not None:
        structure.before = structures.MemoryState(*map(address, state[:4]))
    function = library().hf_hybrid_memory_step if is_step else library().hf_hybrid_memory_forward
    function(ctypes.byref(structure))
    del alive
    return output, final


def _arguments(settings, query, key, value, valid):
    """`(output, structure, tensors it points to)`; the last must outlive the call."""
    scale, window, sinks, memory, block = settings
    query, key, value, valid = dense(query), dense(key), dense(value), whole(valid)
    batch, tokens, heads, key_dim = query.shape
    make = query.new_empty if valid is None else query.new_zeros  # outputs of padding are zeros
    output = make(batch, tokens, heads, value.shape[3])
    structure = structures.MemoryArguments(
        batch,
        tokens,
        heads,
        key.shape[2],
        key_dim,
        value.shape[3],
        window,
        sinks,
        memory,
        block,
        DTYPES[query.dtype],
        torch.get_num_threads(),
        scale,
        view(query),
        view(key),
        view(value),
        view(output),
        address(valid),
    )
    return output, structure, [query, key, value, valid, output]


def _places(settings, valid, seen, chosen, tokens: int):
    """
    Where in the call each place of the final state comes from, int `[B, H_kv, S + M + W + C]`, and whether it is
    filled; of whole sequences.
    """
    _, window, sinks, memory, block = settings
    batch, heads = chosen.shape[:2]
    ring, count = window + block, seen[:, None]
    last = (count - 1).clamp_min(0) // block
    in_memory = chosen.gather(2, last[:, None, :, None].expand(-1, heads, 1, memory))[:, :, 0].long()  # [B, H_kv, M]
    # by position, as the state has them: places that are not filled come last
    in_memory = torch.where(in_memory < 0, tokens, in_memory).sort(-1).values
    filled = (last * block - window - sinks).clamp(0, memory)
    slot = torch.arange(ring)
    latest = count - 1 - (count - 1 - slot) % ring
    places = torch.cat(
        [
            torch.arange(sinks).expand(batch, heads, -1),
            in_memory,
            latest[:, None].expand(-1, heads, -1),
        ],
        dim=2,
    )
    held = torch.cat([torch.arange(sinks) < count, torch.arange(memory) < filled, latest >= 0], dim=1)
    if valid is not None:  # ranks among the tokens that exist
        order = (~valid).int().argsort(dim=1, stable=True)
        places = order[:, None].expand(-1, heads, -1).gather(2, places.clamp(0, tokens - 1))
    return places.clamp(0, tokens - 1), held[:, None].expand(-1, heads, -1)


def _at(x, index):
    """`x[b, h, index[b, h, :]]`: `[B, H, T, K]` -> `[B, H, P, K]`."""
    return x.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))


class _MemoryAttention(torch.autograd.Function):
    """Keeps the inputs and what the memory held while each block ran; the backward pass makes the weights again."""

    @staticmethod
    def forward(ctx, settings, query, key, value, valid):
        _, window, sinks, memory, block = settings
        final = empty_memory_state(
            key, value, window_size=window, num_sinks=sinks, num_memory_tokens=memory, memory_block_size=block
        )
        batch, tokens, num_kv_heads = key.shape[:3]
        chosen = torch.empty(batch, num_kv_heads, -(-tokens // block), memory, dtype=torch.int32)
        output, structure, alive = _arguments(settings, query, key, value, valid)
        structure.after = structures.MemoryState(*map(address, final[:4]))
        structure.chosen = address(chosen)
        library().hf_hybrid_memory_forward(ctypes.byref(structure))
        del alive
        ctx.settings = settings
        ctx.save_for_backward(query, key, value, valid, chosen)
        ctx.mark_non_differentiable(final.key_sum, final.seen, chosen)
        return output, final.key_sum, final.seen, chosen

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output, *_):
        query, key, value, valid, chosen = ctx.saved_tensors
        grad_output = dense(grad_output)
        make = torch.empty_like if valid is None else torch.zeros_like
        grads = [make(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
        _, structure, alive = _arguments(ctx.settings, query, key, value, valid)
        structure.chosen, structure.grad_output = address(chosen), view(grad_output)
        structure.grad_query, structure.grad_key, structure.grad_value = map(view, grads)
        library().hf_hybrid_memory_backward(ctypes.byref(structure))
        del alive
        return None, *grads, None
