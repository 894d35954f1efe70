"""The ops in C++, for CPUs: compiled on the machine that runs them, where it has a compiler. Same signatures as `naive`."""

from .forms import can_run, gated, linear_attention, window_attention


__all__ = ["can_run", "gated", "linear_attention", "window_attention"]
