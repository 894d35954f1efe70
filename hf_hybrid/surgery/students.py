"""Mixers in training beside a frozen model: put there, taken away again, or made what the model is."""

from collections.abc import Collection, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration_hybrid import PROJECTIONS
from ..conversion.layer import HybridAttentionMixin, hybrid_layers, put_mixer_, restore_attention_
from ..conversion.probe import probe_attention
from ..conversion.projections import merge_deltas_, new_deltas
from ..conversion.sites import select_heads
from ..errors import AlreadyHybridError, HybridConfigError, closest
from ..mixers import INITIALIZATIONS, MixerConfig, check_initialization, resolve_mixer_config
from ..modeling_hybrid import HybridModelMixin, become_hybrid_, describe, mixer_dtype
from ..objectives.local import start_distillation_
from .convert import check_convertible, forget_distillation_, put_mixers_, restore_full_attention
from .switch import set_linear_heads_


def prepare_distillation_(
    model: PreTrainedModel,
    mixer: str | dict | MixerConfig = "linear_attention",
    layers=None,
    *,
    heads: Mapping | None = None,
    projections: str = "shared",
    rank: int = 8,
    initialization: str | Collection[str] = INITIALIZATIONS,
    example_inputs: dict | None = None,
) -> PreTrainedModel:
    """
    Put a mixer beside every selected attention layer, in place, with all switches off, and freeze everything else. The
    model computes what it did; in training its forward returns local losses.

    Args:
        model (`PreTrainedModel`): The teacher.
        mixer, layers, heads, example_inputs: As in [`convert_to_hybrid`].
        projections (`str`, *optional*, defaults to `"shared"`): What trains beside the mixers. `"shared"`: nothing,
            they use the layer's frozen query, key, value and output projections. `"low_rank"`: a low-rank difference to
            them. `"full"`: a difference of their own size.
        rank (`int`, *optional*, defaults to 8): Rank of that difference.
        initialization (`str` or `Collection[str]`, *optional*): What fresh mixers take from their place in the
            pretrained model, all of `mixers.INITIALIZATIONS` by default. `half_lives` and `output_scale` are for
            [`calibrate_mixers`].

    Raises:
        AlreadyHybridError: If the model is hybrid or in distillation already.
        HybridConfigError, NoMatchingAttentionError, UnknownMixerError, UnsupportedModelError: See their messages;
            nothing was changed.
    """
    config = resolve_mixer_config(mixer)
    check_projections(projections, rank, heads)
    initialization = check_initialization(initialization)
    check_convertible(model)
    if isinstance(model, HybridModelMixin):
        raise AlreadyHybridError(
            f"{describe(model)} is converted already. Distillation starts from full attention: call "
            "restore_full_attention(model) first."
        )
    probed = probe_attention(model, example_inputs)
    selected = select_heads(layers, heads, probed.sites, describe(model))
    # fp32 master weights: bf16 would swallow small updates
    put_mixers_(model, config, probed, selected, initialization, dtype=torch.float32)
    for layer in hybrid_layers(model).values():
        layer.hybrid_delta = new_deltas(_without_mixer(layer), projections, rank)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_of_students(name))
    become_hybrid_(model, projections)
    model.__dict__["distill_rank"] = rank
    start_distillation_(model)
    return model


def _without_mixer(layer: HybridAttentionMixin) -> nn.Module:
    """A view of the layer without what distillation adds, whose parameters are the host's own."""
    view = nn.Module()
    view._parameters, view._modules = layer._parameters, {n: m for n, m in layer._modules.items() if n != "hybrid"}
    return view


def is_of_students(name: str) -> bool:
    """Whether a parameter of that name belongs to a mixer or to a difference to projections."""
    return ".hybrid." in name or ".hybrid_delta." in name or ".hybrid_mixer." in name


def check_projections(projections: str, rank: int, heads: Mapping | None) -> None:
    if projections not in PROJECTIONS:
        raise HybridConfigError(
            f"projections must be one of {', '.join(PROJECTIONS)}; got "
            f"{projections!r}.{closest(str(projections), PROJECTIONS)}"
        )
    if not isinstance(rank, int) or rank < 1:
        raise HybridConfigError(f"rank must be an integer >= 1; got {rank!r}.")
    if heads is not None and projections != "shared":
        raise HybridConfigError(
            f"heads go with projections='shared'; got projections={projections!r}. Trained projections belong to whole "
            "layers."
        )


def discard_students_(model: PreTrainedModel) -> None:
    """Undo [`prepare_distillation_`], in place: the model is the teacher again, all of it trainable."""
    set_linear_heads_(model, {})
    restore_full_attention(model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def finalize_(model: PreTrainedModel) -> PreTrainedModel:
    """
    Drop what the switch does not use, in place: mixers of heads that are not linear go, trained differences are added
    to the projections, everything is in the model's type and trainable. Ends a distillation.
    """
    for layer in hybrid_layers(model).values():
        layer.local_objective = None
        if not layer.linear_heads:
            restore_attention_(layer)
            continue
        kind = mixer_dtype(model, _without_mixer(layer))
        put_mixer_(layer, layer.hybrid.restricted(layer.linear_heads).to(kind))
        merge_deltas_(layer, layer.hybrid_delta)
        layer._modules.pop("hybrid_delta", None)
        layer.hybrid_delta = None
    forget_distillation_(model)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    model.refresh_hybrid_config()
    return model
