"""Linear layers are put into whatever cache a model is given, when it is first used."""

from transformers.cache_utils import (
    BaseQuantizedLayer,
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionAndStaticSlidingWindowAttentionLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from ...errors import UnsupportedModelError
from ..heads import HeadSplit
from .heads_layer import HybridHeadsLayer
from .linear_layer import HybridLinearLayer, StaticHybridLinearLayer


PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)
# Layers of hosts that run a recurrence of their own beside attention.
SHARED_LAYERS = (
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionAndStaticSlidingWindowAttentionLayer,
)
STATES_OF_LAYER = (
    "conv_states",
    "recurrent_states",
    "conv_kernel_size",
    "is_conv_states_initialized",
    "is_recurrent_states_initialized",
    "has_previous_state",
)


def linear_cache_layer(
    cache: Cache | EncoderDecoderCache, layer_idx: int, split: HeadSplit | None = None
) -> HybridLinearLayer:
    """
    The linear layer at `layer_idx` of a cache, put there if the cache (the user's own, or one a model built) has none
    yet.

    Args:
        cache (`Cache`): Any.
        layer_idx (`int`): Where.
        split (`HeadSplit`, *optional*): Which heads are linear, if not all are.

    Raises:
        UnsupportedModelError: If the cache already holds softmax keys for that layer, or states of other heads.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    while len(cache.layers) <= layer_idx:
        if len(cache.layers) == layer_idx:
            cache.layers.append(HybridLinearLayer() if split is None else DynamicLayer())
        else:
            cache.layers.append(cache.layer_class_to_replicate())
    current = cache.layers[layer_idx]
    if isinstance(current, HybridLinearLayer):
        if (current.split if isinstance(current, HybridHeadsLayer) else None) != split:
            raise UnsupportedModelError(
                f"The cache was filled while other heads of layer {layer_idx} were linear. Start from an empty cache "
                "after the switch was set."
            )
        return current
    if isinstance(current, BaseQuantizedLayer):
        raise UnsupportedModelError(
            f"Quantized caches ({type(current).__name__}) keep softmax keys in a form of their own, which a linear "
            "layer does not have. Leave cache_implementation='quantized' out: linear layers need no cache that grows."
        )
    if not is_plain_cache_layer(current):
        raise UnsupportedModelError(
            f"Layer {layer_idx} keeps more than keys and values in the cache ({type(current).__name__}), which a "
            "linear-attention layer cannot serve. Leave the layer out of `layers`."
        )
    if int(current.get_seq_length()) > 0:
        raise UnsupportedModelError(
            f"The cache holds softmax keys and values for layer {layer_idx}, which is linear attention. "
            "Start from an empty cache, or from one this hybrid model filled."
        )
    shared = type(current) in SHARED_LAYERS
    host_states = current.number_of_states if shared else 0
    if split is not None:
        # one that was allocated early has room for all heads
        fresh = shared or (hasattr(current, "max_cache_len") and current.is_initialized)
        layer = HybridHeadsLayer(_without_host_states(current) if fresh else current, split, host_states)
    elif hasattr(current, "max_cache_len"):
        layer = StaticHybridLinearLayer(current, host_states)
    else:
        layer = HybridLinearLayer(host_states)
    if shared:
        for name in STATES_OF_LAYER:  # the host may have written its own before its attention runs
            getattr(layer, name).update(getattr(current, name))
        layer.device, layer.dtype = current.device, current.dtype
    elif any(getattr(other, "record_past", False) for other in cache.layers):
        layer.activate_past_recording()
    cache.layers[layer_idx] = layer
    return layer


def check_softmax_layer(cache: Cache | EncoderDecoderCache, layer_idx: int) -> None:
    """
    Before a layer whose heads are all softmax reads a cache.

    Raises:
        UnsupportedModelError: If the cache holds a state for that layer, from when it was linear.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if layer_idx < len(cache.layers) and isinstance(cache.layers[layer_idx], HybridLinearLayer):
        raise UnsupportedModelError(
            f"The cache was filled while layer {layer_idx} was linear, which it is not any more. Start from an empty "
            "cache after the switch was set."
        )


def _without_host_states(layer: CacheLayerMixin) -> CacheLayerMixin:
    """
    An empty layer for keys and values laid out as those of `layer`, of a host that keeps states of its own beside them.
    """
    if isinstance(layer, StaticSlidingWindowLayer):
        return StaticSlidingWindowLayer(layer.max_cache_len, layer.max_cache_len)
    if isinstance(layer, StaticLayer):
        return StaticLayer(layer.max_cache_len)
    return DynamicSlidingWindowLayer(layer.sliding_window) if layer.is_sliding else DynamicLayer()


def is_plain_cache_layer(layer: CacheLayerMixin) -> bool:
    """Whether a cache layer holds the keys and values of one softmax, and at most recurrent states of the host beside
    them: no indexer, no compressed blocks."""
    return type(layer) in (*PLAIN_LAYERS, *SHARED_LAYERS)


def cache_bytes(cache: Cache | EncoderDecoderCache) -> int:
    """Bytes held by a cache: keys and values of softmax layers, states of linear ones."""
    if isinstance(cache, EncoderDecoderCache):
        return cache_bytes(cache.self_attention_cache) + cache_bytes(cache.cross_attention_cache)
    total = 0
    for layer in cache.layers:
        if isinstance(layer, HybridLinearLayer):
            total += layer.state_bytes()
        if not isinstance(layer, HybridLinearLayer) or isinstance(layer, HybridHeadsLayer):
            total += sum(x.numel() * x.element_size() for x in (layer.keys, layer.values) if x is not None)
    return total


__all__ = ["cache_bytes", "check_softmax_layer", "is_plain_cache_layer", "linear_cache_layer"]
