"""Turn a pretrained transformer into a task-specific hybrid of softmax and linear attention: distil, then replace.

Importing this package registers `hybrid_attention` checkpoints in transformers' Auto classes and has no other effect.
"""

from .adapters.bank import load_mixer_bank, save_mixer_bank
from .adapters.config import HybridPeftConfig
from .adapters.tuner import register_peft_method
from .configuration_hybrid import AttentionSite, HybridAttentionConfig, package_version
from .distillation.arguments import HybridTrainingArguments
from .distillation.calibration import calibrate_mixers
from .distillation.repair import RepairTrainer
from .distillation.repair_arguments import RepairArguments
from .distillation.repair_report import RepairReport
from .distillation.trainer import HybridTrainer
from .evaluation.ablation import ablate, state_share
from .mixers import (
    AffineConfig,
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
from .modeling_hybrid import register_auto_classes
from .search.callback import GreedyLayerSwapCallback
from .search.greedy import SwapReport
from .surgery import (
    HeadPlan,
    convert_to_hybrid,
    find_attention_sites,
    induction_scores,
    plan_heads,
    restore_full_attention,
)


__version__ = package_version()

__all__ = [
    "AffineConfig",
    "AttentionSite",
    "GLAConfig",
    "GatedDeltaNetConfig",
    "GreedyLayerSwapCallback",
    "HeadPlan",
    "HybridAttentionConfig",
    "HybridPeftConfig",
    "HybridTrainer",
    "HybridTrainingArguments",
    "IdentityConfig",
    "JetBlockConfig",
    "KimiDeltaConfig",
    "LightningConfig",
    "LinearAttentionConfig",
    "MixerConfig",
    "RepairArguments",
    "RepairReport",
    "RepairTrainer",
    "SlidingWindowConfig",
    "SwapReport",
    "ablate",
    "calibrate_mixers",
    "convert_to_hybrid",
    "find_attention_sites",
    "induction_scores",
    "list_feature_maps",
    "list_mixers",
    "load_mixer_bank",
    "plan_heads",
    "restore_full_attention",
    "save_mixer_bank",
    "state_share",
]

register_auto_classes()
register_peft_method()
