"""`jet_block`: the gated delta rule over values mixed by a convolution whose kernels are made from the input."""

import dataclasses

import torch
from torch import nn
from torch.nn import functional as F

from ..ops import gated_delta_rule
from .base import register_mixer
from .checks import INITIALIZATIONS, check_int
from .gated import GatedConfig, GatedMixer
from .gates import HeadGates, masked


@dataclasses.dataclass(frozen=True)
class JetBlockConfig(GatedConfig):
    """
    Args:
        kernel_size (`int`, *optional*, defaults to 4): Tokens under the convolution, the current one included.

    The others as of [`GatedConfig`].
    """

    name = "jet_block"
    kernel_size: int = 4

    def __post_init__(self):
        super().__post_init__()
        check_int(self.name, "kernel_size", self.kernel_size, 2)


@register_mixer
class JetBlock(GatedMixer):
    r"""
    [`GatedDeltaNet`] over values mixed with their predecessors: $\hat v_t = \sum_{i=0}^{w-1} c_{t,i} \odot v_{t-i}$
    with kernels made from the layer's input, $c_t = c^0 + W_2\, \mathrm{SiLU}(W_1 x_t)$, one per value channel.

    Reference: [Jet-Nemotron](https://huggingface.co/papers/2508.15884), its JetBlock. Differs: the kernel starts as the
    identity and there is no activation after it, so that a fresh layer passes the pretrained values through; otherwise
    as [`GatedDeltaNet`].

    State of its own: the last `kernel_size - 1` values `[B, w - 1, H_kv, V]` before `[B, H_s, K, V]`.
    """

    config_class = JetBlockConfig
    head_layouts = {
        **GatedMixer.head_layouts,
        "gates.decay_weight": "S D",
        "gates.beta_weight": "S D",
        "gates.log_rate": "S",
        "gates.decay_bias": "S",
        "convolution.down": "r D",
        "convolution.up": "(w G V) r",
        "convolution.bias": "w G V",
    }
    num_own_states = 2

    def __init__(self, *, kernel_size, **settings):
        super().__init__(**settings)
        self.gates = HeadGates(self.hidden_size, self.num_states)
        self.convolution = DynamicConvolution(self, kernel_size)

    def init_weights(self, initialization=INITIALIZATIONS) -> None:
        super().init_weights(initialization)
        self.gates.init_weights()
        self.convolution.init_weights()

    def set_half_lives(self, half_lives: torch.Tensor) -> None:
        """Start the decays at one half every `half_lives` tokens, `[H_s]`."""
        self.gates.set_half_lives(half_lives)

    def empty_state(self, query, value):
        return self.convolution.empty_past(value), *super().empty_state(query, value)

    def recur(self, query, key, value, hidden_states, *, valid, state, inplace_final_state):
        past_values, recurrent_state = state or (None, None)
        decay, beta = self.gates(hidden_states, valid)
        value, past_values = self.convolution(value, hidden_states, valid, past_values)
        output, final = gated_delta_rule(
            query,
            key,
            value,
            decay=decay,
            beta=beta,
            scale=self.head_dim**-0.5,
            qk_l2norm=True,
            initial_state=recurrent_state,
            output_final_state=True,
            inplace_final_state=inplace_final_state,
        )
        return output, (past_values, final)


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
            valid (`torch.Tensor`, *optional*): bool `[B, T]`; tokens that do not exist count as zeros, and
                take a place under the kernel.
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
