"""One or more settings per registered mixer: every contract runs over all of them."""

from hf_hybrid import (
    AffineConfig,
    GatedDeltaNetConfig,
    GLAConfig,
    IdentityConfig,
    JetBlockConfig,
    KimiDeltaConfig,
    LightningConfig,
    LinearAttentionConfig,
    SlidingWindowConfig,
)


MIXERS = {
    "sliding_window": SlidingWindowConfig(window_size=6, num_sink_tokens=2),
    "sliding_window-no_sinks": SlidingWindowConfig(window_size=1, num_sink_tokens=0),
    "sliding_window-memory": SlidingWindowConfig(
        window_size=5, num_sink_tokens=2, num_memory_tokens=6, memory_block_size=4
    ),
    "linear_attention": LinearAttentionConfig(window_size=4, num_sink_tokens=2),
    "linear_attention-no_window": LinearAttentionConfig(window_size=0, num_sink_tokens=0),
    "linear_attention-wide": LinearAttentionConfig(window_size=70, num_sink_tokens=1, feature_dim=4),
    "linear_attention-memory": LinearAttentionConfig(
        window_size=4, num_sink_tokens=2, num_memory_tokens=5, memory_block_size=4
    ),
    "linear_attention-elu": LinearAttentionConfig(feature_map="elu", window_size=3, num_sink_tokens=0),
    "linear_attention-relu": LinearAttentionConfig(feature_map="relu", window_size=5, num_sink_tokens=1),
    "linear_attention-dpfp": LinearAttentionConfig(feature_map="dpfp", window_size=0),
    "linear_attention-taylor": LinearAttentionConfig(feature_map="taylor", feature_dim=3, window_size=0),
    "linear_attention-softmax": LinearAttentionConfig(feature_map="softmax", window_size=0),
    "lightning": LightningConfig(window_size=4, num_sink_tokens=2, gate_rank=3),
    "lightning-memory": LightningConfig(
        window_size=4, num_sink_tokens=2, num_memory_tokens=5, memory_block_size=4, gate_rank=3
    ),
    "lightning-plain": LightningConfig(window_size=0, output_gate=False, state_per_query_head=True),
    "gla": GLAConfig(window_size=4, num_sink_tokens=2, gate_rank=3),
    "gla-no_window": GLAConfig(window_size=0, gate_rank=3, state_per_query_head=True),
    "gated_delta_net": GatedDeltaNetConfig(window_size=4, num_sink_tokens=2, gate_rank=3),
    "gated_delta_net-no_window": GatedDeltaNetConfig(window_size=0, gate_rank=3, state_per_query_head=True),
    "kimi_delta": KimiDeltaConfig(window_size=4, num_sink_tokens=2, gate_rank=3),
    "kimi_delta-no_window": KimiDeltaConfig(window_size=0, output_gate=False, gate_rank=3),
    "jet_block": JetBlockConfig(window_size=4, num_sink_tokens=2, gate_rank=3),
    "jet_block-no_window": JetBlockConfig(window_size=0, gate_rank=3, kernel_size=2),
    "identity": IdentityConfig(),
    "affine": AffineConfig(),
}
# and of layers with two key-value heads, each with a memory of its own size
MIXERS_OF_TWO_HEADS = {
    **MIXERS,
    "sliding_window-memories": SlidingWindowConfig(
        window_size=3, num_sink_tokens=1, num_memory_tokens=(0, 7), memory_block_size=3
    ),
    "linear_attention-memories": LinearAttentionConfig(
        window_size=4, num_sink_tokens=2, num_memory_tokens=(5, 3), memory_block_size=4
    ),
    "gated_delta_net-memories": GatedDeltaNetConfig(
        window_size=4, num_sink_tokens=2, num_memory_tokens=(6, 0), memory_block_size=4, gate_rank=3
    ),
}
# one of each kind, for tests over hosts x mixers
MAIN_MIXERS = (
    "sliding_window", "linear_attention", "linear_attention-no_window", "lightning", "gla", "gated_delta_net", "jet_block",
)  # fmt: skip
