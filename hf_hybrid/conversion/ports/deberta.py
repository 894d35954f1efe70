"""
DeBERTa: as v2, with one projection whose outputs are laid out per head. Heads that talk to each other are refused.
"""

from ...errors import UnsupportedModelError


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
    if module.talking_head:
        raise UnsupportedModelError(
            "DeBERTa with talking_head=True mixes the scores of its heads, which linear attention does not have. Use a "
            "checkpoint without."
        )
    if query_states is not None:
        raise UnsupportedModelError("DeBERTa: linear layers take queries from the layer's own input; got query_states.")
    query, key, value = module.transpose_for_scores(module.in_proj(hidden_states)).chunk(3, dim=-1)
    query = query + module.transpose_for_scores(module.q_bias[None, None, :])
    value = value + module.transpose_for_scores(module.v_bias[None, None, :])
    output, _ = attention(
        module,
        query,
        key,
        value,
        attention_mask.bool(),
        is_causal=False,
        scaling=(query.shape[-1] * (1 + len(module.pos_att_type))) ** -0.5,
        rel_embeddings=rel_embeddings if module.relative_attention else None,
    )
    return output.flatten(2), None
