"""What means nothing in a distillation is refused before anything is loaded or changed."""

import json
import os
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from transformers.utils import logging

from ..conversion.layer import hybrid_layers
from ..errors import (
    AlreadyHybridError,
    HybridConfigError,
)
from .arguments import HybridTrainingArguments


logger = logging.get_logger(__name__)


def base_model(model: nn.Module) -> PreTrainedModel:
    """The model inside a `PeftModel`, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def check_arguments(mixer, args) -> None:
    """Refuse what means nothing in a distillation, before anything is loaded or changed."""
    if isinstance(mixer, transformers.TrainingArguments):
        raise HybridConfigError(
            f"HybridTrainer: the second argument is the mixer; got {type(mixer).__name__}. Pass the arguments by name: "
            "HybridTrainer(model, args=args)."
        )
    if not isinstance(args, HybridTrainingArguments):
        raise HybridConfigError(f"HybridTrainer: args must be HybridTrainingArguments; got {type(args).__name__}.")
    if args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST:
        name = (
            "load_best_model_at_end must be False"
            if args.load_best_model_at_end
            else "save_strategy must not be 'best'"
        )
        raise HybridConfigError(
            f"HybridTrainer: {name}. Evaluations during distillation run the teacher, so that no checkpoint is "
            "better than another; the search runs on the last one."
        )
    if args.n_gpu > 1:
        raise HybridConfigError(
            f"HybridTrainer: one process cannot train on {args.n_gpu} GPUs (DataParallel copies the model without its "
            "students). Start it with `accelerate launch` or `torchrun`, or show it one GPU (CUDA_VISIBLE_DEVICES)."
        )
    _check_sharding(args)


def _check_sharding(args) -> None:
    settings = args.fsdp_plugin_args

    def is_set(name: str) -> bool:
        if settings is not None:
            return bool(settings.get(name, False))
        return os.environ.get("FSDP_" + name.upper(), "false").lower() in ("1", "true")

    if settings is None and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() not in ("1", "true"):
        return
    if args.projections != "shared":
        raise HybridConfigError(
            f"HybridTrainer: projections={args.projections!r} cannot be sharded by FSDP, whose units would have to be "
            "gathered twice per layer. Use projections='shared', or DistributedDataParallel."
        )
    if is_set("activation_checkpointing"):
        raise HybridConfigError(
            "HybridTrainer: FSDP's activation_checkpointing must be False; it recomputes whole decoder layers, which "
            "no gradient reaches. Pass "
            "activation_checkpointing=True to HybridTrainingArguments, which recomputes the mixers."
        )
    if is_set("cpu_ram_efficient_loading"):
        raise HybridConfigError(
            "HybridTrainer: FSDP's cpu_ram_efficient_loading must be False; mixers start from the weights they stand "
            "beside, which only the first process would "
            "hold. Set it in the configuration of accelerate, or in fsdp_config."
        )


def check_start(model: PreTrainedModel, mixer, mixer_bank, args) -> None:
    """Refuse settings that mixers which are there already would leave without effect."""
    layers = hybrid_layers(model)
    if mixer_bank is not None and mixer is not None:
        raise HybridConfigError("HybridTrainer: give either mixer or mixer_bank (which names its mixer); got both.")
    if mixer is not None and layers:
        raise AlreadyHybridError(
            "HybridTrainer: the model has students already, so that mixer would be ignored. Leave mixer out to go on "
            "with them, or load the teacher again."
        )
    if layers and not any(p.requires_grad for layer in layers.values() for p in layer.hybrid.parameters()):
        has_parameters = any(True for layer in layers.values() for _ in layer.hybrid.parameters())
        if has_parameters:
            raise AlreadyHybridError(
                "HybridTrainer: the model's mixers are frozen. Load the adapter with is_trainable=True."
            )
    given = model.projections if layers else None
    if (layers or mixer_bank is not None) and (args.layers is not None or args.projections not in ("shared", given)):
        raise HybridConfigError(
            f"HybridTrainer: the students are there already (projections={given!r}), so that layers={args.layers!r} "
            f"and projections={args.projections!r} would be ignored. Leave them out."
        )


def last_complete_checkpoint(folder: str) -> str | None:
    """
    The newest checkpoint of `folder` that was written to its end, or `None`. The Trainer writes a checkpoint's state
    last and removes older checkpoints only afterwards: a kill while saving leaves one without a readable state, and a
    complete one before it. (`get_last_checkpoint` of transformers takes the highest number, complete or not.)
    """
    if not os.path.isdir(folder):
        return None
    prefix = PREFIX_CHECKPOINT_DIR + "-"
    numbers = (name.removeprefix(prefix) for name in os.listdir(folder) if name.startswith(prefix))
    for step in sorted((int(number) for number in numbers if number.isdigit()), reverse=True):
        path = os.path.join(folder, f"{prefix}{step}")
        try:
            with open(os.path.join(path, TRAINER_STATE_NAME), encoding="utf-8") as file:
                json.load(file)
        except (OSError, ValueError):
            logger.warning(f"{path} is incomplete (the run was killed while saving it): resuming from an earlier one.")
            continue
        return path
    return None


def load_teacher(name: str, init_kwargs: dict[str, Any]) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(
        name, **{k: v for k, v in init_kwargs.items() if k in ("revision", "token", "cache_dir", "subfolder")}
    )
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    if not (isinstance(architecture, type) and issubclass(architecture, PreTrainedModel)):  # a name comes from a file
        architecture = AutoModelForCausalLM
    return architecture.from_pretrained(name, **init_kwargs)


def is_finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def check_optimizer(optimizer: torch.optim.Optimizer | None, model: nn.Module) -> None:
    """Refuse an optimiser that was made before the mixers: nothing would train, and losses would look normal."""
    if optimizer is None:
        return
    given = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(parameter.requires_grad and id(parameter) in given for parameter in model.parameters()):
        raise HybridConfigError(
            "HybridTrainer: optimizers[0] must hold parameters of the mixers; it holds none that train. They are "
            "made by the trainer: leave `optimizers` out and choose by `optim` and `learning_rate`, or call "
            "prepare_distillation_(model) first and pass those with requires_grad."
        )
