"""Cache layers of linear-attention sites. The only module that knows transformers' cache classes.

They sit in an ordinary `DynamicCache` or `StaticCache` beside the layers of the softmax sites. `update`, called by the
host's own attention code, stores nothing and hands the new keys and values through; the mixer's state lives in
`recurrent_states`.
"""

from .heads_layer import HybridHeadsLayer
from .linear_layer import HybridLinearLayer, StaticHybridLinearLayer
from .placing import cache_bytes, check_softmax_layer, is_plain_cache_layer, linear_cache_layer


__all__ = [
    "HybridHeadsLayer",
    "HybridLinearLayer",
    "StaticHybridLinearLayer",
    "cache_bytes",
    "check_softmax_layer",
    "is_plain_cache_layer",
    "linear_cache_layer",
]
