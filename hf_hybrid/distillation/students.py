"""The mixers that a trainer trains: put beside the model's attention when it is made, and taken away if that fails."""

from transformers import PreTrainedModel

from ..adapters.bank import load_mixer_bank
from ..conversion.layer import hybrid_layers
from ..modeling_hybrid import HybridModelMixin
from ..objectives.local import LocalDistillation, stop_distillation_
from ..surgery import discard_students_, is_of_students, prepare_distillation_, set_linear_heads_
from .arguments import HybridTrainingArguments


def put_back(model: PreTrainedModel, brought: bool, heads: dict, objective: LocalDistillation | None) -> None:
    """After an error: the caller's model as it came."""
    if not isinstance(model, HybridModelMixin):
        return
    if not brought:
        discard_students_(model)
        return
    if objective is None:
        stop_distillation_(model)
    set_linear_heads_(model, heads, remember=False)


def put_mixers(model: PreTrainedModel, mixer, mixer_bank: str | None, args: HybridTrainingArguments) -> None:
    """Those of a bank, or fresh ones, unless the model brings its own."""
    if mixer_bank is not None:
        load_mixer_bank(model, mixer_bank)
    elif not hybrid_layers(model):
        prepare_distillation_(
            model,
            mixer or "linear_attention",
            args.selected_layers(),
            projections=args.projections,
            rank=args.projection_rank,
            initialization=args.initializations,
        )
    elif getattr(model, "peft_config", None) is None:  # of a conversion: trained as fresh ones are, in fp32, and alone
        for layer in hybrid_layers(model).values():
            layer.hybrid.float()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_of_students(name))
