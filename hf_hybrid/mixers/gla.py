"""`gla`: gated linear attention, one data-dependent decay per key channel."""

import dataclasses
import math

import torch
from torch.nn import functional as F

from ..ops import gated_linear_attention
from .base import INITIALIZATIONS, LinearMixer, MixerConfig, check_bool, check_gated, register_mixer
from .gates import LowRank, OutputStage, empty_state, inverse_softplus, masked, spread_half_lives


@dataclasses.dataclass(frozen=True)
class GLAConfig(MixerConfig):
    """
    Args:
        window_size (`int`, *optional*, defaults to 64): Tokens also attended exactly, the current one included; 0 for a purely linear layer.
        num_sink_tokens (`int`, *optional*, defaults to 4): First tokens of the sequence attended exactly for ever; 0 where there is no window.
        output_gate (`bool`, *optional*, defaults to `True`): Whether the layer's input gates the output.
        gate_rank (`int`, *optional*, defaults to 16): Rank of the projections behind decay and output gate.
        state_per_query_head (`bool`, *optional*, defaults to `False`): One state per query head instead of one per key-value head.
    """

    name = "gla"
    window_size: int = 64
    num_sink_tokens: int = 4
    output_gate: bool = True
    gate_rank: int = 16
    state_per_query_head: bool = False

    def __post_init__(self):
        check_gated(self)
        check_bool(self.name, "state_per_query_head", self.state_per_query_head)


@register_mixer
class GLA(LinearMixer):
    r"""
    $S_t = \mathrm{diag}(\alpha_t) S_{t-1} + k_t v_t^\top$, $o_t = K^{-1/2} S_t^\top q_t$ with $\log \alpha_t = \max(-2, \tfrac{1}{16} \log \sigma(W_2 W_1 x_t + b))$; then
    the [`OutputStage`].

    Reference: [GLA](https://huggingface.co/papers/2312.06635), section 4. Differs: queries, keys and values are the softmax layer's own, one
    state per key-value head by default, the output gate is of low rank and starts at 1, and an exact window may stand beside the state.

    State: window (see [`WindowState`]) and `[B, H_s, K, V]` fp32.

    Args:
        window_size, num_sink_tokens, output_gate, gate_rank, state_per_query_head: see [`GLAConfig`].
    """

    config_class = GLAConfig
    temperature = 16.0
    # log-decays are kept above: trained gates stay far from it, and one product per chunk does
    min_decay = -2.0

    def __init__(self, *, window_size, num_sink_tokens, output_gate, gate_rank, state_per_query_head, **sizes):
        super().__init__(**sizes)
        self.window_size = window_size
        self.num_states = self.num_heads if state_per_query_head else self.num_key_value_heads
        self.decay = LowRank(self.hidden_size, gate_rank, self.num_states * self.head_dim)
        self.output_stage = OutputStage(
            self,
            window_size=window_size,
            num_sink_tokens=num_sink_tokens,
            output_gate=output_gate,
            gate_rank=gate_rank,
        )

    def init_weights(self, initialization=INITIALIZATIONS) -> None:
        self.decay.init_weights()
        self.set_half_lives(spread_half_lives((self.num_states, self.head_dim)))
        self.output_stage.init_weights(initialization)

    def set_half_lives(self, half_lives: torch.Tensor) -> None:
        """Start the decays at one half every `half_lives` tokens, `[H_s]` or `[H_s, K]`."""
        rate = math.log(2.0) * self.temperature / half_lives.view(self.num_states, -1).expand(-1, self.head_dim)
        self.decay.set_bias(-inverse_softplus(rate).flatten())

    def scale_output(self, factors) -> None:
        """Multiply the output of the state, per query head, `[H]`."""
        self.output_stage.scale_by(factors)

    def mix(self, query, key, value, hidden_states, *, valid, state, inplace_final_state):
        *window_state, recurrent_state = state if state else (None,)
        parts, recurrent = self.active_parts(), None
        if "state" in parts:
            decay = F.logsigmoid(self.decay(hidden_states)).unflatten(-1, (self.num_states, -1)) / self.temperature
            masked_key, decay = masked(valid, key, decay)
            recurrent, recurrent_state = gated_linear_attention(
                query, masked_key, value, decay=decay, scale=self.head_dim**-0.5, min_decay=self.min_decay,
                initial_state=recurrent_state, output_final_state=True, inplace_final_state=inplace_final_state,
            )  # fmt: skip
        elif recurrent_state is None:
            recurrent_state = empty_state(self, query)
        output, window_state = self.output_stage(
            recurrent, query, key, value, hidden_states, parts=parts, valid=valid, state=tuple(window_state),
            inplace_final_state=inplace_final_state,
        )  # fmt: skip
        return output, (*window_state, recurrent_state)
