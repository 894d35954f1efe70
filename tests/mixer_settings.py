"""One or more settings per registered mixer: every contract runs over all of them."""

from hf_hybrid import LinearAttentionConfig, SlidingWindowConfig


MIXERS = {
    "sliding_window": SlidingWindowConfig(window_size=6, num_sink_tokens=2),
    "sliding_window-no_sinks": SlidingWindowConfig(window_size=1, num_sink_tokens=0),
    "linear_attention": LinearAttentionConfig(window_size=4, num_sink_tokens=2),
    "linear_attention-no_window": LinearAttentionConfig(window_size=0, num_sink_tokens=0),
    "linear_attention-wide": LinearAttentionConfig(window_size=70, num_sink_tokens=1, feature_dim=4),
    "linear_attention-elu": LinearAttentionConfig(feature_map="elu", window_size=3, num_sink_tokens=0),
    "linear_attention-relu": LinearAttentionConfig(feature_map="relu", window_size=5, num_sink_tokens=1),
}
# one of each registered name, for tests over hosts x mixers
MAIN_MIXERS = ("sliding_window", "linear_attention", "linear_attention-no_window")
