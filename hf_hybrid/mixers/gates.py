"""The learned gates of mixers without a normaliser: how fast a state forgets, and how strongly it is written to."""

import math

import torch
from torch import nn
from torch.nn import functional as F


def softplus(x: torch.Tensor) -> torch.Tensor:
    """
    `F.softplus`, whose gradient `torch.compile` lays out wrongly for permuted tensors (2.13), by way of `F.logsigmoid`.
    """
    return -F.logsigmoid(-x)


def inverse_softplus(x: torch.Tensor) -> torch.Tensor:
    """$y$ with $\\log(1 + e^y) = x$, for `x > 0`; exact for small and for large `x`."""
    return x + torch.log(-torch.expm1(-x))


def spread_half_lives(shape: tuple[int, ...]) -> torch.Tensor:
    """
    Half-lives in tokens before anything is known of the layer: from 16 to 1,024, equal steps of their logarithm along
    the last axis.
    """
    return torch.logspace(4, 10, shape[-1], base=2.0).expand(shape)


class LowRank(nn.Module):
    """
    $x \\mapsto W_2 W_1 x$, with a bias where `bias` says so. Started so that the output is close to the bias, the gate
    nearly data-independent.

    Args:
        in_features (`int`), rank (`int`), out_features (`int`): Sizes of the two products.
        bias (`bool`, *optional*, defaults to `True`): Whether there is a bias.
    """

    def __init__(self, in_features: int, rank: int, out_features: int, bias: bool = True):
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, in_features))
        self.up = nn.Parameter(torch.empty(out_features, rank))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def init_weights(self, small: bool = True) -> None:
        with torch.no_grad():
            nn.init.normal_(self.down, std=self.down.shape[1] ** -0.5)
            nn.init.normal_(self.up, std=0.01 if small else self.up.shape[1] ** -0.5)
            if self.bias is not None:
                self.bias.zero_()

    def set_bias(self, bias: torch.Tensor) -> None:
        if self.bias is not None:
            with torch.no_grad():
                self.bias.copy_(bias)

    def forward(self, x):
        """`[B, T, D]` -> `[B, T, out_features]`, fp32 or wider: what it feeds is exponentiated."""
        projected = F.linear(F.linear(x.to(self.down.dtype), self.down), self.up)
        projected = projected.to(torch.promote_types(projected.dtype, torch.float32))
        return projected if self.bias is None else projected + self.bias


class HeadGates(nn.Module):
    """
    $g_t = -e^{A}\\,\\mathrm{softplus}(w_\\alpha^\\top x_t + b)$ and $\\beta_t = \\sigma(w_\\beta^\\top x_t)$, one each
    per state. Started nearly data-independent: decays of the given half-lives, writes of strength one half.

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
        """
        `[B, T, D]` -> log-decay and write strength `[B, T, H_s]`, fp32 or wider; both 0 for tokens that do not exist.
        """
        hidden_states = hidden_states.to(self.decay_weight.dtype)
        rate, beta = F.linear(hidden_states, torch.cat([self.decay_weight, self.beta_weight])).chunk(2, dim=-1)
        wide = torch.promote_types(rate.dtype, torch.float32)
        decay = -self.log_rate.to(wide).exp() * softplus(rate.to(wide) + self.decay_bias)
        return masked(valid, decay, beta.to(wide).sigmoid())


class ChannelGates(nn.Module):
    """
    As [`HeadGates`] with one decay per key channel: $g_t = -e^{A}\\,\\mathrm{softplus}(W_2 W_1 x_t + b)$, `[H_s, K]`.

    Args:
        hidden_size (`int`), num_states (`int`), head_dim (`int`), rank (`int`): `D`, `H_s`, `K`, rank of the decay's
            projection.
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
        """
        `[B, T, D]` -> log-decay `[B, T, H_s, K]`, write strength `[B, T, H_s]`, fp32 or wider; both 0 for tokens that
        do not exist.
        """
        rate = self.decay(hidden_states).unflatten(-1, (self.num_states, -1))
        decay = -self.log_rate.to(rate.dtype).exp().unsqueeze(-1) * softplus(rate)
        beta = F.linear(hidden_states.to(self.beta_weight.dtype), self.beta_weight).to(rate.dtype).sigmoid()
        return masked(valid, decay, beta)


def masked(valid, *tensors):
    """Zero the rows of tokens that do not exist: `valid` bool `[B, T]` or `None`, tensors `[B, T, ...]`."""
    if valid is None:
        return tensors
    return tuple(x * valid.view(*valid.shape, *(1,) * (x.ndim - 2)).to(x.dtype) for x in tensors)


def softplus_bias(half_lives: torch.Tensor) -> torch.Tensor:
    """Bias `b` with `softplus(b) = ln 2 / d`: a decay of one half every `d` tokens."""
    return inverse_softplus(math.log(2.0) / half_lives)
