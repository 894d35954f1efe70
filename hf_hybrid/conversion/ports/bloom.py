"""BLOOM: queries, keys and values in one projection, ALiBi."""

from transformers.models.bloom.modeling_bloom import dropout_add


def forward(
    attention,
    module,
    hidden_states,
    residual,
    alibi,
    attention_mask,
    layer_past=None,
    use_cache=False,
    output_attentions=False,
    **kwargs,
):
    query, key, value = module._reshape(module.query_key_value(hidden_states))
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    output, _ = attention(module, query, key, value, attention_mask, scaling=module.inv_norm_factor, alibi=alibi)
    output = module.dense(output.flatten(2))
    return dropout_add(output, residual, module.hidden_dropout, module.training), None
