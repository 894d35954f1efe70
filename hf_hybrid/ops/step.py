"""One-token forms for decoding: no chunks, no padding, nothing that depends on how many tokens came before."""

import torch


def step_linear_attention(query, key, value, *, initial_state=None, output_final_state=False, normalize=True):
    """[`naive_linear_attention`] for `T = 1`: same arguments, shapes and results."""
    wide = torch.promote_types(query.dtype, torch.float32)
    num_kv_heads = key.shape[2]
    column = torch.nn.functional.pad(value[:, 0].to(wide), (0, 1), value=1.0)  # [B, H_kv, V + 1]
    state = key[:, 0].to(wide).unsqueeze(-1) * column.unsqueeze(-2)
    if initial_state is not None:
        state = state + initial_state
    output = torch.matmul(query[:, 0].to(wide).unflatten(1, (num_kv_heads, -1)), state).flatten(1, 2).unsqueeze(1)
    if normalize:
        output = output[..., :-1] / output[..., -1:].clamp_min(1e-30)
    return output.to(query.dtype), (state if output_final_state else None)


def step_sliding_window(query, key, value, *, valid, sink_key, sink_value, sink_position, window_size, scale):
    """[`naive_sliding_window`] for `T = 1`: same arguments, shapes and results."""
    wide = torch.promote_types(query.dtype, torch.float32)
    rows = query[:, 0].to(wide).unflatten(1, (key.shape[2], -1)) * scale  # [B, H_kv, G, K]
    keys = torch.cat([sink_key, key[:, 1:]], dim=1).to(wide).transpose(1, 2)  # [B, H_kv, S + W, K]
    values = torch.cat([sink_value, value[:, 1:]], dim=1).to(wide).transpose(1, 2)
    seen = torch.cat([sink_position <= 0, valid[:, 1:]], dim=1)[:, None, None]
    scores = torch.matmul(rows, keys.transpose(-1, -2)).masked_fill(~seen, float("-inf"))
    row_max = scores.amax(-1, keepdim=True)
    weights = (scores - row_max.masked_fill(row_max.isinf(), 0.0)).exp()
    numerator = torch.matmul(weights, values).flatten(1, 2).unsqueeze(1)
    return numerator, weights.sum(-1, keepdim=True).flatten(1, 2).unsqueeze(1)
