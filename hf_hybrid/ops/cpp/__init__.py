"""The ops in C++, for CPUs: compiled on the machine that runs them, where it has a compiler. Same signatures as
`naive`.

`src/` holds the kernels, one header per op; `build` compiles and loads them; `arguments` mirrors their structures;
`linear`, `gated`, `window`, `memory` and `divergence` call them; `eligible` says for which inputs.
"""

from .divergence import divergence
from .eligible import can_run
from .gated import gated
from .linear import bidirectional_linear_attention, linear_attention
from .memory import memory_attention
from .window import window_attention


__all__ = [
    "bidirectional_linear_attention",
    "can_run",
    "divergence",
    "gated",
    "linear_attention",
    "memory_attention",
    "window_attention",
]
