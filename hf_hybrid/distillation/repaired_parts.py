"""What of a hybrid trains in a repair: found, thawed or added, and merged again."""

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..adapters.fingerprint import base_fingerprint
from ..conversion.layer import hybrid_layers
from ..errors import HybridConfigError
from ..modeling_hybrid import describe
from .repair_arguments import RepairArguments


ADAPTER = "repair"
LINEAR = (nn.Linear, Conv1D)


def tuner_layers(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All attention modules of the kinds of those that are converted, by name."""
    kinds = {layer.host_class for layer in hybrid_layers(model).values()}
    return {n: m for n, m in model.named_modules() if getattr(type(m), "host_class", type(m)) in kinds}


def start_training_(model: PreTrainedModel, args: RepairArguments) -> dict[str, str]:
    """
    Freeze everything, and thaw or add what is to train, in fp32. Returns what each trained parameter is part of, by
    name.
    """
    attention = attention_modules(model)
    projections = [
        f"{name}.{path}"
        for name, module in attention.items()
        for path, part in module.named_modules()
        if isinstance(part, LINEAR) and not path.startswith(("hybrid.", "hybrid_delta."))
    ]
    # heads of a task lie outside the base model
    body = model.base_model_prefix + "." if hasattr(model, model.base_model_prefix) else ""
    head = model.get_output_embeddings()
    inside = tuple(f"{name}." for name in attention)
    names: dict[str, str] = {}
    for path, module in model.named_modules():
        part = None
        if path.startswith(inside):
            part = "norms" if _is_norm(module) and ".hybrid." not in f".{path}." else None
        elif _is_norm(module):
            part = "norms"
        elif isinstance(module, LINEAR) and module is not head and path.startswith(body):
            part = "mlp"
        if part in args.trained_parts:
            names |= {f"{path}.{name}": part for name, _ in module.named_parameters(recurse=False)}
    mixers = {f"{path}.hybrid" for path in attention}
    if "lora" in args.trained_parts and not projections:
        raise HybridConfigError(
            f"RepairTrainer: lora needs linear projections in the attention layers of {describe(model)}; there are "
            f"none. Choose other parts: trained={args.trained!r}."
        )
    # of the teacher, before anything changes
    model.__dict__["repair_fingerprint"] = base_fingerprint(model, hybrid_layers(model))
    model.__dict__.pop("base_fingerprint", None)
    model.requires_grad_(False)
    if names:
        model.float()  # a step of 1e-5 is nothing beside a weight in bf16
    if "lora" in args.trained_parts:
        config = LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=projections)
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    parts = {}
    for name, parameter in model.named_parameters():
        plain = name.replace(".base_layer.", ".")
        part = "lora" if ".lora_" in name else names.get(plain)
        owner = name.split(".hybrid.")[0] + ".hybrid"
        if owner in mixers and ".hybrid." in name:
            part = "mixers" if "mixers" in args.trained_parts else None
        if part:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
            parts[name] = part
    if not parts:
        raise HybridConfigError(
            f"RepairTrainer: nothing of trained={args.trained!r} is there to train in {describe(model)}. Add lora."
        )
    return parts


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False))


def merge_(model: nn.Module) -> None:
    """Add the differences to the projections, and put these back in their places."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, module.get_base_layer())
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        model.__dict__.pop(attribute, None)


__all__ = ["attention_modules", "merge_", "start_training_", "tuner_layers"]
