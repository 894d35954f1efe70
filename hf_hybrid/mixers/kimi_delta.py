"""`kimi_delta`: the delta rule with one data-dependent decay per key channel."""

import dataclasses

import torch

from ..ops import gated_delta_rule
from .base import register_mixer
from .checks import INITIALIZATIONS
from .gated import GatedConfig, GatedMixer
from .gates import ChannelGates


@dataclasses.dataclass(frozen=True)
class KimiDeltaConfig(GatedConfig):
    """Settings as of [`GatedConfig`]."""

    name = "kimi_delta"


@register_mixer
class KimiDelta(GatedMixer):
    r"""
    $\tilde S_t = \mathrm{diag}(\alpha_t) S_{t-1}$, $S_t = \tilde S_t + \beta_t k_t (v_t - \tilde S_t^\top k_t)^\top$,
    $o_t = K^{-1/2} S_t^\top q_t$ with queries and keys of length 1, $\log \alpha_t = \max(-5, -e^{A}
    \,\mathrm{softplus}(W_2 W_1 x_t + b))$ and $\beta_t = \sigma(w_\beta^\top x_t)$; then the [`OutputStage`].

    Reference: [Kimi Linear](https://huggingface.co/papers/2510.26692), eq. 1 and section 3. Differs: queries, keys and
    values are the softmax layer's own (no short convolution), one state per key-value head by default, the output gate
    starts at 1, and an exact window may stand beside the state.
    """

    config_class = KimiDeltaConfig
    head_layouts = {
        **GatedMixer.head_layouts,
        "gates.decay.down": "r D",
        "gates.decay.up": "(S K) r",
        "gates.decay.bias": "(S K)",
        "gates.beta_weight": "S D",
        "gates.log_rate": "S",
    }
    # log-decays are kept above, as in the paper's own kernels: e^-5 forgets all but 0.7 %
    min_decay = -5.0

    def __init__(self, *, gate_rank, **settings):
        super().__init__(gate_rank=gate_rank, **settings)
        self.gates = ChannelGates(self.hidden_size, self.num_states, self.head_dim, gate_rank)

    def init_weights(self, initialization=INITIALIZATIONS) -> None:
        super().init_weights(initialization)
        self.gates.init_weights()

    def set_half_lives(self, half_lives: torch.Tensor) -> None:
        """Start the decays at one half every `half_lives` tokens, `[H_s]` or `[H_s, K]`."""
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
            min_decay=self.min_decay,
            initial_state=state[0] if state else None,
            output_final_state=True,
            inplace_final_state=inplace_final_state,
        )
        return output, (final,)
