"""`jet_block`: Gated DeltaNet with a dynamic convolution on the values."""

import dataclasses

import torch
from torch import nn
from torch.nn import functional as F

from ..ops import gated_delta_rule
from .base import INITIALIZATIONS, LinearMixer, MixerConfig, check_bool, check_gated, check_int, register_mixer
from .delta import HeadGates
from .gates import OutputStage, empty_state, masked


@dataclasses.dataclass(frozen=True)
class JetBlockConfig(MixerConfig):
    """
    Args:
        window_size (`int`, *optional*, defaults to 64): Tokens also attended exactly, the current one included; 0 for a purely linear layer.
        num_sink_tokens (`int`, *optional*, defaults to 4): First tokens of the sequence attended exactly for ever; 0 where there is no window.
        output_gate (`bool`, *optional*, defaults to `True`): Whether the layer's input gates the output.
        gate_rank (`int`, *optional*, defaults to 16): Rank of the output gate's projection.
        state_per_query_head (`bool`, *optional*, defaults to `False`): One state per query head instead of one per key-value head.
        kernel_size (`int`, *optional*, defaults to 4): Tokens under the convolution, the current one included.
    """

    name = "jet_block"
    window_size: int = 64
    num_sink_tokens: int = 4
    output_gate: bool = True
    gate_rank: int = 16
    state_per_query_head: bool = False
    kernel_size: int = 4

    def __post_init__(self):
        check_gated(self)
        check_bool(self.name, "state_per_query_head", self.state_per_query_head)
        check_int(self.name, "kernel_size", self.kernel_size, 2)


@register_mixer
class JetBlock(LinearMixer):
    r"""
    [`GatedDeltaNet`] over values mixed with their predecessors: $\hat v_t = \sum_{i=0}^{w-1} c_{t,i} \odot v_{t-i}$ with kernels made from the
    layer's input, $c_t = c^0 + W_2\, \mathrm{SiLU}(W_1 x_t)$, one per value channel.

    Reference: [Jet-Nemotron](https://huggingface.co/papers/2508.15884), section 3.4. Differs: the kernel starts as the identity and there is no
    activation after it, so that a fresh layer passes the pretrained values through; otherwise as [`GatedDeltaNet`].

    State: window (see [`WindowState`]), the last `kernel_size - 1` values `[B, w - 1, H_kv, V]`, and `[B, H_s, K, V]` fp32.

    Args:
        window_size, num_sink_tokens, output_gate, gate_rank, state_per_query_head, kernel_size: see [`JetBlockConfig`].
    """

    config_class = JetBlockConfig

    def __init__(
        self, *, window_size, num_sink_tokens, output_gate, gate_rank, state_per_query_head, kernel_size, **sizes
    ):
        super().__init__(**sizes)
        self.window_size = window_size
        self.num_states = self.num_heads if state_per_query_head else self.num_key_value_heads
        self.gates = HeadGates(self.hidden_size, self.num_states)
        self.convolution = DynamicConvolution(self, kernel_size)
        self.output_stage = OutputStage(
            self,
            window_size=window_size,
            num_sink_tokens=num_sink_tokens,
            output_gate=output_gate,
            gate_rank=gate_rank,
        )

    def init_weights(self, initialization=INITIALIZATIONS) -> None:
        self.gates.init_weights()
        self.convolution.init_weights()
        self.output_stage.init_weights(initialization)

    def set_half_lives(self, half_lives) -> None:
        """Start the decays at one half every `half_lives` tokens, `[H_s]`."""
        self.gates.set_half_lives(half_lives)

    def scale_output(self, factors) -> None:
        """Multiply the output of the state, per query head, `[H]`."""
        self.output_stage.scale_by(factors)

    def mix(self, query, key, value, hidden_states, *, valid, state, inplace_final_state):
        *window_state, past_values, recurrent_state = state if state else (None, None)
        parts, recurrent = self.active_parts(), None
        if "state" in parts:
            decay, beta = self.gates(hidden_states, valid)
            mixed_value, past_values = self.convolution(value, hidden_states, valid, past_values)
            recurrent, recurrent_state = gated_delta_rule(
                query, key, mixed_value, decay=decay, beta=beta, scale=self.head_dim**-0.5, qk_l2norm=True,
                initial_state=recurrent_state, output_final_state=True, inplace_final_state=inplace_final_state,
            )  # fmt: skip
        elif recurrent_state is None:
            recurrent_state, past_values = empty_state(self, query), self.convolution.empty_past(value)
        output, window_state = self.output_stage(
            recurrent, query, key, value, hidden_states, parts=parts, valid=valid, state=tuple(window_state),
            inplace_final_state=inplace_final_state,
        )  # fmt: skip
        return output, (*window_state, past_values, recurrent_state)


class DynamicConvolution(nn.Module):
    """
    Causal depthwise convolution along the tokens, with kernels generated per token.

    Args:
        mixer (`LinearMixer`): Sizes are read from it.
        kernel_size (`int`): `w`.
    """

    # the generator's hidden layer is this much smaller than its input, as in the paper
    reduction = 8

    def __init__(self, mixer, kernel_size: int):
        super().__init__()
        self.kernel_size, self.shape = kernel_size, (mixer.num_key_value_heads, mixer.value_dim)
        rank = max(1, mixer.hidden_size // self.reduction)
        self.down = nn.Parameter(torch.empty(rank, mixer.hidden_size))
        self.up = nn.Parameter(torch.empty(kernel_size * mixer.num_key_value_heads * mixer.value_dim, rank))
        self.bias = nn.Parameter(torch.empty(kernel_size, mixer.num_key_value_heads, mixer.value_dim))

    def init_weights(self) -> None:
        with torch.no_grad():
            nn.init.normal_(self.down, std=self.down.shape[1] ** -0.5)
            nn.init.normal_(self.up, std=0.01 * self.up.shape[1] ** -0.5)
            self.bias.zero_()
            self.bias[0] = 1.0  # tap 0 is the current token

    def empty_past(self, value):
        return value.new_zeros(value.shape[0], self.kernel_size - 1, *self.shape)

    def forward(self, value, hidden_states, valid, past):
        """
        Args:
            value (`torch.Tensor`): `[B, T, H_kv, V]`.
            hidden_states (`torch.Tensor`): `[B, T, D]`.
            valid (`torch.Tensor`, *optional*): bool `[B, T]`; tokens that do not exist count as zeros.
            past (`torch.Tensor`, *optional*): The `kernel_size - 1` values before, `[B, w - 1, H_kv, V]`.

        Returns:
            `(mixed value, past)`: both in the value's dtype, the second for the next call.
        """
        (value,) = masked(valid, value)
        if past is None:
            past = self.empty_past(value)
        length = value.shape[1]
        padded = torch.cat([past.to(value.dtype), value], dim=1)
        generated = F.linear(F.silu(F.linear(hidden_states.to(self.down.dtype), self.down)), self.up)
        kernels = generated.unflatten(-1, (self.kernel_size, *self.shape)) + self.bias  # [B, T, w, H_kv, V]
        kernels = kernels.to(value.dtype)
        mixed = sum(
            kernels[:, :, i] * padded[:, self.kernel_size - 1 - i : self.kernel_size - 1 - i + length]
            for i in range(self.kernel_size)
        )
        return mixed, padded[:, length:]
