"""
What the mixers without a normaliser share: their settings, what turns a recurrence into an attention output, and the
window beside it.
"""

import dataclasses
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import nn

from .base import LinearMixer, MixerConfig
from .checks import INITIALIZATIONS, check_bool, check_int, check_window
from .exact import ExactPart
from .gates import LowRank


@dataclasses.dataclass(frozen=True)
class GatedConfig(MixerConfig):
    """
    Args:
        window_size (`int`, *optional*, defaults to 64): Tokens also attended exactly, the current one included; 0 for a
            purely linear layer.
        num_sink_tokens (`int`, *optional*, defaults to 4): First tokens of the sequence attended exactly for ever; 0
            where there is no window.
        num_memory_tokens (`int` or `tuple[int, ...]`, *optional*, defaults to 0): Tokens that left the window and are
            still attended exactly, by key-value head: those whose keys are least like the others. One number for all
            heads, or one for each of the layer's key-value heads.
        memory_block_size (`int`, *optional*, defaults to 32): Tokens after which the memory chooses again. Beside a
            memory the window holds up to so many more.
        output_gate (`bool`, *optional*, defaults to `True`): Whether the layer's input gates the output.
        gate_rank (`int`, *optional*, defaults to 16): Rank of the projections behind the gates.
        state_per_query_head (`bool`, *optional*, defaults to `False`): One state per query head instead of one per
            key-value head: as many times the memory and about the time as there are query heads per key-value head, for
            as many more decays.
    """

    window_size: int = 64
    num_sink_tokens: int = 4
    num_memory_tokens: int | tuple[int, ...] = 0
    memory_block_size: int = 32
    output_gate: bool = True
    gate_rank: int = 16
    state_per_query_head: bool = False

    def __post_init__(self):
        check_window(self)
        check_bool(self.name, "output_gate", self.output_gate)
        check_int(self.name, "gate_rank", self.gate_rank, 1)
        check_bool(self.name, "state_per_query_head", self.state_per_query_head)


class GatedMixer(LinearMixer):
    """
    Base class of mixers that are a recurrence, an [`OutputStage`] and perhaps a window.

    State: that of the window (see [`WindowState`]), if there is one, then `num_own_states` tensors of the mixer's, the
    last of them `[B, H_s, K, V]` fp32 with `H_s` = `num_states`.

    Args:
        window_size, num_sink_tokens, output_gate, gate_rank, state_per_query_head: see [`GatedConfig`].
    """

    num_own_states: ClassVar[int] = 1
    needs_hidden_states = True
    head_layouts = {
        "output_stage.weight": "H V",
        "output_stage.state_logit": "H",
        "output_stage.gate.down": "r D",
        "output_stage.gate.up": "(H V) r",
    }

    def __init__(
        self,
        *,
        window_size,
        num_sink_tokens,
        num_memory_tokens,
        memory_block_size,
        output_gate,
        gate_rank,
        state_per_query_head,
        **sizes,
    ):
        super().__init__(**sizes)
        self.window_size, self.state_per_query_head = window_size, state_per_query_head
        self.output_stage = OutputStage(
            self,
            window_size=window_size,
            num_sink_tokens=num_sink_tokens,
            num_memory_tokens=num_memory_tokens,
            memory_block_size=memory_block_size,
            output_gate=output_gate,
            gate_rank=gate_rank,
        )

    @property
    def num_states(self) -> int:
        return self.num_heads if self.state_per_query_head else self.num_key_value_heads

    @abstractmethod
    def recur(
        self, query, key, value, hidden_states, *, valid, state, inplace_final_state
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """
        The recurrence: `[B, T, H, V]` before the output stage, and the mixer's own states; `state` is a tuple of them
        or `None`.
        """

    def empty_state(self, query, value) -> tuple[torch.Tensor, ...]:
        """The mixer's own states before the first token."""
        shape = (query.shape[0], self.num_states, self.head_dim, self.value_dim)
        return (query.new_zeros(shape, dtype=torch.promote_types(query.dtype, torch.float32)),)

    def init_weights(self, initialization=INITIALIZATIONS) -> None:
        self.output_stage.init_weights(initialization)

    @property
    def can_scale_output(self) -> bool:
        return True

    def scale_output(self, factors: torch.Tensor) -> None:
        """Multiply the output of the state, per query head, `[H]`."""
        self.output_stage.scale_by(factors)

    def mix(self, query, key, value, hidden_states, *, valid, state, inplace_final_state):
        window_state, own = (state[: -self.num_own_states], state[-self.num_own_states :]) if state else ((), None)
        parts, recurrent = self.active_parts(), None
        if "state" in parts:
            recurrent, own = self.recur(
                query, key, value, hidden_states, valid=valid, state=own, inplace_final_state=inplace_final_state
            )
        elif own is None:
            own = self.empty_state(query, value)
        output, window_state = self.output_stage(
            recurrent,
            query,
            key,
            value,
            hidden_states,
            parts=parts,
            valid=valid,
            state=window_state,
            inplace_final_state=inplace_final_state,
        )
        return output, (*window_state, *own)


class OutputStage(nn.Module):
    r"""
    What turns a recurrence's output into an attention output: per head, $w \odot \mathrm{RMSNorm}(o_t) \odot 2 \sigma(U
    x_t)$, and next to it, with a window, $\sigma(a)$ of that and $1 - \sigma(a)$ of exact attention over the window and
    the sinks.

    The gate starts at 1 and $\sigma(a)$ at 1.8 %: the layer begins as the training-free window.
    [Liger](https://huggingface.co/papers/2503.01496), eq. 10, adds the two halves with fixed equal weights; here the
    weight is learned per query head.

    Args:
        mixer (`LinearMixer`): Sizes are read from it.
        window_size (`int`), num_sink_tokens (`int`), num_memory_tokens (`int` or `tuple`), memory_block_size (`int`):
            Of the exact part; a window of 0 leaves it out.
        output_gate (`bool`): Whether there is a gate.
        gate_rank (`int`): Rank of `U`.
    """

    quiet_logit = -4.0
    tokens_at_a_time = 256

    def __init__(
        self,
        mixer,
        *,
        window_size: int,
        num_sink_tokens: int,
        num_memory_tokens,
        memory_block_size: int,
        output_gate: bool,
        gate_rank: int,
    ):
        super().__init__()
        self.exact = None
        if window_size:
            self.exact = ExactPart(mixer, window_size, num_sink_tokens, num_memory_tokens, memory_block_size)
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
        wide = recurrent.to(torch.promote_types(recurrent.dtype, torch.float32))
        output = recurrent * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6).to(recurrent.dtype)
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
        if self.exact is None:
            return self.mixed(None, recurrent, hidden_states), ()
        if "window" not in parts:
            window = state or self.exact.empty_state(key, value)
            output = self.mixed(None, recurrent, hidden_states)
            return output + 0.0 * self.state_logit.sum().to(output.dtype), window
        exact, final, _ = self.exact(
            query, key, value, valid=valid, state=state, inplace_final_state=inplace_final_state
        )
        return (exact if recurrent is None else self.mixed(exact, recurrent, hidden_states)), final

    def mixed(self, exact, recurrent, hidden_states):
        """
        The output from that of the window (or `None`) and of the recurrence, both `[B, T, H, V]`. Without gradients a
        few tokens at a time, into that of the window or one new tensor: a CPU spends more time on memory for
        intermediate results of the whole length than on the arithmetic.
        """
        share = None if exact is None else self.state_share().to(recurrent.dtype)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not recurrent.is_cpu:
            output = self.recurrent_part(recurrent, hidden_states)
            return output if share is None else torch.lerp(exact, output, share)
        output = torch.empty_like(recurrent) if share is None else exact
        for start in range(0, recurrent.shape[1], self.tokens_at_a_time):
            here = slice(start, start + self.tokens_at_a_time)
            part = self.recurrent_part(recurrent[:, here], hidden_states[:, here])
            if share is None:
                output[:, here] = part
            else:
                output[:, here].lerp_(part, share)
        return output

    def state_share(self) -> torch.Tensor:
        """Weight of the state against the window, `[H, 1]` in (0, 1); 1 without a window."""
        if self.state_logit is None:
            return self.weight.new_ones(len(self.weight), 1)
        return self.state_logit.sigmoid().unsqueeze(-1)
