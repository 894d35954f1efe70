"""The gates of the delta-rule mixers."""

import torch
from torch import nn
from torch.nn import functional as F

from .gates import LowRank, masked, softplus_bias, spread_half_lives


class HeadGates(nn.Module):
    """
    $g_t = -e^{A}\\,\\mathrm{softplus}(w_\\alpha^\\top x_t + b)$ and $\\beta_t = \\sigma(w_\\beta^\\top x_t)$, one each per state. Started nearly
    data-independent: decays of the given half-lives, writes of strength one half.

    Args:
        hidden_size (`int`): `D`.
        num_states (`int`): `H_s`.
    """

    def __init__(self, hidden_size: int, num_states: int):
        super().__init__()
        self.decay_weight = nn.Parameter(torch.empty(num_states, hidden_size))
        self.beta_weight = nn.Parameter(torch.empty(num_states, hidden_size))
        self.log_rate = nn.Parameter(torch.empty(num_states))
        self.decay_bias = nn.Parameter(torch.empty(num_states))

    def init_weights(self) -> None:
        with torch.no_grad():
            for weight in (self.decay_weight, self.beta_weight):
                nn.init.normal_(weight, std=0.1 * weight.shape[1] ** -0.5)
            self.log_rate.zero_()
        self.set_half_lives(spread_half_lives(tuple(self.decay_bias.shape)))

    def set_half_lives(self, half_lives: torch.Tensor) -> None:
        with torch.no_grad():
            self.decay_bias.copy_(softplus_bias(half_lives))

    def forward(self, hidden_states, valid):
        """`[B, T, D]` -> log-decay and write strength `[B, T, H_s]`, fp32 or wider; both 0 for tokens that do not exist."""
        hidden_states = hidden_states.to(self.decay_weight.dtype)
        rate, beta = F.linear(hidden_states, torch.cat([self.decay_weight, self.beta_weight])).chunk(2, dim=-1)
        wide = torch.promote_types(rate.dtype, torch.float32)
        decay = -self.log_rate.to(wide).exp() * F.softplus(rate.to(wide) + self.decay_bias)
        return masked(valid, decay, beta.to(wide).sigmoid())


class ChannelGates(nn.Module):
    """
    As [`HeadGates`] with one decay per key channel: $g_t = -e^{A}\\,\\mathrm{softplus}(W_2 W_1 x_t + b)$, `[H_s, K]`.

    Args:
        hidden_size (`int`), num_states (`int`), head_dim (`int`), rank (`int`): `D`, `H_s`, `K`, rank of the decay's projection.
    """

    def __init__(self, hidden_size: int, num_states: int, head_dim: int, rank: int):
        super().__init__()
        self.num_states, self.head_dim = num_states, head_dim
        self.decay = LowRank(hidden_size, rank, num_states * head_dim)
        self.beta_weight = nn.Parameter(torch.empty(num_states, hidden_size))
        self.log_rate = nn.Parameter(torch.empty(num_states))

    def init_weights(self) -> None:
        self.decay.init_weights()
        with torch.no_grad():
            nn.init.normal_(self.beta_weight, std=0.1 * self.beta_weight.shape[1] ** -0.5)
            self.log_rate.zero_()
        self.set_half_lives(spread_half_lives((self.num_states, self.head_dim)))

    def set_half_lives(self, half_lives: torch.Tensor) -> None:
        bias = softplus_bias(half_lives.view(self.num_states, -1).expand(-1, self.head_dim))
        self.decay.set_bias(bias.flatten())

    def forward(self, hidden_states, valid):
        """`[B, T, D]` -> log-decay `[B, T, H_s, K]`, write strength `[B, T, H_s]`, fp32 or wider; both 0 for tokens that do not exist."""
        rate = self.decay(hidden_states).unflatten(-1, (self.num_states, -1))
        decay = -self.log_rate.to(rate.dtype).exp().unsqueeze(-1) * F.softplus(rate)
        beta = F.linear(hidden_states.to(self.beta_weight.dtype), self.beta_weight).to(rate.dtype).sigmoid()
        return masked(valid, decay, beta)
