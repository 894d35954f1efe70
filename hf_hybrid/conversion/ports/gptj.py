"""GPT-J: rotary embedding of the first dimensions, interleaved."""

import torch
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb


def forward(attention, module, hidden_states, layer_past=None, attention_mask=None, position_ids=None, **kwargs):
    shape = (*hidden_states.shape[:-1], module.num_attention_heads, module.head_dim)
    query, key, value = (
        projection(hidden_states).view(shape) for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    places = module._get_embed_positions(position_ids)
    places = torch.gather(places, 1, position_ids.unsqueeze(-1).repeat(1, 1, places.shape[-1])).to(key.dtype)
    sin, cos = places.chunk(2, dim=-1)
    turned = module.rotary_dim or module.head_dim
    query, key = (
        torch.cat([apply_rotary_pos_emb(x[..., :turned], sin, cos), x[..., turned:]], dim=-1) for x in (query, key)
    )
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    output, _ = attention(module, query, key, value, attention_mask, scaling=1.0 / module.scale_attn)
    return module.resid_dropout(module.out_proj(output.flatten(2))), None
