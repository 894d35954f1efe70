"""Turn a pretrained transformer into a task-specific hybrid of softmax and linear attention: distil, then replace.

Importing this package registers `hybrid_attention` checkpoints in transformers' Auto classes and has no other effect.
"""

from .ablation import ablate, state_share
from .bank import load_mixer_bank, save_mixer_bank
from .calibration import calibrate_mixers
from .callbacks import GreedyLayerSwapCallback
from .configuration_hybrid import AttentionSite, HybridAttentionConfig, package_version
from .mixers import (
    GatedDeltaNetConfig,
    GLAConfig,
    IdentityConfig,
    JetBlockConfig,
    KimiDeltaConfig,
    LightningConfig,
    LinearAttentionConfig,
    MixerConfig,
    SlidingWindowConfig,
    list_feature_maps,
    list_mixers,
)
from .modeling_hybrid import convert_to_hybrid, find_attention_sites, register_auto_classes, restore_full_attention
from .selection import SwapReport
from .trainer import HybridTrainer
from .training_args import HybridTrainingArguments


__version__ = package_version()

__all__ = [
    "AttentionSite",
    "GLAConfig",
    "GatedDeltaNetConfig",
    "GreedyLayerSwapCallback",
    "HybridAttentionConfig",
    "HybridTrainer",
    "HybridTrainingArguments",
    "IdentityConfig",
    "JetBlockConfig",
    "KimiDeltaConfig",
    "LightningConfig",
    "LinearAttentionConfig",
    "MixerConfig",
    "SlidingWindowConfig",
    "SwapReport",
    "ablate",
    "calibrate_mixers",
    "convert_to_hybrid",
    "find_attention_sites",
    "list_feature_maps",
    "list_mixers",
    "load_mixer_bank",
    "restore_full_attention",
    "save_mixer_bank",
    "state_share",
]

register_auto_classes()
