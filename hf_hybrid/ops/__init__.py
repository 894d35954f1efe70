"""The recurrences of the mixers, each in several forms with one signature: naive, chunkwise, one-token, fla."""

from .dispatch import (
    bidirectional_linear_attention,
    divergence,
    gated_delta_rule,
    gated_linear_attention,
    linear_attention,
    memory_attention,
    window_attention,
)
from .matmul import fast_fp32_matmul
from .naive import LinearPart, WindowState, empty_window_state
from .naive_memory import MemoryState, empty_memory_state


__all__ = [
    "LinearPart",
    "MemoryState",
    "WindowState",
    "bidirectional_linear_attention",
    "divergence",
    "empty_memory_state",
    "empty_window_state",
    "fast_fp32_matmul",
    "gated_delta_rule",
    "gated_linear_attention",
    "linear_attention",
    "memory_attention",
    "window_attention",
]
