"""
DeBERTa v2 and v3: scores of content and content, content and position, position and content. A linear layer keeps the
first.
"""


def forward(
    attention,
    module,
    hidden_states,
    attention_mask,
    output_attentions=False,
    query_states=None,
    relative_pos=None,
    rel_embeddings=None,
):
    shape = (*hidden_states.shape[:-1], module.num_attention_heads, -1)
    query = module.query_proj(hidden_states if query_states is None else query_states)
    query, key, value = (
        x.view(shape).transpose(1, 2) for x in (query, module.key_proj(hidden_states), module.value_proj(hidden_states))
    )
    terms = 1 + len({"c2p", "p2c"} & set(module.pos_att_type))
    output, _ = attention(
        module,
        query,
        key,
        value,
        attention_mask.bool(),
        scaling=(query.shape[-1] * terms) ** -0.5,
        is_causal=False,
        rel_embeddings=rel_embeddings if module.relative_attention else None,
    )
    return output.flatten(2), None
