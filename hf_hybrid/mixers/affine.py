"""`affine`: an affine map of the layer's input in place of attention. No state, and a best fit in closed form."""

import dataclasses

import torch
from torch import nn
from torch.nn import functional as F

from .base import LinearMixer, MixerConfig, register_mixer
from .checks import INITIALIZATIONS


@dataclasses.dataclass(frozen=True)
class AffineConfig(MixerConfig):
    """No settings."""

    name = "affine"


@register_mixer
class Affine(LinearMixer):
    r"""
    $o_t = W x_t + b$: what can be said of a layer's attention from the token alone. Starts at zero, as `identity`, or
    at the least-squares fit to the softmax's output, $W = C_{yx} C_{xx}^{-1}$ (ridge; [`calibrate_mixers`]).

    Reference: [NBL](https://huggingface.co/papers/2505.21077), which replaces the whole attention block, output
    projection included; here the map ends before the output projection, so that it can be learnt by heads. No state.
    """

    config_class = AffineConfig
    supports_bidirectional = True
    needs_hidden_states = True
    head_layouts = {"weight": "(H V) D", "bias": "(H V)"}
    # of the mean diagonal of C_xx: inputs of a layer are nearly of low rank
    ridge = 1e-4

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.weight = nn.Parameter(torch.empty(self.num_heads * self.value_dim, self.hidden_size))
        self.bias = nn.Parameter(torch.empty(self.num_heads * self.value_dim))

    def init_weights(self, initialization=INITIALIZATIONS) -> None:
        with torch.no_grad():
            self.weight.zero_()
            self.bias.zero_()

    def fit(self, sums: torch.Tensor) -> None:
        """
        Take the least-squares fit. `sums`: over tokens, of the products of [x, 1, y] with [x, 1], `[D + 1 + H V, D +
        1]`.
        """
        size = self.hidden_size + 1
        gram, cross = sums[:size].double(), sums[size:].double()
        penalty = self.ridge * gram.diagonal()[:-1].mean() * torch.eye(size, dtype=gram.dtype, device=gram.device)
        penalty[-1, -1] = 0.0  # not of the constant
        solution = torch.linalg.solve(gram + penalty, cross.T).T
        with torch.no_grad():
            self.weight.copy_(solution[:, :-1])
            self.bias.copy_(solution[:, -1])

    def mix(self, query, key, value, hidden_states, *, valid, state, inplace_final_state):
        output = F.linear(hidden_states.to(self.weight.dtype), self.weight, self.bias)
        output = output.to(query.dtype).view(*query.shape[:3], self.value_dim)
        return (output if valid is None else output.masked_fill(~valid[..., None, None], 0.0)), ()
