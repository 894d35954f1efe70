"""`gated_delta_net`: the delta rule with one data-dependent decay per head."""

import dataclasses

from ..ops import gated_delta_rule
from .base import INITIALIZATIONS, LinearMixer, MixerConfig, check_bool, check_gated, register_mixer
from .delta import HeadGates
from .gates import OutputStage, empty_state


@dataclasses.dataclass(frozen=True)
class GatedDeltaNetConfig(MixerConfig):
    """
    Args:
        window_size (`int`, *optional*, defaults to 64): Tokens also attended exactly, the current one included; 0 for a purely linear layer.
        num_sink_tokens (`int`, *optional*, defaults to 4): First tokens of the sequence attended exactly for ever; 0 where there is no window.
        output_gate (`bool`, *optional*, defaults to `True`): Whether the layer's input gates the output.
        gate_rank (`int`, *optional*, defaults to 16): Rank of the output gate's projection.
        state_per_query_head (`bool`, *optional*, defaults to `False`): One state per query head instead of one per key-value head.
    """

    name = "gated_delta_net"
    window_size: int = 64
    num_sink_tokens: int = 4
    output_gate: bool = True
    gate_rank: int = 16
    state_per_query_head: bool = False

    def __post_init__(self):
        check_gated(self)
        check_bool(self.name, "state_per_query_head", self.state_per_query_head)


@register_mixer
class GatedDeltaNet(LinearMixer):
    r"""
    $\tilde S_t = \alpha_t S_{t-1}$, $S_t = \tilde S_t + \beta_t k_t (v_t - \tilde S_t^\top k_t)^\top$, $o_t = K^{-1/2} S_t^\top q_t$ with queries and keys of
    length 1, $\log \alpha_t = -e^{A} \,\mathrm{softplus}(w_\alpha^\top x_t + b)$ and $\beta_t = \sigma(w_\beta^\top x_t)$; then the [`OutputStage`].

    Reference: [Gated DeltaNet](https://huggingface.co/papers/2412.06464), eq. 10. Differs: queries, keys and values are the softmax layer's own
    (no short convolution), one state per key-value head by default, the output gate is of low rank and starts at 1, and an exact window may
    stand beside the state.

    State: window (see [`WindowState`]) and `[B, H_s, K, V]` fp32.

    Args:
        window_size, num_sink_tokens, output_gate, gate_rank, state_per_query_head: see [`GatedDeltaNetConfig`].
    """

    config_class = GatedDeltaNetConfig

    def __init__(self, *, window_size, num_sink_tokens, output_gate, gate_rank, state_per_query_head, **sizes):
        super().__init__(**sizes)
        self.window_size = window_size
        self.num_states = self.num_heads if state_per_query_head else self.num_key_value_heads
        self.gates = HeadGates(self.hidden_size, self.num_states)
        self.output_stage = OutputStage(
            self,
            window_size=window_size,
            num_sink_tokens=num_sink_tokens,
            output_gate=output_gate,
            gate_rank=gate_rank,
        )

    def init_weights(self, initialization=INITIALIZATIONS) -> None:
        self.gates.init_weights()
        self.output_stage.init_weights(initialization)

    def set_half_lives(self, half_lives) -> None:
        """Start the decays at one half every `half_lives` tokens, `[H_s]`."""
        self.gates.set_half_lives(half_lives)

    def scale_output(self, factors) -> None:
        """Multiply the output of the state, per query head, `[H]`."""
        self.output_stage.scale_by(factors)

    def mix(self, query, key, value, hidden_states, *, valid, state, inplace_final_state):
        *window_state, recurrent_state = state if state else (None,)
        parts, recurrent = self.active_parts(), None
        if "state" in parts:
            decay, beta = self.gates(hidden_states, valid)
            recurrent, recurrent_state = gated_delta_rule(
                query, key, value, decay=decay, beta=beta, scale=self.head_dim**-0.5, qk_l2norm=True,
                initial_state=recurrent_state, output_final_state=True, inplace_final_state=inplace_final_state,
            )  # fmt: skip
        elif recurrent_state is None:
            recurrent_state = empty_state(self, query)
        output, window_state = self.output_stage(
            recurrent, query, key, value, hidden_states, parts=parts, valid=valid, state=tuple(window_state),
            inplace_final_state=inplace_final_state,
        )  # fmt: skip
        return output, (*window_state, recurrent_state)
