"""Windows, sinks and what is older through the kernels."""

import ctypes

import torch

from ..naive import LinearPart, WindowState, empty_window_state
from . import arguments as structures
from .arguments import address
from .build import library
from .linear import linear_arguments


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
    common, alive = linear_arguments(feature_map, valid, True, query, key, value, None, weight_q, weight_k, output)
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
