"""MPT: clipped projections, ALiBi, a mask that is true where nothing is seen."""


def forward(attention, module, hidden_states, position_bias, past_key_values=None, attention_mask=None, **kwargs):
    shape = (*hidden_states.shape[:2], module.n_heads, module.head_dim)
    projected = module.Wqkv(hidden_states)
    if module.clip_qkv:
        projected = projected.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    query, key, value = (x.reshape(shape).transpose(1, 2) for x in projected.chunk(3, dim=-1))
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, module.layer_idx)
    seen = None if attention_mask is None else ~attention_mask.bool()
    output, _ = attention(module, query, key, value, seen, scaling=module.softmax_scale, alibi=position_bias)
    return module.out_proj(output.flatten(2)), None
