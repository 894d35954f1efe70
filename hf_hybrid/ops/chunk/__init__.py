"""Chunkwise forms in plain torch: matrix products inside a chunk of tokens, a running state between chunks.

Run anywhere; same signatures and results as `naive`. Axes as there, plus `C` tokens per chunk, `N` chunks, and `R`
states (one for every sequence and key-value head), which is the batch of all products: a group of query heads is folded
into the rows of one product, so that keys, values and state are never repeated per query head. Why the loops look the
way they do is told, with measurements, in `docs/explanation/cpu_speed.md`.
"""

from .gated import chunk_gated_delta_rule, chunk_gated_linear_attention
from .linear import bidirectional_linear_attention, chunk_linear_attention
from .memory import chunk_memory_attention, seen_in_all_rows
from .window import chunk_window_attention


__all__ = [
    "bidirectional_linear_attention",
    "chunk_gated_delta_rule",
    "chunk_gated_linear_attention",
    "chunk_linear_attention",
    "chunk_memory_attention",
    "chunk_window_attention",
    "seen_in_all_rows",
]
