"""`gated_delta_net`: the delta rule with one data-dependent decay per head."""

import dataclasses

import torch

from ..ops import gated_delta_rule
from .base import register_mixer
from .checks import INITIALIZATIONS
from .gated import GatedConfig, GatedMixer
from .gates import HeadGates


@dataclasses.dataclass(frozen=True)
class GatedDeltaNetConfig(GatedConfig):
    """Settings as of [`GatedConfig`]."""

    name = "gated_delta_net"


@register_mixer
class GatedDeltaNet(GatedMixer):
    r"""
    $\tilde S_t = \alpha_t S_{t-1}$, $S_t = \tilde S_t + \beta_t k_t (v_t - \tilde S_t^\top k_t)^\top$, $o_t = K^{-1/2}
    S_t^\top q_t$ with queries and keys of length 1, $\log \alpha_t = -e^{A} \,\mathrm{softplus}(w_\alpha^\top x_t + b)$
    and $\beta_t = \sigma(w_\beta^\top x_t)$; then the [`OutputStage`].

    Reference: [Gated DeltaNet](https://huggingface.co/papers/2412.06464), eq. 10. Differs: queries, keys and values are
    the softmax layer's own (no short convolution), one state per key-value head by default, the output gate is of low
    rank and starts at 1, and an exact window may stand beside the state.
    """

    config_class = GatedDeltaNetConfig
    head_layouts = {
        **GatedMixer.head_layouts,
        "gates.decay_weight": "S D",
        "gates.beta_weight": "S D",
        "gates.log_rate": "S",
        "gates.decay_bias": "S",
    }

    def __init__(self, **settings):
        super().__init__(**settings)
        self.gates = HeadGates(self.hidden_size, self.num_states)

    def init_weights(self, initialization=INITIALIZATIONS) -> None:
        super().init_weights(initialization)
        self.gates.init_weights()

    def set_half_lives(self, half_lives: torch.Tensor) -> None:
        """Start the decays at one half every `half_lives` tokens, `[H_s]`."""
        self.gates.set_half_lives(half_lives)

    def recur(self, query, key, value, hidden_states, *, valid, state, inplace_final_state):
        decay, beta = self.gates(hidden_states, valid)
        output, final = gated_delta_rule(
            query,
            key,
            value,
            decay=decay,
            beta=beta,
            scale=self.head_dim**-0.5,
            qk_l2norm=True,
            initial_state=state[0] if state else None,
            output_final_state=True,
            inplace_final_state=inplace_final_state,
        )
        return output, (final,)
