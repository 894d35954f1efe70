"""`gla`: gated linear attention, one data-dependent decay per key channel."""

import dataclasses
import math

import torch
from torch.nn import functional as F

from ..ops import gated_linear_attention
from .base import register_mixer
from .checks import INITIALIZATIONS
from .gated import GatedConfig, GatedMixer
from .gates import LowRank, inverse_softplus, masked, spread_half_lives


@dataclasses.dataclass(frozen=True)
class GLAConfig(GatedConfig):
    """Settings as of [`GatedConfig`]."""

    name = "gla"


@register_mixer
class GLA(GatedMixer):
    r"""
    $S_t = \mathrm{diag}(\alpha_t) S_{t-1} + k_t v_t^\top$, $o_t = K^{-1/2} S_t^\top q_t$ with $\log \alpha_t = \max(-2,
    \tfrac{1}{16} \log \sigma(W_2 W_1 x_t + b))$; then the [`OutputStage`].

    Reference: [GLA](https://huggingface.co/papers/2312.06635), section 4. Differs: queries, keys and values are the
    softmax layer's own, one state per key-value head by default, the output gate is of low rank and starts at 1, and an
    exact window may stand beside the state.
    """

    config_class = GLAConfig
    head_layouts = {**GatedMixer.head_layouts, "decay.down": "r D", "decay.up": "(S K) r", "decay.bias": "(S K)"}
    temperature = 16.0
    # log-decays are kept above: trained gates stay far from it, and one product per chunk does
    min_decay = -2.0

    def __init__(self, *, gate_rank, **settings):
        super().__init__(gate_rank=gate_rank, **settings)
        self.decay = LowRank(self.hidden_size, gate_rank, self.num_states * self.head_dim)

    def init_weights(self, initialization=INITIALIZATIONS) -> None:
        super().init_weights(initialization)
        self.decay.init_weights()
        self.set_half_lives(spread_half_lives((self.num_states, self.head_dim)))

    def set_half_lives(self, half_lives: torch.Tensor) -> None:
        """Start the decays at one half every `half_lives` tokens, `[H_s]` or `[H_s, K]`."""
        rate = math.log(2.0) * self.temperature / half_lives.view(self.num_states, -1).expand(-1, self.head_dim)
        self.decay.set_bias(-inverse_softplus(rate).flatten())

    def recur(self, query, key, value, hidden_states, *, valid, state, inplace_final_state):
        decay = F.logsigmoid(self.decay(hidden_states)).unflatten(-1, (self.num_states, -1)) / self.temperature
        key, decay = masked(valid, key, decay)
        output, final = gated_linear_attention(
            query,
            key,
            value,
            decay=decay,
            scale=self.head_dim**-0.5,
            min_decay=self.min_decay,
            initial_state=state[0] if state else None,
            output_final_state=True,
            inplace_final_state=inplace_final_state,
        )
        return output, (final,)
