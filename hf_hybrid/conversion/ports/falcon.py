"""Falcon: one key-value head or groups of them, rotary embedding or ALiBi."""

from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb


def forward(
    attention,
    module,
    hidden_states,
    alibi,
    attention_mask,
    position_ids=None,
    layer_past=None,
    use_cache=False,
    output_attentions=False,
    position_embeddings=None,
    **kwargs,
):
    query, key, value = (x.transpose(1, 2) for x in module._split_heads(module.query_key_value(hidden_states)))
    if module.new_decoder_architecture:  # the family repeats each key-value head for its queries; mixers take it once
        groups = module.num_heads // module.num_kv_heads
        key, value = key[:, ::groups], value[:, ::groups]
    if alibi is None:
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    output, _ = attention(module, query, key, value, attention_mask, scaling=module.inv_norm_factor, alibi=alibi)
    return module.dense(output.flatten(2)), None
