"""What means nothing in a repair is refused before anything is changed, or as soon as it shows."""

import json
import os

import torch
from transformers import PreTrainedModel

from ..conversion.layer import hybrid_layers
from ..errors import HybridConfigError, UnsupportedModelError
from ..modeling_hybrid import HybridModelMixin, describe
from .repair_arguments import RepairArguments
from .repaired_parts import tuner_layers


def identity_of(model: HybridModelMixin) -> str:
    """What tells one hybrid from another: linear heads, mixers, and the weights under both."""
    sites = {
        n: {**layer.hybrid_config.to_dict(), "heads": layer.linear_heads} for n, layer in hybrid_layers(model).items()
    }
    return json.dumps([sites, model.__dict__["repair_fingerprint"]], sort_keys=True)


def logits_of(outputs, model) -> torch.Tensor:
    """
    Raises:
        UnsupportedModelError: If there is no distribution over classes to learn from.
    """
    logits = outputs.get("logits")
    kind = getattr(model.config, "problem_type", None)
    if logits is None or logits.shape[-1] < 2 or kind in ("regression", "multi_label_classification"):
        what = "no logits" if logits is None else f"logits of shape {list(logits.shape)}, problem_type {kind!r}"
        raise UnsupportedModelError(
            f"RepairTrainer: the model must predict one of several classes (tokens, labels); {describe(model)} gives "
            f"{what}."
        )
    return logits


def check_repair_arguments(args) -> None:
    if not isinstance(args, RepairArguments):
        raise HybridConfigError(f"RepairTrainer: args must be RepairArguments; got {type(args).__name__}.")
    if args.load_best_model_at_end:
        raise HybridConfigError(
            "RepairTrainer: load_best_model_at_end must be False; checkpoints hold what trains, not models."
        )
    if args.bf16_full_eval or args.fp16_full_eval:
        raise HybridConfigError(
            "RepairTrainer: bf16_full_eval and fp16_full_eval must be False; they would round the weights that train. "
            "Use bf16=True or fp16=True, which evaluate under autocast."
        )
    if args.n_gpu > 1:
        raise HybridConfigError(
            f"RepairTrainer: one process cannot train on {args.n_gpu} GPUs. Start it with `accelerate launch` or "
            "`torchrun`, or show it one GPU (CUDA_VISIBLE_DEVICES)."
        )
    sharded = args.fsdp_plugin_args is not None or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    if sharded or args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true"):
        raise UnsupportedModelError(
            "RepairTrainer: weights cannot be sharded (FSDP, DeepSpeed): the teacher is the same model with its switch "
            "off. Use DistributedDataParallel; a repair trains few weights."
        )


def check_repairable(model, teacher) -> None:
    if not isinstance(model, HybridModelMixin) or not any(x.linear_heads for x in hybrid_layers(model).values()):
        name = describe(model) if isinstance(model, PreTrainedModel) else type(model).__name__
        raise HybridConfigError(
            f"RepairTrainer: the model must be a hybrid with linear heads; got {name}. Convert it (convert_to_hybrid), "
            "or search first."
        )
    if model.training_objective is not None:
        raise HybridConfigError(
            "RepairTrainer: the model is in distillation. Call HybridTrainer.finalize() first, or trainer.repair(…)."
        )
    if getattr(model, "_hf_peft_config_loaded", False) or tuner_layers(model):
        raise UnsupportedModelError("RepairTrainer: the model carries an adapter. Merge it (merge_and_unload) first.")
    trained_before = model.projections != "shared" or model.repaired
    if teacher is None and trained_before:
        raise HybridConfigError(
            f"RepairTrainer: weights of {describe(model)} were trained after the replacement, so that its softmax is "
            "not its teacher's any more. Pass teacher=, the base model."
        )


__all__ = ["check_repair_arguments", "check_repairable", "identity_of", "logits_of"]
