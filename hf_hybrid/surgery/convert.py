"""A model becomes a hybrid and back, in place and without training."""

import warnings
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..configuration_hybrid import AttentionSite
from ..conversion.layer import (
    check_divisible,
    check_own_forward,
    convert_attention_,
    hybrid_layers,
    is_hybrid_attention,
    restore_attention_,
)
from ..conversion.offload import check_not_preloaded, execution_device
from ..conversion.probe import ProbedModel, probe_attention
from ..conversion.sites import select_heads
from ..errors import AlreadyHybridError, HybridConfigError, UnsupportedModelError, closest
from ..mixers import (
    INITIALIZATIONS,
    LinearMixer,
    MixerConfig,
    build_mixer,
    check_initialization,
    resolve_mixer_config,
)
from ..modeling_hybrid import HybridModelMixin, become_base_, become_hybrid_, describe, mixer_dtype
from ..objectives.local import stop_distillation_


logger = logging.get_logger(__name__)


def find_attention_sites(model: PreTrainedModel, example_inputs: dict | None = None) -> list[AttentionSite]:
    """
    Every place in `model` where attention can be replaced, in the order of execution. The position in this list is the
    layer index that `convert_to_hybrid` and the search use; a site's `key_value_heads` are the heads that they take.

    Args:
        model (`PreTrainedModel`): The model; it is run once on a few tokens, a picture or a sound, and comes back
            unchanged.
        example_inputs (`dict`, *optional*): Arguments of that forward, for models whose arguments cannot be told from
            their config.

    Raises:
        UnsupportedModelError: If there is no such place.
    """
    return probe_attention(model, example_inputs).sites


def convert_to_hybrid(
    model: PreTrainedModel,
    mixer: str | Mapping | MixerConfig = "linear_attention",
    layers=None,
    *,
    heads: Mapping | None = None,
    initialization: str | Collection[str] = INITIALIZATIONS,
    example_inputs: dict | None = None,
) -> PreTrainedModel:
    """
    Replace the softmax of some attention layers, or of some of their key-value heads, by a mixer, in place and without
    training.

    Args:
        model (`PreTrainedModel`): The model. It becomes a `Hybrid…` model that still is an instance of its former
            class; all weights keep their names and values, mixer parameters appear under `<attention>.hybrid.*`.
        mixer (`str`, `dict` or `MixerConfig`, *optional*, defaults to `"linear_attention"`): A name of `list_mixers()`
            or a config. A dict without a `"name"` holds one of these for each layer:
            `{"model.layers.3.self_attn": "gla"}`; without `layers` and `heads`, it names the layers too.
        layers (*optional*): Indices or names of attention sites, a part of the model (`"encoder"`, `"decoder"`,
            `"text"`, `"vision"`, `"audio"`), a module around sites (`"model.vision_tower"`), or a predicate on
            [`AttentionSite`]. All of them by default.
        heads (`dict`, *optional*): Key-value heads that become linear, by layer:
            `{"model.layers.3.self_attn": [0, 2]}`. The others keep their softmax, their keys and their values. Layers
            that it does not name become linear whole; without `layers`, it names the layers too.
        initialization (`str` or `Collection[str]`, *optional*): What fresh mixers take from their place in the
            pretrained model, see [`HybridTrainingArguments`]; all of it by default. `half_lives` and `output_scale` are
            [`calibrate_mixers`]' business.
        example_inputs (`dict`, *optional*): See [`find_attention_sites`].

    Returns:
        `PreTrainedModel`: The same object, now hybrid.

    Raises:
        AlreadyHybridError: If a selected layer is converted already.
        HybridConfigError, NoMatchingAttentionError, UnknownMixerError, UnsupportedModelError: See their messages;
            nothing was changed.

    Example:

        >>> model = convert_to_hybrid(model, mixer="sliding_window", layers=[1, 3, 5])
    """
    configs, initialization = _resolve_mixers(mixer), check_initialization(initialization)
    check_convertible(model)
    probed = probe_attention(model, example_inputs)
    if isinstance(configs, dict) and layers is None and heads is None:
        layers = list(configs)
    selected = select_heads(layers, heads, probed.sites, describe(model))
    put_mixers_(model, _by_layer(configs, selected, describe(model)), probed, selected, initialization)
    converted = hybrid_layers(model)
    for name, (_, wanted) in selected.items():
        converted[name].linear_heads = wanted
    become_hybrid_(model, "shared" if not isinstance(model, HybridModelMixin) else model.projections)
    names = ", ".join(sorted({converted[name].hybrid_config.name for name in selected}))
    logger.info(f"Converted {len(selected)} of {len(probed.sites)} attention layers to {names}.")
    return model


def _resolve_mixers(mixer) -> MixerConfig | dict[str, MixerConfig]:
    if isinstance(mixer, Mapping) and "name" not in mixer:
        if not mixer:
            raise HybridConfigError("mixer must name at least one layer, or be a config with a `name`; got {}.")
        return {str(name): resolve_mixer_config(of_layer) for name, of_layer in mixer.items()}
    return resolve_mixer_config(mixer)


def _by_layer(configs, selected, where: str) -> dict[str, MixerConfig]:
    """The config of every selected layer."""
    if isinstance(configs, MixerConfig):
        return dict.fromkeys(selected, configs)
    missing = [name for name in selected if name not in configs]
    extra = [name for name in configs if name not in selected]
    if missing or extra:
        raise HybridConfigError(
            f"mixer must name the selected layers of {where}, each by its full name; "
            + (f"{missing[0]!r} is missing." if missing else f"{extra[0]!r} is not selected.")
            + closest((extra or missing)[0], list(selected if extra else configs))
        )
    return configs


def put_mixers_(
    model: PreTrainedModel,
    config: MixerConfig | Mapping[str, MixerConfig],
    probed: ProbedModel,
    selected: dict[str, tuple[AttentionSite, tuple[int, ...]]],
    initialization: Collection[str] = INITIALIZATIONS,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """
    Put fresh mixers beside the selected layers' attention, in place, all switches off. Nothing is changed if one of
    them refuses. `config` is one for all layers, or one for each.
    """
    configs = config if isinstance(config, Mapping) else dict.fromkeys(selected, config)
    modules = dict(model.named_modules())
    for name in selected:
        if is_hybrid_attention(modules[name]):
            raise AlreadyHybridError(
                f"{name} of {describe(model)} is converted already. Call restore_full_attention(model) first, or "
                "select other layers."
            )
        check_own_forward(modules[name])
    if not isinstance(model, HybridModelMixin):
        check_own_forward(model)
    check_not_preloaded(model, list(selected))
    for name, (site, wanted) in selected.items():
        if len(wanted) < site.num_key_value_heads:
            check_divisible(modules[name], f"{name} ({type(modules[name]).__name__})")
    # build everything before touching anything: a mixer that refuses leaves the model as it was
    mixers = {
        name: new_mixer(
            configs[name], site, wanted, modules[name], initialization, dtype=dtype or mixer_dtype(model, modules[name])
        )
        for name, (site, wanted) in selected.items()
    }
    warn_of_losses({name: probed.lost[name] for name in selected})
    for name, (site, _) in selected.items():
        convert_attention_(modules[name], mixers[name], site)


def restore_full_attention(model: PreTrainedModel) -> PreTrainedModel:
    """
    Undo [`convert_to_hybrid`], in place: the model's class, config class, weights and their names are those of the
    family again.

    Raises:
        AlreadyHybridError: If the model is not hybrid.
    """
    if not isinstance(model, HybridModelMixin):
        raise AlreadyHybridError(f"{describe(model)} is not hybrid: there is nothing to restore.")
    if model.projections != "shared" and model.config.hybrid["sites"] and not _has_deltas(model):
        raise AlreadyHybridError(
            f"{describe(model)} was distilled with projections={model.projections!r}: its linear layers have "
            "projections of their own, over which the softmax is not what it was. Load the base model instead."
        )
    if model.repaired:
        raise AlreadyHybridError(
            f"{describe(model)} was repaired: its weights were trained after the replacement, so that they are not the "
            "base model's. Load the base model instead."
        )
    for layer in hybrid_layers(model).values():
        restore_attention_(layer)
    forget_distillation_(model)
    become_base_(model)
    return model


def _has_deltas(model: nn.Module) -> bool:
    return any(layer.hybrid_delta is not None for layer in hybrid_layers(model).values())


def forget_distillation_(model: PreTrainedModel) -> None:
    """Take off the model what a distillation noted on it."""
    for layer in hybrid_layers(model).values():
        layer.local_objective = None
    stop_distillation_(model)
    for name in ("distill_rank", "base_fingerprint"):
        model.__dict__.pop(name, None)


def check_convertible(model) -> None:
    """
    Raises:
        AlreadyHybridError: If it is in distillation.
        UnsupportedModelError: If it is no model of transformers, or carries an adapter, which a checkpoint would be
            taken for.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"model must be a transformers PreTrainedModel; got {type(model).__name__}.")
    if getattr(model, "training_objective", None) is not None:
        raise AlreadyHybridError(
            f"{describe(model)} is in distillation already: it has mixers at {len(hybrid_layers(model))} layers. "
            "Finalize it, or load the teacher again."
        )
    adapted = next((name for name, part in model.named_modules() if type(part).__module__.startswith("peft.")), None)
    if adapted is not None or getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedModelError(
            f"{describe(model)} carries an adapter ({adapted or 'loaded by load_adapter'}). Merge it first "
            "(PeftModel.merge_and_unload), or convert the base "
            "model and add the adapter afterwards: a save would write the adapter alone."
        )


def new_mixer(
    config: MixerConfig,
    site: AttentionSite,
    heads: Sequence[int],
    module: nn.Module,
    initialization: Collection[str] = INITIALIZATIONS,
    *,
    dtype: torch.dtype,
) -> LinearMixer:
    """A freshly initialised mixer for some heads of `site`, on the device of the attention it stands in for."""
    mixer = build_mixer(config.fitted(site.causal), **site.sizes(), heads=heads)
    device = execution_device(module)
    if device.type == "meta" or any(parameter.is_meta for parameter in mixer.parameters()):  # weights come from a file
        return mixer.to(dtype=dtype) if device.type != "meta" else mixer.to(device=device, dtype=dtype)
    mixer.init_weights(initialization)
    for part in mixer.modules():
        part._is_hf_initialized = True
    return mixer.to(device=device, dtype=dtype)


def warn_of_losses(losses: dict[str, tuple[str, ...]]) -> None:
    """One warning for all sites about what a linear layer cannot carry over."""
    lost = sorted({what for per_site in losses.values() for what in per_site})
    if lost:
        count = sum(bool(per_site) for per_site in losses.values())
        warnings.warn(
            f"{count} of the {len(losses)} converted layers lose {' and '.join(lost)}: a linear layer cannot express "
            "it. Distil them, or leave them out of `layers`.",
            stacklevel=4,
        )
