"""
Functions on whole models, in place: `convert` (without training), `students` (mixers in training), `switch` (which
heads are linear).
"""

from ..conversion.layer import hybrid_layers
from .convert import (
    check_convertible,
    convert_to_hybrid,
    find_attention_sites,
    forget_distillation_,
    new_mixer,
    restore_full_attention,
    warn_of_losses,
)
from .induction import induction_scores
from .plan import HeadPlan, plan_heads
from .students import check_projections, discard_students_, finalize_, is_of_students, prepare_distillation_
from .switch import linear_heads, set_linear_heads_


__all__ = [
    "HeadPlan",
    "check_convertible",
    "check_projections",
    "convert_to_hybrid",
    "discard_students_",
    "finalize_",
    "find_attention_sites",
    "forget_distillation_",
    "hybrid_layers",
    "induction_scores",
    "is_of_students",
    "linear_heads",
    "new_mixer",
    "plan_heads",
    "prepare_distillation_",
    "restore_full_attention",
    "set_linear_heads_",
    "warn_of_losses",
]
