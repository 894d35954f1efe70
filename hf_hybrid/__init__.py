"""Turn a pretrained transformer into a task-specific hybrid of softmax and linear attention: distil, then replace.

Importing this package registers `hybrid_attention` checkpoints in transformers' Auto classes and has no other effect.
"""

from .configuration_hybrid import AttentionSite, HybridAttentionConfig, package_version
from .mixers import LinearAttentionConfig, MixerConfig, SlidingWindowConfig, list_feature_maps, list_mixers
from .modeling_hybrid import convert_to_hybrid, find_attention_sites, register_auto_classes, restore_full_attention


__version__ = package_version()

__all__ = [
    "AttentionSite",
    "HybridAttentionConfig",
    "LinearAttentionConfig",
    "MixerConfig",
    "SlidingWindowConfig",
    "convert_to_hybrid",
    "find_attention_sites",
    "list_feature_maps",
    "list_mixers",
    "restore_full_attention",
]

register_auto_classes()
