"""`lightning`: linear attention with one fixed decay per head."""

import dataclasses

import torch

from ..ops import gated_linear_attention
from .base import register_mixer
from .gated import GatedConfig, GatedMixer
from .gates import masked
from .heads import query_heads


@dataclasses.dataclass(frozen=True)
class LightningConfig(GatedConfig):
    """Settings as of [`GatedConfig`]."""

    name = "lightning"


@register_mixer
class Lightning(GatedMixer):
    r"""
    $S_t = e^{-\lambda_h} S_{t-1} + k_t v_t^\top$, $o_t = K^{-1/2} S_t^\top q_t$ with $\lambda_h = 2^{-8 h / H_s}$ for
    state $h = 1 \dots H_s$; then the [`OutputStage`].

    References: [Lightning Attention-2](https://huggingface.co/papers/2401.04658), eq. 2; slopes as in MiniMax-01 and
    ALiBi. Differs: one state per key-value head by default, and no activation on queries, keys and values, which come
    from a softmax layer. No decay is learned.
    """

    config_class = LightningConfig

    def recur(self, query, key, value, hidden_states, *, valid, state, inplace_final_state):
        wide = torch.promote_types(query.dtype, torch.float32)
        # the place of each state among all of the layer's, of which this mixer may serve some only
        places = query_heads(self.heads, self.groups) if self.state_per_query_head else list(self.heads)
        total = self.layer_sizes["num_heads" if self.state_per_query_head else "num_key_value_heads"]
        if len(places) == total:
            index = torch.arange(1, total + 1, device=query.device, dtype=wide)
        else:
            index = torch.tensor(places, device=query.device, dtype=wide) + 1
        decay = -torch.exp2(-8.0 * index / total)
        key, decay = masked(valid, key, decay.expand(*query.shape[:2], -1))
        output, final = gated_linear_attention(
            query,
            key,
            value,
            decay=decay,
            scale=self.head_dim**-0.5,
            initial_state=state[0] if state else None,
            output_final_state=True,
            inplace_final_state=inplace_final_state,
        )
        return output, (final,)
