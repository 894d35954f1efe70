"""The learned parts around a recurrence without a normaliser: decay gates, the output stage, and the window beside them."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from ..ops import WindowState, empty_window_state, window_attention


def inverse_softplus(x: torch.Tensor) -> torch.Tensor:
    """$y$ with $\\log(1 + e^y) = x$, for `x > 0`; exact for small and for large `x`."""
    return x + torch.log(-torch.expm1(-x))


def spread_half_lives(shape: tuple[int, ...]) -> torch.Tensor:
    """Half-lives in tokens before anything is known of the layer: from 16 to 1,024, equal steps of their logarithm along the last axis."""
    return torch.logspace(4, 10, shape[-1], base=2.0).expand(shape)


class LowRank(nn.Module):
    """
    $x \\mapsto W_2 W_1 x$, with a bias where `bias` says so. Started so that the output is close to the bias, the gate nearly data-independent.

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


class OutputStage(nn.Module):
    r"""
    What turns a recurrence's output into an attention output: per head, $w \odot \mathrm{RMSNorm}(o_t) \odot 2 \sigma(U x_t)$, and next to it, with a
    window, $\sigma(a)$ of that and $1 - \sigma(a)$ of exact attention over the window and the sinks.

    The gate starts at 1 and $\sigma(a)$ at 1.8 %: the layer begins as the training-free window. [Liger](https://huggingface.co/papers/2503.01496),
    eq. 10, adds the two halves with fixed equal weights; here the weight is learned per query head.

    Args:
        mixer (`LinearMixer`): Sizes are read from it.
        window_size (`int`), num_sink_tokens (`int`): Of the exact part; a window of 0 leaves it out.
        output_gate (`bool`): Whether there is a gate.
        gate_rank (`int`): Rank of `U`.
    """

    quiet_logit = -4.0

    def __init__(self, mixer, *, window_size: int, num_sink_tokens: int, output_gate: bool, gate_rank: int):
        super().__init__()
        self.window_size, self.num_sink_tokens = window_size, num_sink_tokens
        self.scale = mixer.head_dim**-0.5
        self.weight = nn.Parameter(torch.empty(mixer.num_heads, mixer.value_dim))
        self.gate = None
        if output_gate:
            self.gate = LowRank(mixer.hidden_size, gate_rank, mixer.num_heads * mixer.value_dim, bias=False)
        self.state_logit = nn.Parameter(torch.empty(mixer.num_heads)) if window_size else None

    def init_weights(self, initialization) -> None:
        with torch.no_grad():
            self.weight.fill_(1.0)
            if self.state_logit is not None:
                self.state_logit.fill_(self.quiet_logit if "quiet_state" in initialization else 0.0)
        if self.gate is not None:
            self.gate.init_weights(small="neutral_gates" in initialization)

    def scale_by(self, factors: torch.Tensor) -> None:
        """Multiply what comes of the recurrence, per query head, `[H]`."""
        with torch.no_grad():
            self.weight.mul_(factors.to(self.weight)[:, None])

    def recurrent_part(self, recurrent, hidden_states):
        """`[B, T, H, V]` of the recurrence and `[B, T, D]` -> `[B, T, H, V]`."""
        output = recurrent * torch.rsqrt(recurrent.float().square().mean(-1, keepdim=True) + 1e-6).to(recurrent.dtype)
        output = output * self.weight.to(output.dtype)
        if self.gate is not None:
            gate = 2.0 * self.gate(hidden_states).sigmoid()
            output = output * gate.to(output.dtype).view_as(output)
        return output

    def forward(self, recurrent, query, key, value, hidden_states, *, parts, valid, state, inplace_final_state):
        """
        Returns `(output, window state)`; `recurrent` is `None` where `parts` leaves the state out, `parts` as of
        [`LinearMixer.active_parts`].
        """
        output = None if recurrent is None else self.recurrent_part(recurrent, hidden_states)
        if not self.window_size:
            return output, ()
        if "window" not in parts:
            window = state or tuple(empty_window_state(key, value, self.window_size, self.num_sink_tokens)[:4])
            return output + 0.0 * self.state_logit.sum().to(output.dtype), window
        exact, final = window_attention(
            query, key, value, window_size=self.window_size, num_sinks=self.num_sink_tokens, scale=self.scale, valid=valid,
            state=WindowState(*state, None) if state else None, inplace_final_state=inplace_final_state,
        )  # fmt: skip
        if output is None:
            return exact, tuple(final[:4])
        share = self.state_logit.sigmoid().to(output.dtype).unsqueeze(-1)
        return torch.lerp(exact, output, share), tuple(final[:4])


def empty_state(mixer, query) -> torch.Tensor:
    """The recurrent state before the first token, `[B, H_s, K, V]`: what a mixer without its state hands on."""
    shape = (query.shape[0], mixer.num_states, mixer.head_dim, mixer.value_dim)
    return query.new_zeros(shape, dtype=torch.promote_types(query.dtype, torch.float32))


def masked(valid, *tensors):
    """Zero the rows of tokens that do not exist: `valid` bool `[B, T]` or `None`, tensors `[B, T, ...]`."""
    if valid is None:
        return tensors
    return tuple(x * valid.view(*valid.shape, *(1,) * (x.ndim - 2)).to(x.dtype) for x in tensors)


def softplus_bias(half_lives: torch.Tensor) -> torch.Tensor:
    """Bias `b` with `softplus(b) = ln 2 / d`: a decay of one half every `d` tokens."""
    return inverse_softplus(math.log(2.0) / half_lives)
