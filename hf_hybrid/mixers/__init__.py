"""The mixers. Importing this package registers them; `docs/mixers/` has a card for each."""

from .base import LinearMixer, MixerConfig, build_mixer, get_mixer, list_mixers, register_mixer, resolve_mixer_config
from .feature_maps import FeatureMap, get_feature_map, list_feature_maps, register_feature_map
from .linear_attention import LinearAttention, LinearAttentionConfig
from .sliding_window import SlidingWindow, SlidingWindowConfig


__all__ = [
    "FeatureMap",
    "LinearAttention",
    "LinearAttentionConfig",
    "LinearMixer",
    "MixerConfig",
    "SlidingWindow",
    "SlidingWindowConfig",
    "build_mixer",
    "get_feature_map",
    "get_mixer",
    "list_feature_maps",
    "list_mixers",
    "register_feature_map",
    "register_mixer",
    "resolve_mixer_config",
]
