"""MPNet: BERT with a relative position bias that all layers share."""


def forward(
    attention, module, hidden_states, attention_mask=None, position_bias=None, output_attentions=False, **kwargs
):
    shape = (*hidden_states.shape[:-1], -1, module.attention_head_size)
    query, key, value = (
        projection(hidden_states).view(shape).transpose(1, 2) for projection in (module.q, module.k, module.v)
    )
    output, _ = attention(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=module.attention_head_size**-0.5,
        is_causal=False,
        position_bias=position_bias,
    )
    output = module.o(output.flatten(2))
    return (output, None) if output_attentions else (output,)
