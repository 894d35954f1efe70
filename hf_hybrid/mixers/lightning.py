"""`lightning`: linear attention with one fixed decay per head."""

import dataclasses

import torch

from ..ops import gated_linear_attention
from .base import INITIALIZATIONS, LinearMixer, MixerConfig, check_bool, check_gated, register_mixer
from .gates import OutputStage, empty_state, masked


@dataclasses.dataclass(frozen=True)
class LightningConfig(MixerConfig):
    """
    Args:
        window_size (`int`, *optional*, defaults to 64): Tokens also attended exactly, the current one included; 0 for a purely linear layer.
        num_sink_tokens (`int`, *optional*, defaults to 4): First tokens of the sequence attended exactly for ever; 0 where there is no window.
        output_gate (`bool`, *optional*, defaults to `True`): Whether the layer's input gates the output.
        gate_rank (`int`, *optional*, defaults to 16): Rank of the gate's projection.
        state_per_query_head (`bool`, *optional*, defaults to `False`): One state per query head instead of one per key-value head: as many
            times the memory and about the time as there are query heads per key-value head, for as many more decays.
    """

    name = "lightning"
    window_size: int = 64
    num_sink_tokens: int = 4
    output_gate: bool = True
    gate_rank: int = 16
    state_per_query_head: bool = False

    def __post_init__(self):
        check_gated(self)
        check_bool(self.name, "state_per_query_head", self.state_per_query_head)


@register_mixer
class Lightning(LinearMixer):
    r"""
    $S_t = e^{-\lambda_h} S_{t-1} + k_t v_t^\top$, $o_t = K^{-1/2} S_t^\top q_t$ with $\lambda_h = 2^{-8 h / H_s}$ for state $h = 1 \dots H_s$; then the
    [`OutputStage`].

    References: [Lightning Attention-2](https://huggingface.co/papers/2401.04658), eq. 2; slopes as in MiniMax-01 and ALiBi. Differs: one
    state per key-value head by default, and no activation on queries, keys and values, which come from a softmax layer.

    State: window (see [`WindowState`]) and `[B, H_s, K, V]` fp32. No decay is learned.

    Args:
        window_size, num_sink_tokens, output_gate, gate_rank, state_per_query_head: see [`LightningConfig`].
    """

    config_class = LightningConfig

    def __init__(self, *, window_size, num_sink_tokens, output_gate, gate_rank, state_per_query_head, **sizes):
        super().__init__(**sizes)
        self.window_size = window_size
        self.num_states = self.num_heads if state_per_query_head else self.num_key_value_heads
        self.output_stage = OutputStage(
            self,
            window_size=window_size,
            num_sink_tokens=num_sink_tokens,
            output_gate=output_gate,
            gate_rank=gate_rank,
        )

    def init_weights(self, initialization=INITIALIZATIONS) -> None:
        self.output_stage.init_weights(initialization)

    def scale_output(self, factors) -> None:
        """Multiply the output of the state, per query head, `[H]`."""
        self.output_stage.scale_by(factors)

    def mix(self, query, key, value, hidden_states, *, valid, state, inplace_final_state):
        *window_state, recurrent_state = state if state else (None,)
        parts, recurrent = self.active_parts(), None
        if "state" in parts:
            index = torch.arange(1, self.num_states + 1, device=query.device, dtype=torch.float32)
            decay = -torch.exp2(-8.0 * index / self.num_states).to(torch.promote_types(query.dtype, torch.float32))
            decay = decay.expand(*query.shape[:2], -1)
            masked_key, decay = masked(valid, key, decay)
            recurrent, recurrent_state = gated_linear_attention(
                query, masked_key, value, decay=decay, scale=self.head_dim**-0.5, initial_state=recurrent_state,
                output_final_state=True, inplace_final_state=inplace_final_state,
            )  # fmt: skip
        elif recurrent_state is None:
            recurrent_state = empty_state(self, query)
        output, window_state = self.output_stage(
            recurrent, query, key, value, hidden_states, parts=parts, valid=valid, state=tuple(window_state),
            inplace_final_state=inplace_final_state,
        )  # fmt: skip
        return output, (*window_state, recurrent_state)
