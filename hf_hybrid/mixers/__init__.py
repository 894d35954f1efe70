"""The mixers. Importing this package registers them; `docs/mixers/` has a card for each."""

from .affine import Affine, AffineConfig
from .base import LinearMixer, MixerConfig, build_mixer, get_mixer, list_mixers, register_mixer, resolve_mixer_config
from .checks import INITIALIZATIONS, check_initialization
from .feature_maps import FeatureMap, get_feature_map, list_feature_maps, register_feature_map
from .gated_delta_net import GatedDeltaNet, GatedDeltaNetConfig
from .gla import GLA, GLAConfig
from .identity import Identity, IdentityConfig
from .jet_block import JetBlock, JetBlockConfig
from .kimi_delta import KimiDelta, KimiDeltaConfig
from .lightning import Lightning, LightningConfig
from .linear_attention import LinearAttention, LinearAttentionConfig
from .sliding_window import SlidingWindow, SlidingWindowConfig


__all__ = [
    "GLA",
    "INITIALIZATIONS",
    "Affine",
    "AffineConfig",
    "FeatureMap",
    "GLAConfig",
    "GatedDeltaNet",
    "GatedDeltaNetConfig",
    "Identity",
    "IdentityConfig",
    "JetBlock",
    "JetBlockConfig",
    "KimiDelta",
    "KimiDeltaConfig",
    "Lightning",
    "LightningConfig",
    "LinearAttention",
    "LinearAttentionConfig",
    "LinearMixer",
    "MixerConfig",
    "SlidingWindow",
    "SlidingWindowConfig",
    "build_mixer",
    "check_initialization",
    "get_feature_map",
    "get_mixer",
    "list_feature_maps",
    "list_mixers",
    "register_feature_map",
    "register_mixer",
    "resolve_mixer_config",
]
