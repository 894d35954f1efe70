"""The recurrences of the mixers, each in several forms with one signature: naive, chunkwise, one-token, fla."""

from .dispatch import fast_fp32_matmul, linear_attention, sliding_window


__all__ = ["fast_fp32_matmul", "linear_attention", "sliding_window"]
