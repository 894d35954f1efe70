"""The ops in C++, for CPUs: compiled on the machine that runs them, where it has a compiler. Same signatures as `naive`."""

from .forms import bidirectional_linear_attention, can_run, gated, linear_attention, window_attention


__all__ = ["bidirectional_linear_attention", "can_run", "gated", "linear_attention", "window_attention"]
