"""The ops in C++, for CPUs: compiled on the machine that runs them, where it has a compiler. Same signatures as
`naive`.

`src/` holds the kernels, one header per op; `build` compiles and loads them; `arguments` mirrors their structures;
`linear`, `gated` and `window` call them; `eligible` says for which inputs.
"""

from .eligible import can_run
from .gated import gated
from .linear import bidirectional_linear_attention, linear_attention
from .window import window_attention


__all__ = ["bidirectional_linear_attention", "can_run", "gated", "linear_attention", "window_attention"]
